"""The GPT-2 family: GPT-2, DistilGPT-2, DialoGPT, BioMedLM and others saved as ``GPT2LMHeadModel``.

Positions are learned, so that no position after ``n_positions`` exists. Source: Radford et al. 2019, "Language Models
are Unsupervised Multitask Learners".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models.activations import activate, check_activation
from fedjax_llm.models.family import Family, Weight, reading
from fedjax_llm.models.layers import LayerNorm, Projection, grouped_attention, remembered, vocabulary_logits
from fedjax_llm.types import Params


@dataclass(frozen=True)
class GPT2Config:
    """The static shape of a model. Scores are divided by the root of ``head_dim``, the number of the layer, or both."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    epsilon: float
    context: int
    activation: str = "gelu_new"
    tied: bool = True
    scaled: bool = True
    scaled_by_layer: bool = False
    window: None = None

    @property
    def kv_heads(self) -> int:
        """Every head has its own keys and values."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def config_from_hf(raw: Mapping[str, Any]) -> GPT2Config:
    """Reads a ``config.json``. Its dropouts, of full training, are not applied.

    Raises:
      UserError: a field is missing, or the activation, the heads or attention to an encoder is not supported.
    """
    if raw.get("add_cross_attention"):
        raise UserError("add_cross_attention is not supported: there is no encoder here to attend to")
    with reading("GPT2LMHeadModel"):
        width, heads = int(raw["n_embd"]), int(raw["n_head"])
        config = GPT2Config(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            mlp_width=int(raw.get("n_inner") or 4 * width),
            layers=int(raw["n_layer"]),
            heads=heads,
            epsilon=float(raw.get("layer_norm_epsilon", 1e-5)),
            context=int(raw.get("n_positions") or raw["n_ctx"]),
            activation=str(raw.get("activation_function", "gelu_new")),
            tied=bool(raw.get("tie_word_embeddings", True)),
            scaled=bool(raw.get("scale_attn_weights", True)),
            scaled_by_layer=bool(raw.get("scale_attn_by_inverse_layer_idx", False)),
        )
    if width % heads:
        raise UserError(f"n_embd {width} is not a multiple of n_head {heads}")
    check_activation(config.activation, "activation_function")
    return config


class Attention(nn.Module):
    """Causal self-attention; its one input projection holds all queries, then all keys, then all values."""

    config: GPT2Config
    dropout: float

    @nn.compact
    def __call__(self, x, scale, mask, cache, at, keys):
        """[M, L, D] -> ([M, L, D], cache); the cache, if there is one, takes the new keys and values at ``at``."""
        c = self.config
        fused = Projection(3 * c.width, True, self.dropout, name="c_attn")(x, keys)
        fused = fused.reshape(*x.shape[:2], 3, c.heads, c.head_dim)
        query, key, value = fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
        key, value, cache = remembered(cache, key, value, at)
        mixed = grouped_attention(query, key, value, mask, scale)
        return Projection(c.width, True, self.dropout, name="c_proj")(mixed, keys), cache


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    config: GPT2Config
    dropout: float

    @nn.compact
    def __call__(self, x, keys):
        """[M, L, D] -> [M, L, D]."""
        c = self.config
        wide = Projection(c.mlp_width, True, self.dropout, name="c_fc")(x, keys)
        return Projection(c.width, True, self.dropout, name="c_proj")(activate(c.activation, wide), keys)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    config: GPT2Config
    dropout: float

    @nn.compact
    def __call__(self, x, terms, mask, cache=None, at=None, dropout_keys=None):
        """[M, L, D] -> ([M, L, D], cache)."""
        c = self.config
        normed = LayerNorm(c.epsilon, name="ln_1")(x)
        mixed, cache = Attention(c, self.dropout, name="attn")(normed, terms, mask, cache, at, dropout_keys)
        x = x + mixed
        normed = LayerNorm(c.epsilon, name="ln_2")(x)
        return x + MLP(c, self.dropout, name="mlp")(normed, dropout_keys), cache


def embed(config: GPT2Config, params: Params, tokens: Array, positions: Array) -> tuple[Array, tuple[()]]:
    """Token embeddings plus those of the positions, [M, L, D]. Padding past the last position takes the last one's."""
    places = jnp.minimum(positions, config.context - 1)
    return params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][places], ()


def layer_terms(config: GPT2Config, terms: tuple[()], layer: int) -> Array:
    """What the products of queries and keys are multiplied by in a layer."""
    scale = config.head_dim**-0.5 if config.scaled else 1.0
    return jnp.float32(scale / (layer + 1) if config.scaled_by_layer else scale)


def finish(config: GPT2Config, params: Params, x: Array) -> Array:
    """The final norm."""
    return jnp.asarray(LayerNorm(config.epsilon).apply({"params": params["ln_f"]}, x))


def logits(config: GPT2Config, params: Params, hidden: Array) -> Array:
    """[K, D] -> [K, V] in f32."""
    return vocabulary_logits(hidden, params["wte" if config.tied else "lm_head"]["embedding"])


def projections(config: GPT2Config) -> dict[str, tuple[int, int]]:
    """Adaptable module path within a layer -> (in, out)."""
    c = config
    return {
        "attn.c_attn": (c.width, 3 * c.width),
        "attn.c_proj": (c.width, c.width),
        "mlp.c_fc": (c.width, c.mlp_width),
        "mlp.c_proj": (c.mlp_width, c.width),
    }


def weights(config: GPT2Config) -> Sequence[Weight]:
    """The weight table: the Hugging Face names, with our tree mirroring them. Its matrices are [in, out] already."""
    c, size = config, (config.vocab_size, config.width)
    table = [
        Weight("transformer.wte.weight", ("wte", "embedding"), size, split=0),
        Weight("transformer.wpe.weight", ("wpe", "embedding"), (c.context, c.width)),
    ]
    if not c.tied:
        table.append(Weight("lm_head.weight", ("lm_head", "embedding"), size, split=0))
    norms = {f"transformer.h.{{layer}}.{name}": name for name in ("ln_1", "ln_2")}
    for name, module in {"transformer.ln_f": "ln_f", **norms}.items():
        table.append(Weight(f"{name}.weight", (module, "scale"), (c.width,)))
        table.append(Weight(f"{name}.bias", (module, "bias"), (c.width,)))
    # The outputs of c_attn lie with all queries before all keys: parts of equal size would not be heads, and every
    # product of attention would first move them between devices. So every device computes them all.
    cuts = {"attn.c_attn": None, "mlp.c_fc": 1}
    for module, (fan_in, fan_out) in projections(c).items():
        name, path = f"transformer.h.{{layer}}.{module}", tuple(module.split("."))
        table.append(Weight(f"{name}.weight", (*path, "kernel"), (fan_in, fan_out), split=cuts.get(module, 0)))
        table.append(Weight(f"{name}.bias", (*path, "bias"), (fan_out,)))
    return table


FAMILY = Family(
    architectures=("GPT2LMHeadModel",),
    config_from_hf=config_from_hf,
    weights=weights,
    embed=embed,
    block=Block,
    finish=finish,
    logits=logits,
    projections=projections,
    layer_terms=layer_terms,
)
