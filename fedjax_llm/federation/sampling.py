"""Who takes part in a round, and with which examples: functions of the round's key, on the host."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from fedjax_llm.data.records import EncodedExample

_PURPOSES = ("cohort", "order", "dropout")


def round_key(key: Array, round_number: int, purpose: str) -> Array:
    """The key of one purpose in one round: ``cohort``, ``order`` of the examples, or ``dropout``."""
    keys = jax.random.split(jax.random.fold_in(key, round_number), len(_PURPOSES))
    return keys[_PURPOSES.index(purpose)]


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
