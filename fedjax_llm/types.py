"""Shared aliases, and the contracts that several rooms speak of.

Shape letters: C clients, M rows, B examples, K target slots, L tokens, D width, H heads, R rank, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax

PyTree = Any
Params = PyTree
"""The frozen weights of the base model."""
Factors = dict[str, jax.Array]
"""The two factors of one adapted matrix: ``a`` [..., in, R] and ``b`` [..., R, out]."""
Adapters = dict[str, Factors]
"""Module path -> factors. Leaves may carry a leading client axis [C, ...] or row axis [M, ...]."""
Metrics = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """The view of a server that sees sums only: all that secure aggregation or central noise can give.

    Attributes:
      total: the weighted sum of the client deltas, a tree like the adapters.
      weight: the total weight, a scalar. Zero where no client took part.
    """

    total: PyTree
    weight: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """The view of a server that sees every client's delta.

    Attributes:
      deltas: the client deltas, leaves [C, ...].
      weights: their weights, [C]. A client that was left out has weight zero and a zero delta.
    """

    deltas: PyTree
    weights: jax.Array


View = Sum | Stack


class Aggregation(NamedTuple):
    """A server algorithm as two pure functions, and the view that it consumes.

    Attributes:
      init: ``init(adapters) -> state``.
      update: ``update(view, state, adapters) -> (adapters, state)``. A view of weight
        zero leaves both as they are.
      view: ``Sum`` or ``Stack``: what the server must be able to see.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[Any, PyTree, PyTree], tuple[PyTree, PyTree]]
    view: type[Sum] | type[Stack]


class Aggregator(Protocol):
    """A frozen dataclass of hyper-parameters that makes an :class:`Aggregation`."""

    def make(self) -> Aggregation:
        """The algorithm with these hyper-parameters."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoundState:
    """All of a run that changes from round to round, and so all that a checkpoint holds.

    Attributes:
      round: how many rounds are done, an int32 scalar. The sampler's position is a function of it and of the seed.
      adapters: the server's adapters; in the setting ``local``, those of every site, leaves [C, ...].
      server_state: of the aggregator.
      client_state: what clients keep between rounds, leaves [C, ...]; empty where they keep nothing.
      privacy_state: of the privacy mechanism at the server: its correlated noise, its clip norm; else empty.
    """

    round: jax.Array
    adapters: PyTree
    server_state: PyTree
    client_state: PyTree
    privacy_state: PyTree = field(default_factory=dict)


Setting = Literal["federated", "centralised", "local", "base"]
"""federated; one client that holds everything; every site for itself; the untouched base model."""
Unit = Literal["record", "patient", "site"]
"""Whose presence differential privacy hides: one record, all records of one owner, or all data of one site."""
