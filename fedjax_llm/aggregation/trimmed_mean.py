"""The coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, Definition 2 and Algorithm 1, option II).

Weights only say who is there, as for the median. The paper takes the share of n clients that is cut to be a whole
number; here it is rounded up, so that at least that share is cut, and at least one value (of an even number two) is
left. The paper takes means of gradients; here they are of the deltas of local training.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.aggregation.robust import ascending, from_rule, of_clients
from fedjax_llm.errors import UserError
from fedjax_llm.types import Aggregation, PyTree


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of the client deltas without the largest and the smallest values of each coordinate.

    Attributes:
      trim: beta, the share of the clients that is cut at either end: at least the share that may be malicious.
    """

    trim: float = 0.1

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack``.

        Raises:
          UserError: ``trim`` is not in [0, 0.5).
        """
        if not 0 <= self.trim < 0.5:
            raise UserError(f"aggregation.trim is {self.trim}; it must be in [0, 0.5)")

        def rule(deltas: PyTree, weights: Array) -> PyTree:
            present, cohort = weights > 0, weights.shape[0]
            # A table, since 0.1 of 10 clients would be a little more than one in f32.
            table = jnp.array([_cut(self.trim, count) for count in range(cohort + 1)])
            count, place = jnp.sum(present), jnp.arange(cohort)
            cut = table[count]
            kept = (place >= cut) & (place < count - cut)

            def mean(leaf: Array) -> Array:
                ordered = jnp.where(of_clients(kept, leaf), ascending(leaf, present), 0.0)
                return jnp.sum(ordered, axis=0) / jnp.sum(kept)

            return jax.tree.map(mean, deltas)

        return from_rule(rule)


def _cut(trim: float, count: int) -> int:
    """How many of ``count`` values are cut at either end."""
    # In binary 0.28 of 25 is a little more than 7.
    return min(math.ceil(round(trim * count, 9)), max(count - 1, 0) // 2)
