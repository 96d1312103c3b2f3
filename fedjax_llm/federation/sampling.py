"""Who takes part in a round, and with which examples: functions of the round's key, on the host."""

import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from fedjax_llm.data.records import EncodedExample
from fedjax_llm.privacy import noise

_PURPOSES = ("cohort", "order", "dropout", "compression", "attack", "availability", "rotation")


def round_key(key: Array, round_number: int, purpose: str) -> Array:
    """The key of one purpose in one round: ``cohort``, ``order`` of the examples, ``dropout``, ..."""
    keys = jax.random.split(jax.random.fold_in(key, round_number), len(_PURPOSES))
    return keys[_PURPOSES.index(purpose)]


_SECRETS = ("cohort", "units", "site noise", "sum noise", "count noise", "dropout", "rounding")


def secret_round_key(key: Array, round_number: int, attempt: int, purpose: str) -> Array:
    """The key of one secret purpose in one attempt at a round.

    Who is sampled (``cohort``, ``units``), the noise (``site noise``, ``sum noise``, ``count noise``) and ``dropout``
    depend on the attempt, so that a round that is released again is a release of its own. Dropout is secret because
    masks go by the place in a batch: one more unit shifts those of the others, which must not be recognisable.
    """
    keys = jax.random.split(noise.round_noise_key(key, round_number, attempt), len(_SECRETS))
    return keys[_SECRETS.index(purpose)]


def client_id(name: str) -> int:
    """A number that stays with a site whatever cohort or slot it is in."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def generator(key: Array) -> np.random.Generator:
    """A NumPy generator seeded from a typed key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key), np.uint32))


def sample_cohort(key: Array, sites: int, size: int | None) -> np.ndarray:
    """The sites of a round: ``size`` of them, uniformly without replacement, in ascending order; all if ``None``.

    Args:
      key: the round's key for the purpose ``cohort``.
      sites: how many there are.
      size: how many take part.

    Returns:
      int [C].
    """
    if size is None or size >= sites:
        return np.arange(sites)
    return np.sort(generator(key).choice(sites, size=size, replace=False))


def attendance(key: Array, rounds: int, sites: int, size: int | None) -> np.ndarray:
    """Which sites take part in which of the first rounds, where the cohort is no secret: bool [rounds, N]."""
    present = np.zeros((rounds, sites), bool)
    for number in range(1, rounds + 1):
        present[number - 1, sample_cohort(round_key(key, number, "cohort"), sites, size)] = True
    return present


def sample_steps(
    key: Array, examples: Sequence[EncodedExample], batch_size: int, steps: int | None, epochs: int | None
) -> list[list[EncodedExample]]:
    """The batches of a client's round.

    The examples are shuffled anew in every round and dealt out in order; where they do not last, they are shuffled
    again. With ``epochs``, every example comes that many times, and the last batch of a pass may be smaller.

    Args:
      key: the client's key for the purpose ``order``.
      examples: of the client, at least one.
      batch_size: B.
      steps: how many batches; not used with ``epochs``.
      epochs: how many passes.

    Returns:
      One list of examples a step.
    """
    rng = generator(key)
    if epochs is not None:
        passes = [rng.permutation(len(examples)) for _ in range(epochs)]
        cuts = range(0, len(examples), batch_size)
        return [[examples[i] for i in order[cut : cut + batch_size]] for order in passes for cut in cuts]
    assert steps is not None
    wanted = steps * batch_size
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(-(-wanted // len(examples)))])
    return [[examples[i] for i in order[s * batch_size : (s + 1) * batch_size]] for s in range(steps)]


def sample_clients(key: Array, clients: int, probability: float) -> np.ndarray:
    """A Poisson sample: every client takes part with this probability, whatever the others do; maybe none does.

    Args:
      key: secret, for this round alone.
      clients: how many there are.
      probability: in (0, 1].

    Returns:
      int [C], ascending.
    """
    return np.flatnonzero(generator(key).random(clients) < probability)


class Cycle(NamedTuple):
    """Units dealt out to groups that take turns, so that a unit takes part at most once in ``groups`` steps.

    Attributes:
      first: number of the round's first step in the client's whole run.
      groups: how many; step ``i`` of the run samples from group ``i % groups`` alone.
      member: int [U], the group of every unit.
    """

    first: int
    groups: int
    member: np.ndarray


def unit_group(name: tuple[str, str], groups: int, seed: int) -> int:
    """The group of a unit: a hash of its own name, so that no other unit's presence changes it."""
    return int.from_bytes(hashlib.sha256(repr((name, seed)).encode()).digest()[:8]) % groups


def sample_units(
    key: Array,
    units: Sequence[Sequence[EncodedExample]],
    probability: float,
    steps: int,
    examples_per_unit: int,
    cycle: Cycle | None = None,
) -> list[list[tuple[EncodedExample, ...]]]:
    """The Poisson batches of a client's round. Nothing is truncated, and a batch may be empty.

    Args:
      key: of this client in this round; secret.
      units: the client's examples by privacy unit.
      probability: with which each unit takes part in a step, whatever the others do.
      steps: local steps of the round.
      examples_per_unit: how many of a sampled unit's examples stand for it, drawn anew in every step.
      cycle: whose turn it is; ``None``: every unit may take part in every step.

    Returns:
      One list a step, of the chosen examples of each sampled unit.
    """
    rng = generator(key)
    batches = []
    for step in range(steps):
        taken = rng.random(len(units)) < probability
        if cycle is not None:
            taken &= cycle.member == (cycle.first + step) % cycle.groups
        batch = []
        for place in np.flatnonzero(taken).tolist():
            unit = units[place]
            few = len(unit) > examples_per_unit
            chosen = rng.choice(len(unit), examples_per_unit, replace=False) if few else range(len(unit))
            batch.append(tuple(unit[i] for i in chosen))
        batches.append(batch)
    return batches
