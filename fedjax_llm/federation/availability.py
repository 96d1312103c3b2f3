"""Who of a selected cohort answers, and when: simulated dropouts, stragglers and asynchronous clients.

All of it is a function of the run's key and the clients' stable ids, on the host. Time is counted in rounds of a median
client: latencies are log-normal around 1, with a part that stays with a client and one that changes from round to
round.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.federation.sampling import generator, round_key, sample_cohort

_NEVER = math.inf


@dataclass(frozen=True)
class Availability:
    """How reliable and how fast clients are.

    Attributes:
      dropout: probability that a selected client never answers in a round.
      spread: standard deviation of the logarithm of the clients' own speeds; 0: all are as fast.
      jitter: standard deviation of the logarithm of what changes from round to round.
      deadline: after how long the server stops waiting, in rounds of a median client; later answers are lost. ``None``:
        it waits for all who answer.
      over_selection: the server selects this many times the cohort, and closes the round when a cohort has answered
        (Bonawitz et al. 2019, arXiv 1902.01046).
    """

    dropout: float = 0.0
    spread: float = 0.0
    jitter: float = 0.0
    deadline: float | None = None
    over_selection: float = 1.0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        place = "federation.availability"
        if not 0 <= self.dropout < 1:
            raise UserError(f"{place}.dropout is {self.dropout}; it must be at least 0 and below 1")
        for name in ("spread", "jitter"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{place}.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        if self.deadline is not None and not self.deadline > 0:
            raise UserError(f"{place}.deadline is {self.deadline}; it must be positive, or None")
        if not 1 <= self.over_selection < math.inf:
            raise UserError(f"{place}.over_selection is {self.over_selection}; it must be at least 1")


@dataclass(frozen=True)
class Asynchronous:
    """Buffered asynchronous aggregation (FedBuff, Nguyen et al. 2022, arXiv 2106.06639, Algorithm 1).

    Clients train all the time, each from the adapters that were the newest when it began. Whenever a cohort of updates
    is in the buffer the server takes a step, which is what a round is here.

    Attributes:
      concurrency: clients that train at any time; at least the cohort.
      staleness: an update that the server has taken s steps since is multiplied by ``1 / (1 + s) ** staleness``.
    """

    concurrency: int
    staleness: float = 0.5

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.concurrency < 1:
            raise UserError(f"federation.asynchronous.concurrency is {self.concurrency}; it must be at least 1")
        if not 0 <= self.staleness < math.inf:
            raise UserError(f"federation.asynchronous.staleness is {self.staleness}; it must be at least 0 and finite")


class Answers(NamedTuple):
    """Who took part in a round.

    Attributes:
      cohort: int [C], ascending: whose updates the server uses.
      silent: int: who was selected and never answered.
      late: int: whose updates came when the round was closed.
      staleness: int [C], server steps since each of the cohort began; zeros unless clients are asynchronous.
      elapsed: how long the round took, in rounds of a median client.
      before: int: who began in this round, with the adapters before it, and still trains (asynchronous clients).
      after: int: who begins with the adapters that this round gives.
    """

    cohort: np.ndarray
    silent: np.ndarray
    late: np.ndarray
    staleness: np.ndarray
    elapsed: float
    before: np.ndarray = np.zeros(0, int)
    after: np.ndarray = np.zeros(0, int)


def answers(key: Array, number: int, ids: Sequence[int], cohort: int, availability: Availability) -> Answers:
    """A synchronous round: a cohort or more is selected; the fastest who answer in time are in it.

    Args:
      key: of the run.
      number: of the round.
      ids: stable numbers of all clients.
      cohort: how many the server wants.
      availability: of the clients.
    """
    size = selected_size(cohort, len(ids), availability)
    selected = sample_cohort(round_key(key, number, "cohort"), len(ids), size)
    return among(key, number, ids, selected, cohort, availability)


def selected_size(cohort: int, sites: int, availability: Availability) -> int:
    """How many of the sites a round selects for a cohort."""
    return min(sites, math.ceil(availability.over_selection * cohort - 1e-9))


def among(
    key: Array, number: int, ids: Sequence[int], selected: np.ndarray, cohort: int, availability: Availability
) -> Answers:
    """Who of the ``selected`` are in the round; see :func:`answers`."""
    if availability == Availability():
        nobody = np.zeros(0, int)
        return Answers(selected, nobody, nobody, np.zeros(len(selected), int), 1.0)
    times = np.array([latency(key, number, ids[i], availability) for i in selected])
    limit = _NEVER if availability.deadline is None else availability.deadline
    order = [i for i in np.argsort(times, kind="stable") if times[i] < _NEVER]
    used = sorted(i for i in order[:cohort] if times[i] <= limit)
    late = [i for i in range(len(selected)) if times[i] < _NEVER and i not in used]
    waited = max((times[i] for i in used), default=0.0)
    if len(used) < min(cohort, len(selected)):  # the server could not know that no more would come
        waited = limit if limit < _NEVER else max((times[i] for i in order), default=0.0)
    return Answers(
        cohort=selected[used],
        silent=selected[times == _NEVER],
        late=selected[late],
        staleness=np.zeros(len(used), int),
        elapsed=float(waited),
    )


def latency(key: Array, number: int, client: int, availability: Availability) -> float:
    """How long a client takes in a round; infinite if it drops out."""
    own = generator(jax.random.fold_in(round_key(key, 0, "availability"), client)).normal()
    rng = generator(jax.random.fold_in(round_key(key, number, "availability"), client))
    if rng.random() < availability.dropout:
        return _NEVER
    return math.exp(availability.spread * own + availability.jitter * rng.normal())


def buffered(
    key: Array,
    number: int,
    ids: Sequence[int],
    cohort: int,
    asynchronous: Asynchronous,
    availability: Availability,
) -> Answers:
    """The round that fills the buffer for the ``number``-th time, found by playing all rounds up to it.

    A client has at most one update in a buffer. One that drops out is replaced after the time of a median round.

    Args:
      key: of the run.
      number: of the round, from 1.
      ids: stable numbers of all clients.
      cohort: updates that fill the buffer.
      asynchronous: how many train at a time.
      availability: how fast and reliable they are.
    """
    play = _Play(key, ids, asynchronous.concurrency, availability)
    for version in range(number):
        started, buffer, silent = play.now, {}, []
        while len(buffer) < cohort:
            client, began, arrived = play.next()
            if arrived:
                buffer[client] = version - began
            else:
                silent.append(client)
            if len(buffer) < cohort:
                play.fill(version, set(buffer))
        older = set(play.training)
        play.fill(version + 1, set())
    members = np.array(sorted(buffer))
    return Answers(
        cohort=members,
        silent=np.array(sorted(silent), int),
        late=np.zeros(0, int),
        staleness=np.array([buffer[client] for client in members]),
        elapsed=play.now - started,
        before=np.array(sorted(c for c in older if play.training[c] == number - 1), int),
        after=np.array(sorted(set(play.training) - older), int),
    )


class _Play:
    """Clients that train side by side: what happens next."""

    def __init__(self, key: Array, ids: Sequence[int], concurrency: int, availability: Availability) -> None:
        self.now, self.training = 0.0, dict[int, int]()
        self._events: list[tuple[float, int, int, bool]] = []
        self._key, self._ids, self._availability = key, ids, availability
        self._concurrency, self._count = min(concurrency, len(ids)), 0
        self._rng = generator(round_key(key, 0, "cohort"))
        self.fill(0, set())

    def fill(self, version: int, waiting: set[int]) -> None:
        """Idle clients begin with the adapters of a version until enough train; ``waiting`` ones stay idle."""
        while len(self.training) < self._concurrency:
            idle = [c for c in range(len(self._ids)) if c not in self.training and c not in waiting]
            if not idle:
                return
            client = idle[int(self._rng.integers(len(idle)))]
            self._count += 1
            time = latency(self._key, self._count, self._ids[client], self._availability)
            arrives = time < _NEVER
            heapq.heappush(self._events, (self.now + (time if arrives else 1.0), self._count, client, arrives))
            self.training[client] = version

    def next(self) -> tuple[int, int, bool]:
        """The next client that is done, the version that it began with, and whether it answers."""
        self.now, _, client, arrives = heapq.heappop(self._events)
        return client, self.training.pop(client), arrives
