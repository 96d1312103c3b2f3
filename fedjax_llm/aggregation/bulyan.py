"""Bulyan (El Mhamdi et al. 2018, arXiv 1802.07927) over Krum.

With n >= 4 f + 3 clients of which f may be malicious: Krum selects one client after another, each time among those
that are left, until there are theta = n - 2 f; then each coordinate is the mean of the beta = theta - 2 f values that
are nearest to the selected ones' median.

Where it differs from the paper:

- The last times Krum runs on so few clients that its n - f - 2 neighbours would be none; then one counts.
- Ties are broken by what clients send, where the paper takes the first, so that their order decides nothing. The two
  ends of the shortest distance tie whenever one neighbour counts; who is nearer to everybody is taken, and if they
  still tie, who has the smaller of a fixed projection. Of values as far from the median it is the smaller one.
- The median of an even number is the mean of the middle two.
- A smaller cohort is refused where f > 0. Where clients are absent, n counts those that are there, and of fewer than
  4 f + 3 the rule is the coordinate-wise median. With f = 0 everybody is selected and kept: the unweighted mean.
- Weights only say who is there, and the vectors are the deltas of local training instead of gradients.

The authors' later code (AggregaThor) selects two fewer, averages multi-Krum's choice each time, and subtracts the
distances to whoever was taken from the scores instead of scoring anew.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.aggregation.krum import scores, squared_distances
from fedjax_llm.aggregation.robust import (
    ascending,
    check_at_least,
    check_cohort,
    coordinate_median,
    from_rule,
    middle,
    of_clients,
)
from fedjax_llm.types import Aggregation, PyTree


@dataclass(frozen=True)
class Bulyan:
    """The mean of the values around the median of those whom Krum selects, coordinate by coordinate.

    Attributes:
      byzantine: f, how many clients of a cohort may be malicious.
    """

    byzantine: int = 0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack``.

        The update raises a ``UserError`` when it is traced with a cohort smaller than 4 f + 3 where f > 0.

        Raises:
          UserError: ``byzantine`` is negative.
        """
        check_at_least(0, byzantine=self.byzantine)
        byzantine, needed = self.byzantine, 4 * self.byzantine + 3

        def rule(deltas: PyTree, weights: Array) -> PyTree:
            present = weights > 0
            check_cohort(len(present), needed, byzantine)
            count = jnp.sum(present)
            selected = _selected(squared_distances(deltas), _projections(deltas), present, byzantine)
            near = jax.tree.map(lambda leaf: _near_median(leaf, selected, count - 4 * byzantine), deltas)
            median = coordinate_median(deltas, present)
            return jax.tree.map(lambda one, other: jnp.where(count >= needed, one, other), near, median)

        return from_rule(rule)


def _projections(deltas: PyTree) -> Array:
    """[C]: a number for each client that depends on its delta alone, and that differs where deltas differ."""
    found = jnp.float32(0)
    for number, leaf in enumerate(jax.tree.leaves(deltas), start=1):
        direction = jnp.sin(number + jnp.arange(leaf[0].size, dtype=jnp.float32)).reshape(leaf.shape[1:])
        found += jnp.sum(leaf * direction, range(1, leaf.ndim))
    return found


def _selected(distances: Array, projections: Array, present: Array, byzantine: int) -> Array:
    """Bool [C]: those whom Krum selects one by one, all but 2 f of those that are there."""
    cohort = len(present)
    wanted, to_all = jnp.sum(present) - 2 * byzantine, scores(distances, present, cohort)

    def step(number: Array, selected: Array) -> Array:
        left = present & ~selected
        neighbours = jnp.maximum(jnp.sum(left) - byzantine - 2, 1)
        best = jnp.lexsort((projections, to_all, scores(distances, left, neighbours)))[0]
        return jnp.where(number < wanted, selected.at[best].set(True), selected)

    return jax.lax.fori_loop(0, cohort - 2 * byzantine, step, jnp.zeros(cohort, bool))


def _near_median(leaf: Array, selected: Array, kept: Array) -> Array:
    """Leaf [C, ...] -> [...]: the mean of the ``kept`` selected values nearest to the selected ones' median."""
    count, place = jnp.sum(selected), of_clients(jnp.arange(len(selected)), leaf)
    ordered = ascending(leaf, selected)
    apart = jnp.where(place < count, jnp.abs(ordered - middle(ordered, count)), jnp.inf)
    nearest = jnp.take_along_axis(ordered, jnp.argsort(apart, axis=0, stable=True), axis=0)
    return jnp.sum(jnp.where(place < kept, nearest, 0.0), axis=0) / kept
