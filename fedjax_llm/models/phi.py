"""The Phi 3 family: Phi 3 and 3.5 (mini and medium), Phi 4 and Phi 4 mini.

A Llama whose projections are fused: one matrix for q, k and v, and one for gate and up. Sources: Abdin et al. 2024
(arXiv 2404.14219 and 2412.08905), Microsoft 2025 (2503.01743).

The models of 128k tokens have two sets of rotary frequencies (LongRoPE, Ding et al. 2024, arXiv 2402.13753): a short
one up to the length of pre-training, and a long one for every position of a text that is longer. So the first tokens
of a text would depend on its length, which nothing here that goes token by token can follow. The short set is read, and
the context is the length of pre-training.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models import llama
from fedjax_llm.models.family import Family, Weight, check_groups, reading
from fedjax_llm.models.layers import Projection, RMSNorm, grouped_attention, remembered, rotate
from fedjax_llm.models.llama import (
    finish,
    gated,
    layer_matrices,
    layer_norms,
    logits,
    outer_weights,
    rotary_frequencies,
)
from fedjax_llm.types import Params


@dataclass(frozen=True)
class PhiConfig:
    """The static shape of a Phi 3 model.

    ``frequencies`` are the rotary ones of the first dimensions of a head, twice as many as there are frequencies; the
    others are not turned. ``rotary_scale`` multiplies what is turned.
    """

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
    rotary_scale: float = 1.0
    window: int | None = None
    tied: bool = False


def config_from_hf(raw: Mapping[str, Any]) -> PhiConfig:
    """Reads a ``config.json``. What it leaves out has the values of ``transformers``.

    Raises:
      UserError: a field is missing, or the activation or rope scaling is not supported.
    """
    with reading("Phi3ForCausalLM"):
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        head_dim = int(raw.get("head_dim") or width // heads)
        frequencies, rotary_scale, context = _rotary(raw, head_dim)
        config = PhiConfig(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            mlp_width=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            epsilon=float(raw.get("rms_norm_eps", 1e-5)),
            frequencies=frequencies,
            context=context,
            rotary_scale=rotary_scale,
            window=int(raw["sliding_window"]) if raw.get("sliding_window") else None,
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    _check(config, raw)
    return config


def _rotary(raw: Mapping[str, Any], head_dim: int) -> tuple[tuple[float, ...], float, int]:
    """Rotary frequencies, what multiplies the turned dimensions, and the context."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    base = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    turned = int(head_dim * float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0))
    context = int(raw.get("max_position_embeddings", 4096))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("longrope", "su", "yarn"):  # all three are names of LongRoPE in Phi's files
        return rotary_frequencies(turned, base, rope), 1.0, context
    factors = rope["short_factor"]
    if len(factors) != turned // 2:
        raise UserError(f"short_factor of the rope scaling has {len(factors)} numbers, not {turned // 2}")
    original = int(raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or 4096)
    growth = float(rope.get("factor") or context / original)
    scale = rope.get("attention_factor") or math.sqrt(1 + math.log(max(growth, 1.0)) / math.log(original))
    explicit = {"rope_type": "factors", "factors": factors}
    return rotary_frequencies(turned, base, explicit), float(scale), min(context, original)


def _check(config: PhiConfig, raw: Mapping[str, Any]) -> None:
    """Refuses what the block below would compute wrongly."""
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {raw['hidden_act']!r} is not supported in the Phi family; supported: 'silu'")
    check_groups(config.heads, config.kv_heads)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads; one projection gives q, k and v."""

    config: PhiConfig
    dropout: float

    @nn.compact
    def __call__(self, x, tables, mask, cache, at, keys):
        """[M, L, D] -> ([M, L, D], cache); the cache, if there is one, takes the new keys and values at ``at``."""
        c = self.config
        fused = Projection((c.heads + 2 * c.kv_heads) * c.head_dim, False, self.dropout, name="qkv_proj")(x, keys)
        fused = fused.reshape(*x.shape[:2], -1, c.head_dim)
        query, key, value = jnp.split(fused, [c.heads, c.heads + c.kv_heads], axis=2)
        query, key = rotate(query, tables), rotate(key, tables)
        key, value, cache = remembered(cache, key, value, at)
        mixed = grouped_attention(query, key, value, mask)
        return Projection(c.width, False, self.dropout, name="o_proj")(mixed, keys), cache


class MLP(nn.Module):
    """Gated linear unit with SiLU (Shazeer 2020); one projection gives both factors."""

    config: PhiConfig
    dropout: float

    @nn.compact
    def __call__(self, x, keys):
        """[M, L, D] -> [M, L, D]."""
        c = self.config
        fused = Projection(2 * c.mlp_width, False, self.dropout, name="gate_up_proj")(x, keys)
        gate, up = jnp.split(fused, 2, axis=-1)
        return Projection(c.width, False, self.dropout, name="down_proj")(gated(gate, up), keys)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    config: PhiConfig
    dropout: float

    @nn.compact
    def __call__(self, x, terms, mask, cache=None, at=None, dropout_keys=None):
        """[M, L, D] -> ([M, L, D], cache)."""
        c = self.config
        normed = RMSNorm(c.epsilon, name="input_layernorm")(x)
        mixed, cache = Attention(c, self.dropout, name="self_attn")(normed, terms, mask, cache, at, dropout_keys)
        x = x + mixed
        normed = RMSNorm(c.epsilon, name="post_attention_layernorm")(x)
        return x + MLP(c, self.dropout, name="mlp")(normed, dropout_keys), cache


def embed(config: PhiConfig, params: Params, tokens: Array, positions: Array) -> tuple[Array, tuple[Array, Array]]:
    """Token embeddings [M, L, D], and the rotary tables of ``positions``."""
    x, (cos, sin) = llama.embed(config, params, tokens, positions)
    return x, (cos * config.rotary_scale, sin * config.rotary_scale)


def projections(config: PhiConfig) -> dict[str, tuple[int, int]]:
    """Adaptable module path within a layer -> (in, out)."""
    c = config
    return {
        "self_attn.qkv_proj": (c.width, (c.heads + 2 * c.kv_heads) * c.head_dim),
        "self_attn.o_proj": (c.heads * c.head_dim, c.width),
        "mlp.gate_up_proj": (c.width, 2 * c.mlp_width),
        "mlp.down_proj": (c.mlp_width, c.width),
    }


def weights(config: PhiConfig) -> Sequence[Weight]:
    """The weight table: the Hugging Face names, with our tree mirroring them.

    Fused projections are cut by outputs although equal parts do not end where q, k and v do, or gate and up. Devices
    then exchange what they computed, which is little beside what each would have to hold and compute: most of a layer.
    """
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), config.width)
    return [*outer_weights(config), *layer_matrices(projections(config)), *layer_norms(norms)]


FAMILY = Family(
    architectures=("Phi3ForCausalLM",),
    config_from_hf=config_from_hf,
    weights=weights,
    embed=embed,
    block=Block,
    finish=finish,
    logits=logits,
    projections=projections,
)
