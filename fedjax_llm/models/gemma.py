"""The Gemma family: Gemma 2, and the text models of Gemma 3.

They differ in three switches: soft-capped scores and logits (Gemma 2), norms on the heads of q and k (Gemma 3), and the
rotary frequencies of layers that see a window only (Gemma 3). Sources: Gemma Team 2024 (arXiv 2408.00118) and 2025
(2503.19786).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models import llama
from fedjax_llm.models.family import Family, Weight, Window, check_groups, reading
from fedjax_llm.models.layers import (
    GatedMLP,
    Projection,
    RMSNorm,
    grouped_attention,
    remembered,
    rotary_tables,
    rotate,
    soft_capped,
)
from fedjax_llm.models.llama import layer_matrices, layer_norms, outer_weights, projections, rotary_frequencies
from fedjax_llm.types import Params, PyTree

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_PATTERNS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}
"""Every how many layers one is global, where ``layer_types`` does not say."""


@dataclass(frozen=True)
class GemmaConfig:
    """The static shape of a Gemma model.

    ``frequencies`` are the rotary ones [head_dim / 2] of global layers, ``local_frequencies`` those of the others.
    ``scale`` multiplies the products of queries and keys; ``score_cap`` and ``logit_cap`` are soft bounds.
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
    local_frequencies: tuple[float, ...]
    context: int
    window: tuple[Window, ...]
    scale: float
    score_cap: float | None = None
    logit_cap: float | None = None
    tied: bool = True
    attention_bias: bool = False
    head_norm: bool = False


def config_from_hf(raw: Mapping[str, Any]) -> GemmaConfig:
    """Reads a ``config.json``. What it leaves out has the values of ``transformers``.

    Raises:
      UserError: a field is missing, or the activation, a kind of layer or the rope scaling is not supported.
    """
    architecture = (raw.get("architectures") or [""])[0]
    second = architecture.startswith("Gemma2")
    with reading(architecture):
        heads, layers = int(raw["num_attention_heads"]), int(raw["num_hidden_layers"])
        head_dim = int(raw.get("head_dim") or 256)
        kinds = _layer_kinds(raw, layers, _PATTERNS.get(architecture, 2))
        window = int(raw.get("sliding_window") or 4096)
        ropes = {kind: _rope(raw, kind, second) for kind in (_GLOBAL, _LOCAL)}
        frequencies = {kind: rotary_frequencies(head_dim, *rope) for kind, rope in ropes.items()}
        config = GemmaConfig(
            vocab_size=int(raw["vocab_size"]),
            width=int(raw["hidden_size"]),
            mlp_width=int(raw["intermediate_size"]),
            layers=layers,
            heads=heads,
            kv_heads=int(raw["num_key_value_heads"]),
            head_dim=head_dim,
            epsilon=float(raw.get("rms_norm_eps", 1e-6)),
            frequencies=frequencies[_GLOBAL],
            local_frequencies=frequencies[_LOCAL],
            context=int(raw.get("max_position_embeddings", 8192 if second else 131072)),
            window=tuple(window if kind == _LOCAL else None for kind in kinds),
            scale=float(raw.get("query_pre_attn_scalar", 256)) ** -0.5,
            # Gemma 3 of transformers reads attn_logit_softcapping and does not apply it.
            score_cap=raw.get("attn_logit_softcapping", 50.0) if second else None,
            logit_cap=raw.get("final_logit_softcapping", 30.0 if second else None),
            tied=bool(raw.get("tie_word_embeddings", True)),
            attention_bias=bool(raw.get("attention_bias", False)),
            head_norm=not second,
        )
    _check(config, raw)
    return config


def _layer_kinds(raw: Mapping[str, Any], layers: int, pattern: int) -> list[str]:
    """Which layers are global and which see a window."""
    pattern = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or pattern)
    kinds = raw.get("layer_types") or [_LOCAL if (layer + 1) % pattern else _GLOBAL for layer in range(layers)]
    if len(kinds) != layers:
        raise UserError(f"layer_types names {len(kinds)} layers, but num_hidden_layers is {layers}")
    for kind in kinds:
        if kind not in (_GLOBAL, _LOCAL):
            raise UserError(f"layer_types has {kind!r}, which is not supported; supported: {_GLOBAL}, {_LOCAL}")
    return list(kinds)


