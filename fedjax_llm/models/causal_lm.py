"""A frozen causal language model: static configuration and pure functions."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.models.family import Family
from fedjax_llm.types import Adapters, Params, PyTree

Cache = tuple[dict[str, Array], ...]
"""One ``{"key", "value"}`` [M, S, KV, hd] a layer."""


@dataclass(frozen=True)
class CausalLM:
    """Pure functions of ``(params, adapters, tokens)``; hashable, so it can be a static argument of ``jit``.

    Attributes:
      family: the functions of the model's family.
      config: the family's static configuration.
      dropout: probability with which a component of an adapter's input is dropped in training.
      remat: recompute each block's activations in the backward pass, to save memory.
    """

    family: Family
    config: Any
    dropout: float = 0.0
    remat: bool = False

    def hidden(
        self,
        params: Params,
        adapters: Adapters,
        tokens: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """Final hidden states.

        Args:
          params: the frozen weights.
          adapters: scaled factors (``lora.scaled``), with or without a leading row axis; ``{}`` for the base model.
          tokens: int32 [M, L], padded on the right. Padding needs no mask: no real position sees it.
          positions: int32 [L] or [M, L]; counted from zero if not given.
          mask: bool [M, L, L], who sees whom; causal if not given.
          dropout_keys: one typed key a row, [M]; without them nothing is dropped.

        Returns:
          [M, L, D].
        """
        length = tokens.shape[1]
        if positions is None:
            positions = jnp.arange(length)
        if mask is None:
            mask = visible(jnp.arange(length), jnp.arange(length), self.config.window)[None]
        x, terms = self.family.embed(self.config, params, tokens, positions)
        block = self.family.block(self.config, self.dropout)
        for layer, weights in enumerate(params["layers"]):
            keys = None if dropout_keys is None else jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, layer)
            variables = {"params": weights, "lora": layer_adapters(adapters, layer)}
            apply = jax.checkpoint(_apply_block, static_argnums=0) if self.remat else _apply_block
            x, _ = apply(block, variables, x, terms, mask, None, None, keys)
        return self.family.finish(self.config, params, x)

    def logits(self, params: Params, hidden: Array) -> Array:
        """[K, D] -> [K, V] in f32."""
        return self.family.logits(self.config, params, hidden)

    def empty_cache(self, rows: int, length: int, dtype: Any) -> Cache:
        """A key-value cache for ``rows`` rows of at most ``length`` tokens."""
        shape = (rows, length, self.config.kv_heads, self.config.head_dim)
        return tuple(
            {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)} for _ in range(self.config.layers)
        )

    def extend(
        self, params: Params, adapters: Adapters, tokens: Array, cache: Cache, at: Array, padding: Array
    ) -> tuple[Array, Cache]:
        """Final hidden states of new tokens after those in the cache.

        Args:
          params: the frozen weights.
          adapters: scaled factors, with or without a leading row axis.
          tokens: int32 [M, L], the new ones.
          cache: what came before.
          at: how many slots of the cache are filled, a scalar.
          padding: int32 [M], how many of each row's first slots are padding on the left.

        Returns:
          ([M, L, D], the cache with the new tokens in slots ``at`` to ``at + L``).
        """
        slots = at + jnp.arange(tokens.shape[1])
        positions = jnp.maximum(slots[None] - padding[:, None], 0)
        every = jnp.arange(cache[0]["key"].shape[1])
        mask = visible(slots, every, self.config.window)[None] & (every[None, None] >= padding[:, None, None])
        # A padding query sees itself, so that its softmax has something to sum over.
        mask = mask | (slots[:, None] == every[None])[None]
        x, terms = self.family.embed(self.config, params, tokens, positions)
        block, filled = self.family.block(self.config, 0.0), []
        for layer, weights in enumerate(params["layers"]):
            variables = {"params": weights, "lora": layer_adapters(adapters, layer)}
            x, kept = _apply_block(block, variables, x, terms, mask, cache[layer], at, None)
            filled.append(kept)
        return self.family.finish(self.config, params, x), tuple(filled)


@functools.partial(jax.jit, static_argnums=0)
def _apply_block(block, variables, x, terms, mask, cache, at, dropout_keys):
    """One layer. Jitted on its own so that equal layers are traced once, not once each."""
    return block.apply(variables, x, terms, mask, cache, at, dropout_keys)


def visible(queries: Array, keys: Array, window: int | None) -> Array:
    """Bool [L, S]: which key positions [S] a query position [L] sees."""
    distance = queries[:, None] - keys[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def layer_adapters(adapters: Adapters, layer: int) -> PyTree:
    """The adapters of one layer as Flax's ``lora`` collection: nested by module."""
    prefix, nested = f"layers.{layer}.", {}
    for path, factors in adapters.items():
        if path.startswith(prefix):
            place = nested
            *parents, last = path.removeprefix(prefix).split(".")
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = factors
    return nested


def module_paths(model: CausalLM) -> dict[str, tuple[int, int]]:
    """Every adaptable module, ``layers.N.module`` -> (in, out)."""
    within = model.family.projections(model.config)
    return {f"layers.{layer}.{path}": size for layer in range(model.config.layers) for path, size in within.items()}
