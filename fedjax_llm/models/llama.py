"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and 2.5, Qwen3.

They differ in four switches: biases on q, k and v (Qwen2), norms on the heads of q and k (Qwen3), tied embeddings,
and how rotary frequencies are scaled (Llama 3). Sources: Touvron et al. 2023 (arXiv 2307.09288), Jiang et al. 2023
(2310.06825), Yang et al. 2024 (2412.15115) and 2025 (2505.09388).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models.family import Family, FamilyConfig, Weight, check_groups, reading
from fedjax_llm.models.layers import (
    GatedMLP,
    Projection,
    RMSNorm,
    grouped_attention,
    remembered,
    rotary_tables,
    rotate,
    vocabulary_logits,
)
from fedjax_llm.types import Params


@dataclass(frozen=True)
class LlamaConfig:
    """The static shape of a Llama-like model. ``frequencies`` are the rotary ones, [head_dim / 2], scaling included."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    frequencies: tuple[float, ...]
    context: int
    window: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False


class LlamaLike(FamilyConfig, Protocol):
    """What :func:`embed`, :func:`logits`, :func:`projections` and :func:`outer_weights` read of a configuration.

    The families whose files are laid out like Llama's share these functions.
    """

    @property
    def mlp_width(self) -> int:
        """Within the MLP."""
        ...

    @property
    def heads(self) -> int:
        """Of queries."""
        ...

    @property
    def epsilon(self) -> float:
        """Of the norms."""
        ...

    @property
    def frequencies(self) -> tuple[float, ...]:
        """The rotary ones."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output layer too."""
        ...


def rotary_frequencies(head_dim: int, base: float, scaling: Mapping[str, Any] | None) -> tuple[float, ...]:
    """Rotary frequencies [head_dim / 2] with the checkpoint's scaling.

    Args:
      head_dim: width of a head.
      base: ``rope_theta``.
      scaling: ``rope_scaling`` (or ``rope_parameters``) of the configuration; its ``rope_type`` is ``default``,
        ``linear``, ``llama3`` (Llama 3.1 model card: low frequencies are divided by ``factor``, with a linear ramp
        between) or ``factors`` (explicit divisors, as GGUF files carry them).

    Raises:
      UserError: another type of scaling.
    """
    plain = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        scaled = plain
    elif kind == "linear":
        scaled = plain / scaling["factor"]
    elif kind == "factors":
        scaled = plain / np.asarray(scaling["factors"], np.float64)
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
        ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
        scaled = plain * (ramp + (1.0 - ramp) / scaling["factor"])
    else:
        raise UserError(f"rope scaling of type {kind!r} is not supported; supported: default, linear, llama3, factors")
    return tuple(float(np.float32(f)) for f in scaled)


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """Reads a ``config.json``.

    Raises:
      UserError: a field is missing, or the activation or rope scaling is not supported.
    """
    architecture = (raw.get("architectures") or [""])[0]
    qwen2, qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
    with reading(architecture):
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        head_dim = int(raw.get("head_dim") or width // heads)
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        base = float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0)
        window = raw.get("sliding_window")
        if (qwen2 or qwen3) and not raw.get("use_sliding_window", False):
            window = None
        attention_bias = bool(raw.get("attention_bias", False))
        config = LlamaConfig(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            mlp_width=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            epsilon=float(raw.get("rms_norm_eps", 1e-6)),
            frequencies=rotary_frequencies(head_dim, base, rope),
            context=int(raw.get("max_position_embeddings", 2048)),
            window=int(window) if window else None,
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or attention_bias,
            output_bias=attention_bias and not qwen2,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            head_norm=qwen3,
        )
    _check(config, raw)
    return config


