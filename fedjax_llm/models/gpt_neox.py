"""The GPT-NeoX family: Pythia, GPT-NeoX-20B.

Rotary positions turn the first ``rotary_pct`` of every head only, and attention and MLP stand side by side or one after
the other. Sources: Black et al. 2022 (arXiv 2204.06745), Biderman et al. 2023 (2304.01373).
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
from fedjax_llm.models.layers import (
    LayerNorm,
    Projection,
    grouped_attention,
    remembered,
    rotary_tables,
    rotate,
    vocabulary_logits,
)
from fedjax_llm.models.llama import rotary_frequencies
from fedjax_llm.types import Params


@dataclass(frozen=True)
class GPTNeoXConfig:
    """The static shape of a model. ``frequencies`` are the rotary ones, for half of the turned part of a head."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    epsilon: float
    frequencies: tuple[float, ...]
    context: int
    activation: str = "gelu"
    parallel: bool = True
    bias: bool = True
    tied: bool = False
    window: None = None

    @property
    def kv_heads(self) -> int:
        """Every head has its own keys and values."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def config_from_hf(raw: Mapping[str, Any]) -> GPTNeoXConfig:
    """Reads a ``config.json``. Its dropouts, of full training, are not applied.

    Raises:
      UserError: a field is missing, or the activation, the heads or the rotary positions are not supported.
    """
    with reading("GPTNeoXForCausalLM"):
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        if width % heads:
            raise UserError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        base = float(rope.get("rope_theta") or raw.get("rotary_emb_base") or 10000.0)
        share = rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))
        turned = int(width // heads * share)
        if turned % 2 or not 0 < turned <= width // heads:
            raise UserError(f"rotary_pct {share} of {width // heads} components of a head is no even number")
        config = GPTNeoXConfig(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            mlp_width=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            epsilon=float(raw.get("layer_norm_eps", 1e-5)),
            frequencies=rotary_frequencies(turned, base, rope),
            context=int(raw.get("max_position_embeddings", 2048)),
            activation=str(raw.get("hidden_act", "gelu")),
            parallel=bool(raw.get("use_parallel_residual", True)),
            bias=bool(raw.get("attention_bias", True)),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    check_activation(config.activation, "hidden_act")
    return config


class Attention(nn.Module):
    """Causal self-attention; its one input projection holds query, key and value of a head side by side."""

    config: GPTNeoXConfig
    dropout: float

    @nn.compact
    def __call__(self, x, tables, mask, cache, at, keys):
        """[M, L, D] -> ([M, L, D], cache); the cache, if there is one, takes the new keys and values at ``at``."""
        c = self.config
        fused = Projection(3 * c.width, c.bias, self.dropout, name="query_key_value")(x, keys)
        fused = fused.reshape(*x.shape[:2], c.heads, 3, c.head_dim)
        query, key, value = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        query, key = rotate(query, tables), rotate(key, tables)
        key, value, cache = remembered(cache, key, value, at)
        mixed = grouped_attention(query, key, value, mask)
        return Projection(c.width, c.bias, self.dropout, name="dense")(mixed, keys), cache


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    config: GPTNeoXConfig
    dropout: float

    @nn.compact
    def __call__(self, x, keys):
        """[M, L, D] -> [M, L, D]."""
        c = self.config
        wide = Projection(c.mlp_width, True, self.dropout, name="dense_h_to_4h")(x, keys)
        return Projection(c.width, True, self.dropout, name="dense_4h_to_h")(activate(c.activation, wide), keys)


class Block(nn.Module):
    """One pre-norm transformer layer. Where it is parallel, attention and MLP both read what enters the layer."""

    config: GPTNeoXConfig
    dropout: float

    @nn.compact
    def __call__(self, x, terms, mask, cache=None, at=None, dropout_keys=None):
        """[M, L, D] -> ([M, L, D], cache)."""
        c = self.config
        normed = LayerNorm(c.epsilon, name="input_layernorm")(x)
        mixed, cache = Attention(c, self.dropout, name="attention")(normed, terms, mask, cache, at, dropout_keys)
        read = x if c.parallel else x + mixed
        normed = LayerNorm(c.epsilon, name="post_attention_layernorm")(read)
        return MLP(c, self.dropout, name="mlp")(normed, dropout_keys) + mixed + x, cache


def embed(config: GPTNeoXConfig, params: Params, tokens: Array, positions: Array) -> tuple[Array, tuple[Array, Array]]:
    """Token embeddings [M, L, D], and the rotary tables of ``positions``."""
    tables = rotary_tables(positions, jnp.asarray(config.frequencies, jnp.float32))
    return params["embed_in"]["embedding"][tokens], tables


def finish(config: GPTNeoXConfig, params: Params, x: Array) -> Array:
    """The final norm."""
    return jnp.asarray(LayerNorm(config.epsilon).apply({"params": params["final_layer_norm"]}, x))


def logits(config: GPTNeoXConfig, params: Params, hidden: Array) -> Array:
    """[K, D] -> [K, V] in f32."""
    return vocabulary_logits(hidden, params["embed_in" if config.tied else "embed_out"]["embedding"])


def projections(config: GPTNeoXConfig) -> dict[str, tuple[int, int]]:
    """Adaptable module path within a layer -> (in, out)."""
    c = config
    return {
        "attention.query_key_value": (c.width, 3 * c.width),
        "attention.dense": (c.width, c.width),
        "mlp.dense_h_to_4h": (c.width, c.mlp_width),
        "mlp.dense_4h_to_h": (c.mlp_width, c.width),
    }


def weights(config: GPTNeoXConfig) -> Sequence[Weight]:
    """The weight table: the Hugging Face names, with our tree mirroring them."""
    c, size = config, (config.vocab_size, config.width)
    table = [Weight("gpt_neox.embed_in.weight", ("embed_in", "embedding"), size, split=0)]
    if not c.tied:
        table.append(Weight("embed_out.weight", ("embed_out", "embedding"), size, split=0))
    norms = {f"gpt_neox.layers.{{layer}}.{name}": name for name in ("input_layernorm", "post_attention_layernorm")}
    for name, module in {"gpt_neox.final_layer_norm": "final_layer_norm", **norms}.items():
        table.append(Weight(f"{name}.weight", (module, "scale"), (c.width,)))
        table.append(Weight(f"{name}.bias", (module, "bias"), (c.width,)))
    for module, (fan_in, fan_out) in projections(c).items():
        name, path = f"gpt_neox.layers.{{layer}}.{module}", tuple(module.split("."))
        # The outputs of query_key_value lie head by head, so that its parts are whole heads, as those of q, k and v.
        split = 0 if path[-1] in ("dense", "dense_4h_to_h") else 1
        table.append(Weight(f"{name}.weight", (*path, "kernel"), (fan_out, fan_in), transpose=True, split=split))
        if c.bias or path[0] == "mlp":
            table.append(Weight(f"{name}.bias", (*path, "bias"), (fan_out,)))
    return table


FAMILY = Family(
    architectures=("GPTNeoXForCausalLM",),
    config_from_hf=config_from_hf,
    weights=weights,
    embed=embed,
    block=Block,
    finish=finish,
    logits=logits,
    projections=projections,
)