def _rope(raw: Mapping[str, Any], kind: str, second: bool) -> tuple[float, Mapping[str, Any]]:
    """Base and scaling of the rotary positions in a kind of layers."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if kind in rope:
        rope = rope[kind] or {}
    elif kind == _LOCAL and not second:
        rope = {"rope_theta": raw.get("rope_local_base_freq", 10000.0)}
    base = rope.get("rope_theta") or raw.get("rope_theta") or (10000.0 if second or kind == _LOCAL else 1e6)
    return float(base), rope


def _check(config: GemmaConfig, raw: Mapping[str, Any]) -> None:
    """Refuses what the block below would compute wrongly."""
    # Early files have "gelu" in hidden_act beside the hidden_activation that counts.
    activation = raw.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(
            f"hidden_activation {activation!r} is not supported in the Gemma family; supported: 'gelu_pytorch_tanh'"
        )
    if raw.get("use_bidirectional_attention"):
        raise UserError(
            "use_bidirectional_attention is set: the model is an encoder, which cannot be trained to answer"
        )
    check_groups(config.heads, config.kv_heads)


def _norm(config: GemmaConfig, name: str | None = None) -> RMSNorm:
    """Gemma's norm: weights count from one, and are applied before the result is rounded."""
    return RMSNorm(config.epsilon, offset=1.0, name=name)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped heads and soft-capped scores."""

    config: GemmaConfig
    dropout: float

    @nn.compact
    def __call__(self, x, tables, mask, cache, at, keys):
        """[M, L, D] -> ([M, L, D], cache); the cache, if there is one, takes the new keys and values at ``at``."""
        c = self.config

        def heads(name: str, count: int) -> Array:
            flat = Projection(count * c.head_dim, c.attention_bias, self.dropout, name=name)(x, keys)
            return flat.reshape(*x.shape[:2], count, c.head_dim)

        query, key, value = heads("q_proj", c.heads), heads("k_proj", c.kv_heads), heads("v_proj", c.kv_heads)
        if c.head_norm:
            query, key = _norm(c, "q_norm")(query), _norm(c, "k_norm")(key)
        query, key = rotate(query, tables), rotate(key, tables)
        key, value, cache = remembered(cache, key, value, at)
        mixed = grouped_attention(query, key, value, mask, c.scale, c.score_cap)
        return Projection(c.width, c.attention_bias, self.dropout, name="o_proj")(mixed, keys), cache


@jax.checkpoint
def gated(gate: Array, up: Array) -> Array:
    """``gelu(gate) * up`` with gelu by tanh, differentiated from its two inputs: jax alone keeps more."""
    return jax.nn.gelu(gate, approximate=True) * up


class Block(nn.Module):
    """One transformer layer, with norms before and after attention and MLP."""

    config: GemmaConfig
    dropout: float

    @nn.compact
    def __call__(self, x, terms, mask, cache=None, at=None, dropout_keys=None):
        """[M, L, D] -> ([M, L, D], cache)."""
        c = self.config
        normed = _norm(c, "input_layernorm")(x)
        mixed, cache = Attention(c, self.dropout, name="self_attn")(normed, terms, mask, cache, at, dropout_keys)
        x = x + _norm(c, "post_attention_layernorm")(mixed)
        normed = _norm(c, "pre_feedforward_layernorm")(x)
        moved = GatedMLP(c.width, c.mlp_width, gated, False, self.dropout, name="mlp")(normed, dropout_keys)
        return x + _norm(c, "post_feedforward_layernorm")(moved), cache


def embed(config: GemmaConfig, params: Params, tokens: Array, positions: Array) -> tuple[Array, dict[str, PyTree]]:
    """Token embeddings [M, L, D] times sqrt(D), and the rotary tables of ``positions`` for both kinds of layers."""
    table = params["embed_tokens"]["embedding"]
    frequencies = {_GLOBAL: config.frequencies, _LOCAL: config.local_frequencies}
    tables = {kind: rotary_tables(positions, jnp.asarray(own, jnp.float32)) for kind, own in frequencies.items()}
    # The root is rounded to the type of the embeddings, as in training.
    return table[tokens] * jnp.asarray(config.width**0.5, table.dtype), tables


def layer_terms(config: GemmaConfig, terms: Mapping[str, PyTree], layer: int) -> PyTree:
    """The rotary tables of a layer."""
    return terms[_GLOBAL if config.window[layer] is None else _LOCAL]


def finish(config: GemmaConfig, params: Params, x: Array) -> Array:
    """The final norm."""
    return jnp.asarray(_norm(config).apply({"params": params["norm"]}, x))


def logits(config: GemmaConfig, params: Params, hidden: Array) -> Array:
    """[K, D] -> [K, V] in f32, soft-capped where the model was trained so."""
    found = llama.logits(config, params, hidden)
    return found if config.logit_cap is None else soft_capped(found, config.logit_cap)


def weights(config: GemmaConfig) -> Sequence[Weight]:
    """The weight table: the Hugging Face names, with our tree mirroring them."""
    modules = projections(config)
    biased = [module for module in modules if config.attention_bias and module.startswith("self_attn.")]
    places = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    norms = {f"{place}_layernorm": config.width for place in places}
    if config.head_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    return [*outer_weights(config), *layer_matrices(modules, biased), *layer_norms(norms)]


FAMILY = Family(
    architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    config_from_hf=config_from_hf,
    weights=weights,
    embed=embed,
    block=Block,
    finish=finish,
    logits=logits,
    projections=projections,
    layer_terms=layer_terms,
    refused=(
        (
            "Gemma3ForConditionalGeneration",
            "it reads images too. The sizes without images (architecture Gemma3ForCausalLM: 270M and 1B) are.",
        ),
    ),
)
