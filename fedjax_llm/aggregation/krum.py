"""Krum and multi-Krum (Blanchard et al. 2017, NeurIPS, "Machine learning with adversaries").

With n clients of which f may be malicious, a client's score is the sum of the squared distances to its n - f - 2
nearest others. Krum takes the delta of the lowest score; multi-Krum, of which Krum is the case of one, takes the mean
of the deltas of the ``keep`` lowest. The guarantee takes n >= 2 f + 3, and the authors' code keeps at most n - f - 2.

Where it differs from the paper:

- Clients whose scores are equal share the places that are left, where the paper takes the first: the order of clients
  decides nothing. Both ends of the shortest distance tie whenever one neighbour counts.
- A smaller cohort is refused where f > 0. Where clients are absent, n counts those that are there, fewer than ``keep``
  may be taken, and of fewer than 2 f + 3 the rule is the coordinate-wise median. With f = 0 nobody is mistrusted, and
  that is what one or two clients get too: the one, or the mean of the two.
- Weights only say who is there, and the vectors are the deltas of local training instead of gradients.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.aggregation.robust import check_at_least, check_cohort, coordinate_median, from_rule
from fedjax_llm.errors import UserError
from fedjax_llm.types import Aggregation, PyTree


@dataclass(frozen=True)
class Krum:
    """The delta, or the mean of the few deltas, with the nearest neighbours.

    Attributes:
      byzantine: f, how many clients of a cohort may be malicious.
      keep: how many deltas are averaged.
    """

    byzantine: int = 0
    keep: int = 1

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack``.

        The update raises a ``UserError`` when it is traced with a cohort smaller than 2 f + 3 where f > 0, or with one
        smaller than ``keep`` + f + 2 where ``keep`` > 1.

        Raises:
          UserError: ``byzantine`` is negative, or ``keep`` is not positive.
        """
        check_at_least(0, byzantine=self.byzantine)
        check_at_least(1, keep=self.keep)
        byzantine, needed = self.byzantine, 2 * self.byzantine + 3

        def rule(deltas: PyTree, weights: Array) -> PyTree:
            present, cohort = weights > 0, weights.shape[0]
            check_cohort(cohort, needed, byzantine)
            if self.keep > max(cohort - byzantine - 2, 1):
                raise UserError(
                    f"aggregation.keep is {self.keep}, but of a cohort of {cohort} clients with aggregation.byzantine "
                    f"{byzantine} at most {max(cohort - byzantine - 2, 1)} can be kept"
                )
            count = jnp.sum(present)
            neighbours = jnp.maximum(count - byzantine - 2, 1)
            kept = jnp.minimum(self.keep, neighbours)
            shares = _lowest(scores(squared_distances(deltas), present, neighbours), present, kept) / kept
            picked, median = trees.weighted_sum(shares, deltas), coordinate_median(deltas, present)
            return jax.tree.map(lambda one, other: jnp.where(count >= needed, one, other), picked, median)

        return from_rule(rule)


def squared_distances(deltas: PyTree) -> Array:
    """[C, C]: the squared Euclidean distances between the clients' deltas [C, ...], exactly symmetric."""

    def row(own: PyTree) -> Array:
        return jnp.square(trees.norms(trees.subtract(deltas, own)))

    # Row by row, since all differences at once would take C times the memory of the deltas; and by differences, since
    # a Gram matrix cancels where one client is far off.
    found = jax.lax.map(row, deltas)
    return jnp.maximum(found, found.T)


def scores(distances: Array, present: Array, neighbours: Array | int) -> Array:
    """[C]: each client's sum of the distances [C, C] to its nearest others; infinite where it is absent itself.

    Args:
      distances: squared, symmetric.
      present: bool [C].
      neighbours: how many count, at most as many as there are others.
    """
    cohort = len(present)
    others = present[None, :] & ~jnp.eye(cohort, dtype=bool)
    ordered = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    near = jnp.arange(cohort) < jnp.minimum(neighbours, jnp.sum(present) - 1)
    return jnp.where(present, jnp.sum(jnp.where(near, ordered, 0.0), axis=1), jnp.inf)


def _lowest(score: Array, present: Array, kept: Array) -> Array:
    """[C]: 1 for the ``kept`` lowest scores; those that tie for the last places share them."""
    last = jnp.sort(score)[kept - 1]
    below, tied = present & (score < last), present & (score == last)
    return jnp.where(below, 1.0, jnp.where(tied, (kept - jnp.sum(below)) / jnp.sum(tied), 0.0))