def _check(config: LlamaConfig, raw: Mapping[str, Any]) -> None:
    """Refuses what the block below would compute wrongly."""
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {raw['hidden_act']!r} is not supported in the Llama family; supported: 'silu'")
    check_groups(config.heads, config.kv_heads)
    if raw.get("use_sliding_window") and raw.get("max_window_layers", config.layers) not in (0, None):
        raise UserError("use_sliding_window in a part of the layers (max_window_layers > 0) is not supported")


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads."""

    config: LlamaConfig
    dropout: float

    @nn.compact
    def __call__(self, x, tables, mask, cache, at, keys):
        """[M, L, D] -> ([M, L, D], cache); the cache, if there is one, takes the new keys and values at ``at``."""
        c = self.config

        def heads(name: str, count: int) -> Array:
            flat = Projection(count * c.head_dim, c.qkv_bias, self.dropout, name=name)(x, keys)
            return flat.reshape(*x.shape[:2], count, c.head_dim)

        query, key, value = heads("q_proj", c.heads), heads("k_proj", c.kv_heads), heads("v_proj", c.kv_heads)
        if c.head_norm:
            query, key = RMSNorm(c.epsilon, name="q_norm")(query), RMSNorm(c.epsilon, name="k_norm")(key)
        query, key = rotate(query, tables), rotate(key, tables)
        key, value, cache = remembered(cache, key, value, at)
        mixed = grouped_attention(query, key, value, mask)
        return Projection(c.width, c.output_bias, self.dropout, name="o_proj")(mixed, keys), cache


@jax.checkpoint
def gated(gate: Array, up: Array) -> Array:
    """``silu(gate) * up``, differentiated from its two inputs: jax alone keeps more, at a cost in memory and time."""
    return jax.nn.silu(gate) * up


class Block(nn.Module):
    """One pre-norm transformer layer."""

    config: LlamaConfig
    dropout: float

    @nn.compact
    def __call__(self, x, terms, mask, cache=None, at=None, dropout_keys=None):
        """[M, L, D] -> ([M, L, D], cache)."""
        c = self.config
        normed = RMSNorm(c.epsilon, name="input_layernorm")(x)
        mixed, cache = Attention(c, self.dropout, name="self_attn")(normed, terms, mask, cache, at, dropout_keys)
        x = x + mixed
        normed = RMSNorm(c.epsilon, name="post_attention_layernorm")(x)
        return x + GatedMLP(c.width, c.mlp_width, gated, c.mlp_bias, self.dropout, name="mlp")(
            normed, dropout_keys
        ), cache


def embed(config: LlamaLike, params: Params, tokens: Array, positions: Array) -> tuple[Array, tuple[Array, Array]]:
    """Token embeddings [M, L, D], and the rotary tables of ``positions``."""
    tables = rotary_tables(positions, jnp.asarray(config.frequencies, jnp.float32))
    return params["embed_tokens"]["embedding"][tokens], tables


def finish(config: LlamaLike, params: Params, x: Array) -> Array:
    """The final norm."""
    return jnp.asarray(RMSNorm(config.epsilon).apply({"params": params["norm"]}, x))


def logits(config: LlamaLike, params: Params, hidden: Array) -> Array:
    """[K, D] -> [K, V] in f32."""
    table = params["embed_tokens"]["embedding"] if config.tied else params["lm_head"]["embedding"]
    return vocabulary_logits(hidden, table)


def projections(config: LlamaLike) -> dict[str, tuple[int, int]]:
    """Adaptable module path within a layer -> (in, out)."""
    c, heads, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (c.width, heads),
        "self_attn.k_proj": (c.width, kv),
        "self_attn.v_proj": (c.width, kv),
        "self_attn.o_proj": (heads, c.width),
        "mlp.gate_proj": (c.width, c.mlp_width),
        "mlp.up_proj": (c.width, c.mlp_width),
        "mlp.down_proj": (c.mlp_width, c.width),
    }


def outer_weights(config: LlamaLike) -> list[Weight]:
    """Rows of the weight table outside of layers: the embedding, the final norm, and the output layer if not tied."""
    size = (config.vocab_size, config.width)
    table = [
        Weight("model.embed_tokens.weight", ("embed_tokens", "embedding"), size, split=0),
        Weight("model.norm.weight", ("norm", "scale"), (config.width,)),
    ]
    if not config.tied:
        table.append(Weight("lm_head.weight", ("lm_head", "embedding"), size, split=0))
    return table


def layer_matrices(modules: Mapping[str, tuple[int, int]], biased: Collection[str] = ()) -> list[Weight]:
    """Rows of the weight table for the projections of a layer.

    Args:
      modules: path -> (in, out). The last of attention and of MLP (``o_proj``, ``down_proj``) are cut by their inputs.
      biased: paths of those that have a bias.
    """
    table = []
    for module, (fan_in, fan_out) in modules.items():
        name, path = f"model.layers.{{layer}}.{module}", tuple(module.split("."))
        split = 0 if path[-1] in ("o_proj", "down_proj") else 1
        table.append(Weight(f"{name}.weight", (*path, "kernel"), (fan_out, fan_in), transpose=True, split=split))
        if module in biased:
            table.append(Weight(f"{name}.bias", (*path, "bias"), (fan_out,)))
    return table


def layer_norms(sizes: Mapping[str, int]) -> list[Weight]:
    """Rows of the weight table for the norms of a layer: path -> size."""
    return [
        Weight(f"model.layers.{{layer}}.{module}.weight", (*module.split("."), "scale"), (size,))
        for module, size in sizes.items()
    ]


def weights(config: LlamaConfig) -> Sequence[Weight]:
    """The weight table: the Hugging Face names, with our tree mirroring them."""
    modules, switches = projections(config), {"mlp": config.mlp_bias, "self_attn": config.qkv_bias}
    biased = {module for module in modules if switches[module.split(".")[0]]} - {"self_attn.o_proj"}
    if config.output_bias:
        biased.add("self_attn.o_proj")
    norms = {"input_layernorm": config.width, "post_attention_layernorm": config.width}
    if config.head_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    return [*outer_weights(config), *layer_matrices(modules, biased), *layer_norms(norms)]


FAMILY = Family(
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    config_from_hf=config_from_hf,
    weights=weights,
    embed=embed,
    block=Block,
    finish=finish,
    logits=logits,
    projections=projections,
)
