"""A frozen causal language model: static configuration and pure functions."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.models import sharding
from fedjax_llm.models.family import Family, Window, layer_window
from fedjax_llm.types import Adapters, Params, PyTree

Remat = Literal["none", "matmuls", "blocks"]
Cache = tuple[dict[str, Array], ...]
"""One ``{"key", "value"}`` [M, S, KV, hd] a layer."""


@dataclass(frozen=True)
class CausalLM:
    """Pure functions of ``(params, adapters, tokens)``; hashable, so it can be a static argument of ``jit``.

    Attributes:
      family: the functions of the model's family.
      config: the family's static configuration.
      dropout: probability with which a component of an adapter's input is dropped in training.
      remat: what the backward pass computes again, to save memory: nothing; all but the results of matrix products; or
        whole blocks.
      gathered_over: the axis of a mesh over whose devices the layers' weights are spread, inside of ``jax.shard_map``:
        each layer's are gathered when they are used, forward and backward, and kept no longer (Zhao et al. 2023).
    """

    family: Family
    config: Any
    dropout: float = 0.0
    remat: Remat = "none"
    gathered_over: str | None = None

    def hidden(
        self,
        params: Params,
        adapters: Adapters,
        tokens: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        dropout_keys: Array | None = None,
        below: Array | None = None,
    ) -> Array:
        """Final hidden states.

        Args:
          params: the frozen weights.
          adapters: scaled factors (``lora.scaled``), with or without a leading row axis; ``{}`` for the base model.
          tokens: int32 [M, L], padded on the right. Padding needs no mask: no real position sees it.
          positions: int32 [L] or [M, L]; counted from zero if not given.
          mask: bool [M, L, L], who sees whom within a layer's window; causal if not given.
          dropout_keys: one typed key a row, [M]; without them nothing is dropped.
          below: [M, L, D], what enters the lowest adapted layer, if it is known already: what :meth:`trunk` gives for
            ``lowest_adapted(adapters)`` layers, with anything finite at padding. Only the layers from there on are run.

        Returns:
          [M, L, D].
        """
        x, terms, masks = self._enter(params, tokens, positions, mask)
        layers, first = self.config.layers, 0
        if below is not None:
            x, first = below, lowest_adapted(adapters)
        x = self._blocks(params, adapters, range(first, layers), x, terms, masks, dropout_keys)
        return self.family.finish(self.config, params, x)

    def trunk(
        self, params: Params, tokens: Array, layers: int, positions: Array | None = None, mask: Array | None = None
    ) -> Array:
        """What enters layer ``layers`` where no layer below it has adapters: a function of the tokens alone.

        Outside of ``jit`` it runs layer by layer, and one compiled program serves all layers of a shape.

        Args:
          params: the frozen weights.
          tokens: as in :meth:`hidden`.
          layers: how many layers to run; 0 gives the embedding.
          positions: as in :meth:`hidden`.
          mask: as in :meth:`hidden`.

        Returns:
          [M, L, D].
        """
        x, terms, masks = self._enter(params, tokens, positions, mask)
        # Nothing is dropped or differentiated: a model with dropout shares the programs of one without.
        plain = replace(self, dropout=0.0, remat="none")
        return plain._blocks(params, {}, range(layers), x, terms, masks, None)

    def _enter(self, params: Params, tokens: Array, positions: Array | None, mask: Array | None) -> tuple:
        """What the lowest block takes, with the masks of all windows: (x [M, L, D], terms, masks)."""
        every = jnp.arange(tokens.shape[1])
        at = every if positions is None else positions
        if mask is None:
            masks = {window: visible(every, every, window)[None] for window in self._windows()}
        else:
            masks = {window: mask if window is None else mask & _near(at, window) for window in self._windows()}
        x, terms = self.family.embed(self.config, params, tokens, at)
        return x, terms, masks

    def _windows(self) -> list[Window]:
        """Those that layers have, each once."""
        return list(dict.fromkeys(layer_window(self.config, layer) for layer in range(self.config.layers)))

    def _blocks(
        self,
        params: Params,
        adapters: Adapters,
        layers: Sequence[int],
        x: Array,
        terms: PyTree,
        masks: dict[Window, Array],
        dropout_keys: Array | None,
    ) -> Array:
        """Runs the blocks of ``layers``, without a cache."""
        block = self.family.block(self.config, self.dropout)
        apply = self._applied()
        for layer in layers:
            keys = None if dropout_keys is None else jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, layer)
            variables = {"params": params["layers"][layer], "lora": layer_adapters(adapters, layer)}
            own, mask = self.family.layer_terms(self.config, terms, layer), masks[layer_window(self.config, layer)]
            x, _ = apply(block, variables, x, own, mask, None, None, keys)
        return x

    def _applied(self) -> Callable[..., tuple[Array, PyTree]]:
        """How a block is run: what of it the backward pass finds, and where its weights come from."""
        if self.gathered_over is None and self.remat == "none":
            return _apply_block
        kept = jax.checkpoint_policies
        policies = {
            "none": sharding.all_but_gathered,
            "matmuls": kept.dots_with_no_batch_dims_saveable,
            "blocks": kept.nothing_saveable,
        }
        return jax.checkpoint(self._apply_gathered, static_argnums=0, policy=policies[self.remat])

    def _apply_gathered(self, block: nn.Module, variables: PyTree, *rest: Any) -> tuple[Array, PyTree]:
        """One layer, whose weights are brought together first where they are spread."""
        if self.gathered_over is not None:
            weights = sharding.gather_layer(self.family, self.config, variables["params"], self.gathered_over)
            variables = {**variables, "params": weights}
        return _apply_block(block, variables, *rest)

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
        masks = {}
        for window in self._windows():
            mask = visible(slots, every, window)[None] & (every[None, None] >= padding[:, None, None])
            # A padding query sees itself, so that its softmax has something to sum over.
            masks[window] = mask | (slots[:, None] == every[None])[None]
        x, terms = self.family.embed(self.config, params, tokens, positions)
        block, filled = self.family.block(self.config, 0.0), []
        for layer, weights in enumerate(params["layers"]):
            variables = {"params": weights, "lora": layer_adapters(adapters, layer)}
            own, mask = self.family.layer_terms(self.config, terms, layer), masks[layer_window(self.config, layer)]
            x, kept = _apply_block(block, variables, x, own, mask, cache[layer], at, None)
            filled.append(kept)
        return self.family.finish(self.config, params, x), tuple(filled)


@functools.partial(jax.jit, static_argnums=0)
def _apply_block(block, variables, x, terms, mask, cache, at, dropout_keys):
    """One layer. Jitted on its own so that equal layers are traced once, not once each."""
    return block.apply(variables, x, terms, mask, cache, at, dropout_keys)


def _near(positions: Array, window: int) -> Array:
    """Bool [..., L, L]: which of ``positions`` [..., L] are within the window of a query, whatever the order."""
    return positions[..., :, None] - positions[..., None, :] < window


def visible(queries: Array, keys: Array, window: Window) -> Array:
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


def lowest_adapted(paths: Iterable[str]) -> int:
    """How many layers lie below the lowest adapted one; 0 if nothing is adapted.

    Args:
      paths: adapted modules, ``layers.N.module``: the adapters, or ``lora.target_modules``.
    """
    return min((int(path.split(".")[1]) for path in paths), default=0)


def layer_weights(model: CausalLM) -> int:
    """Numbers in the matrices of all layers, however they are stored."""
    return sum(fan_in * fan_out for fan_in, fan_out in module_paths(model).values())


def module_paths(model: CausalLM) -> dict[str, tuple[int, int]]:
    """Every adaptable module, ``layers.N.module`` -> (in, out)."""
    within = model.family.projections(model.config)
    return {f"layers.{layer}.{path}": size for layer in range(model.config.layers) for path, size in within.items()}
