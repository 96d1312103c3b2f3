"""The OLMo 2 family: norms after attention and MLP, and norms over all heads of q and k at once.

Source: OLMo Team 2025 (arXiv 2501.00656).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models.family import Family, Weight, check_groups, reading
from fedjax_llm.models.layers import GatedMLP, Projection, RMSNorm, grouped_attention, remembered, rotate
from fedjax_llm.models.llama import (
    embed,
    gated,
    layer_matrices,
    layer_norms,
    logits,
    outer_weights,
    projections,
    rotary_frequencies,
)
from fedjax_llm.types import Params


@dataclass(frozen=True)
class OlmoConfig:
    """The static shape of an OLMo 2 model. ``frequencies`` are the rotary ones, [head_dim / 2], scaling included."""

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
    window: None = None
    tied: bool = False
    attention_bias: bool = False


def config_from_hf(raw: Mapping[str, Any]) -> OlmoConfig:
    """Reads a ``config.json``. What it leaves out has the values of ``transformers``.

    Raises:
      UserError: a field is missing, or the activation or rope scaling is not supported.
    """
    with reading("Olmo2ForCausalLM"):
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        head_dim = int(raw.get("head_dim") or width // heads)
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        base = float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0)
        config = OlmoConfig(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            mlp_width=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            epsilon=float(raw.get("rms_norm_eps", 1e-5)),
            frequencies=rotary_frequencies(head_dim, base, rope),
            context=int(raw.get("max_position_embeddings", 2048)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
        )
    _check(config, raw)
    return config


def _check(config: OlmoConfig, raw: Mapping[str, Any]) -> None:
    """Refuses what the block below would compute wrongly."""
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {raw['hidden_act']!r} is not supported in the OLMo family; supported: 'silu'")
    if raw.get("clip_qkv"):
        raise UserError("clip_qkv is set: queries, keys and values would have to be clipped, as in OLMo 1 only")
    check_groups(config.heads, config.kv_heads)


def _norm(config: OlmoConfig, name: str | None = None) -> RMSNorm:
    """OLMo 2's norm: weights are applied before the result is rounded."""
    return RMSNorm(config.epsilon, offset=0.0, name=name)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads, on normalised queries and keys."""

    config: OlmoConfig
    dropout: float

    @nn.compact
    def __call__(self, x, tables, mask, cache, at, keys):
        """[M, L, D] -> ([M, L, D], cache); the cache, if there is one, takes the new keys and values at ``at``."""
        c = self.config

        def projected(name: str, count: int) -> Array:
            return Projection(count * c.head_dim, c.attention_bias, self.dropout, name=name)(x, keys)

        query, key, value = (
            projected("q_proj", c.heads),
            projected("k_proj", c.kv_heads),
            projected("v_proj", c.kv_heads),
        )
        query, key = _norm(c, "q_norm")(query), _norm(c, "k_norm")(key)
        query, key, value = (flat.reshape(*x.shape[:2], -1, c.head_dim) for flat in (query, key, value))
        query, key = rotate(query, tables), rotate(key, tables)
        key, value, cache = remembered(cache, key, value, at)
        mixed = grouped_attention(query, key, value, mask)
        return Projection(c.width, c.attention_bias, self.dropout, name="o_proj")(mixed, keys), cache


class Block(nn.Module):
    """One transformer layer, with norms after attention and MLP."""

    config: OlmoConfig
    dropout: float

    @nn.compact
    def __call__(self, x, terms, mask, cache=None, at=None, dropout_keys=None):
        """[M, L, D] -> ([M, L, D], cache)."""
        c = self.config
        mixed, cache = Attention(c, self.dropout, name="self_attn")(x, terms, mask, cache, at, dropout_keys)
        x = x + _norm(c, "post_attention_layernorm")(mixed)
        moved = GatedMLP(c.width, c.mlp_width, gated, False, self.dropout, name="mlp")(x, dropout_keys)
        return x + _norm(c, "post_feedforward_layernorm")(moved), cache


def finish(config: OlmoConfig, params: Params, x: Array) -> Array:
    """The final norm."""
    return jnp.asarray(_norm(config).apply({"params": params["norm"]}, x))


def weights(config: OlmoConfig) -> Sequence[Weight]:
    """The weight table: the Hugging Face names, with our tree mirroring them.

    Queries and keys are cut by outputs although their norm is a function of all of them: what devices have to tell each
    other for it is one sum of squares a token.
    """
    modules = projections(config)
    biased = [module for module in modules if config.attention_bias and module.startswith("self_attn.")]
    norms = {
        "self_attn.q_norm": config.heads * config.head_dim,
        "self_attn.k_norm": config.kv_heads * config.head_dim,
        "post_attention_layernorm": config.width,
        "post_feedforward_layernorm": config.width,
    }
    return [*outer_weights(config), *layer_matrices(modules, biased), *layer_norms(norms)]


FAMILY = Family(
    architectures=("Olmo2ForCausalLM",),
    config_from_hf=config_from_hf,
    weights=weights,
    embed=embed,
    block=Block,
    finish=finish,
    logits=logits,
    projections=projections,
)
