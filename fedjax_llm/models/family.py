"""What a model family is, and how the file that holds one is found.

A family is one file in this folder with a module-level ``FAMILY``. Nothing else has to be edited to add one.
"""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from jax import Array

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.types import Params, PyTree

Window = int | None
"""How many positions back a query sees, itself included; ``None``: all."""


class FamilyConfig(Protocol):
    """What the generic code reads of a family's frozen configuration."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def width(self) -> int:
        """Of the residual stream, D."""
        ...

    @property
    def layers(self) -> int:
        """How many blocks."""
        ...

    @property
    def kv_heads(self) -> int:
        """Key and value heads, for the cache."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        ...

    @property
    def window(self) -> Window | tuple[Window, ...]:
        """How far back a query sees; one for each layer where layers differ."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence that the model was made for."""
        ...


class Weight(NamedTuple):
    """One row of a family's weight table.

    Attributes:
      name: the Hugging Face tensor name; ``{layer}`` stands for the layer's number.
      path: where it goes in the parameter tree, or within its layer's tree.
      shape: in the Hugging Face layout.
      transpose: whether the file's [out, in] becomes our [in, out].
      split: the axis of our layout that tensor parallelism cuts (Shoeybi et al. 2019): the outputs of what is followed
        by a function of each component, the inputs of what sums them up again. ``None``: every device has all of it.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    transpose: bool = False
    split: int | None = None


class Family(NamedTuple):
    """A model family as data and pure functions.

    Attributes:
      architectures: the names in ``config.json["architectures"]`` that it serves.
      config_from_hf: reads a ``config.json``; raises ``UserError`` for what it does not support.
      weights: the weight table of a configuration.
      embed: ``(config, params, tokens [M, L], positions [L] or [M, L]) -> (x [M, L, D], terms)``; ``terms`` go to
        every block (rotary tables, say).
      block: ``(config, dropout) -> Module`` whose call is
        ``(x, terms, mask, cache, at, dropout_keys) -> (x, cache)``; see ``causal_lm.py``.
      finish: ``(config, params, x) -> hidden``: the final norm.
      logits: ``(config, params, hidden [K, D]) -> [K, V]`` in f32.
      projections: adaptable module path within a layer -> (in, out).
      layer_terms: ``(config, terms, layer) -> terms`` of that layer's block, where layers differ in them.
      refused: (architecture, why, and what to do) for those near to its own that it does not serve.
    """

    architectures: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    weights: Callable[[Any], Sequence[Weight]]
    embed: Callable[[Any, Params, Array, Array], tuple[Array, PyTree]]
    block: Callable[[Any, float], nn.Module]
    finish: Callable[[Any, Params, Array], Array]
    logits: Callable[[Any, Params, Array], Array]
    projections: Callable[[Any], dict[str, tuple[int, int]]]
    layer_terms: Callable[[Any, PyTree, int], PyTree] = lambda _, terms, __: terms
    refused: tuple[tuple[str, str], ...] = ()


def layer_window(config: FamilyConfig, layer: int) -> Window:
    """How far back a query of a layer sees."""
    return config.window[layer] if isinstance(config.window, tuple) else config.window


def weight_tree(family: Family, config: Any, of: Callable[[Weight, int | None], Any]) -> dict[str, Any]:
    """A tree like a model's parameters, with a function's value for each weight.

    Args:
      family: of the model.
      config: of the model.
      of: ``(weight, layer)``; the layer's number is ``None`` outside of layers. Called once for each weight.
    """
    found: dict[str, Any] = {"layers": tuple({} for _ in range(config.layers))}
    for weight in family.weights(config):
        for layer in range(config.layers) if "{layer}" in weight.name else (None,):
            place = found if layer is None else found["layers"][layer]
            for key in weight.path[:-1]:
                place = place.setdefault(key, {})
            place[weight.path[-1]] = of(weight, layer)
    return found


@contextlib.contextmanager
def reading(architecture: str) -> Iterator[None]:
    """Around the reading of a ``config.json``: a field that is missing is told, with the architecture.

    Raises:
      UserError: instead of a ``KeyError``.
    """
    try:
        yield
    except KeyError as missing:
        raise UserError(
            f"The model's config.json has no field {missing}; is it a complete {architecture} folder?"
        ) from None


def check_groups(heads: int, kv_heads: int) -> None:
    """Refuses heads that cannot share keys and values evenly.

    Raises:
      UserError: with both numbers.
    """
    if heads % kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")


@functools.cache
def families() -> dict[str, Family]:
    """Architecture name -> family, from every file of this folder that holds a ``FAMILY``."""
    import fedjax_llm.models as room

    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(room.__path__):
        family = getattr(importlib.import_module(f"{room.__name__}.{info.name}"), "FAMILY", None)
        if family is not None:
            found |= dict.fromkeys(family.architectures, family)
    return found


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that serves a ``config.json``.

    Raises:
      UserError: the architecture is missing or not supported.
    """
    names = config.get("architectures") or []
    for name in names:
        if name in families():
            return families()[name]
    reasons = {name: why for family in families().values() for name, why in family.refused}
    for name in names:
        if name in reasons:
            raise UserError(f"The model's architecture {name!r} is not supported: {reasons[name]}")
    raise UserError(
        f"The model's architecture {', '.join(map(repr, names)) or '(none named in config.json)'} is not supported"
        + nearest(names[0] if names else "", families())
    )
