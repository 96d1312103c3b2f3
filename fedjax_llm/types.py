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
      total: the weighted sum of the clients' messages; where the algorithm asks for no other message, that is a tree of
        deltas like the adapters.
      weight: the total weight, a scalar. Zero where no client took part.
    """

    total: PyTree
    weight: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """The view of a server that sees every client's message.

    Attributes:
      messages: of the clients, leaves [C, ...]; deltas like the adapters where the algorithm asks for no other.
      weights: their weights, [C]. A client that was left out has weight zero and a message of zeros.
    """

    messages: PyTree
    weights: jax.Array


View = Sum | Stack


class Local(NamedTuple):
    """What one client knows while it trains.

    Attributes:
      start: the adapters that it started the round from.
      memory: what it keeps between rounds for the algorithm; ``()`` where it keeps nothing.
      received: what the server sent beside the adapters; ``()`` where it sent nothing.
      rank: int32 scalar: how many components of each adapter it trains (R, or less with heterogeneous ranks).
    """

    start: PyTree
    memory: PyTree
    received: PyTree
    rank: jax.Array


class Trained(NamedTuple):
    """What came of one client's local training.

    Attributes:
      delta: by how much it moved the shared adapters, f32.
      end: the shared adapters that it ended with.
      steps: f32 scalar, optimiser steps that it took.
      rate: f32 scalar, the sum of their learning rates.
      probe_loss: f32 scalar, its loss at the adapters that it started from (nats, weighted as in training), and
      probe_gradient: the gradient there, f32; ``None`` where the algorithm asks for no probe.
    """

    delta: PyTree
    end: PyTree
    steps: jax.Array
    rate: jax.Array
    probe_loss: jax.Array | None = None
    probe_gradient: PyTree = None


class ClientRule(NamedTuple):
    """What an algorithm asks of its clients beyond plain local training. Pure functions of one client, vmapped.

    Attributes:
      init: ``init(adapters) -> memory``, what a client keeps between rounds.
      gradient: ``gradient(gradient, adapters, local) -> gradient``: corrects the mean gradient of each local step.
      report: ``report(trained, local) -> (message, memory)``: what travels to the server, and what the client keeps.
        Without it the message is the delta.
      rank: ``rank(end, local) -> rank``: how many components the client trains from the next round on.
      probe: whether :class:`Trained` shall hold loss and gradient of the round's examples where it started.
    """

    init: Callable[[PyTree], PyTree] | None = None
    gradient: Callable[[PyTree, PyTree, Local], PyTree] | None = None
    report: Callable[[Trained, Local], tuple[PyTree, PyTree]] | None = None
    rank: Callable[[PyTree, Local], jax.Array] | None = None
    probe: bool = False


class Aggregation(NamedTuple):
    """An algorithm as pure functions, and the view that it consumes.

    Attributes:
      init: ``init(adapters) -> state``. ``adapters`` are those that travel, without personal ones.
      update: ``update(view, state, adapters) -> (adapters, state)``. A view of weight zero leaves both as they are.
      view: ``Sum`` or ``Stack``: what the server must be able to see.
      client: what clients do beyond plain local training.
      broadcast: ``broadcast(state) -> received``: what the server sends to each client beside the adapters.
      residual: ``residual(state) -> {module: [in, out]}``: what the algorithm has moved into the frozen weights.
      live: ``live(round) -> {factor: 0.0 or 1.0}``: which factors are trained and travel in a round (counted from 1);
        ``None``: all.
      personal: ``personal(module, factor) -> bool``: which factors stay at each client; ``None``: none do.
      own: strength of the pull towards the server's adapters under which each client trains whole adapters of its own
        besides (Ditto); ``None``: it has none.
      download: ``download(cohort, adapters) -> bytes``: what a client receives besides the adapters and ``broadcast``.
      ranks: whether clients may train adapters of different ranks.
      whole: whether the update takes products apart, so that clients must train both factors, and nothing else.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[Any, PyTree, PyTree], tuple[PyTree, PyTree]]
    view: type[Sum] | type[Stack]
    client: ClientRule = ClientRule()
    broadcast: Callable[[PyTree], PyTree] | None = None
    residual: Callable[[PyTree], dict[str, jax.Array]] | None = None
    live: Callable[[int], dict[str, float]] | None = None
    personal: Callable[[str, str], bool] | None = None
    own: float | None = None
    download: Callable[[int, PyTree], int] | None = None
    ranks: bool = False
    whole: bool = False


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
