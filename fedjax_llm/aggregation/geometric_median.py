"""RFA (Pillutla et al. 2019, arXiv 1912.13445): the geometric median by the smoothed Weiszfeld algorithm.

The point of the least weighted sum of distances to the clients' deltas. From their weighted mean v, repeat

    beta_k = alpha_k / max(nu, |v - delta_k|),    v = sum_k beta_k delta_k / sum_k beta_k,

with alpha_k the clients' weights and |.| the norm over all adapters together.

The paper runs each step as one secure sum over the clients, and so takes few, and stops early. Here the server holds
the deltas, and steps cost no communication: a fixed number of them, and more. A lone client of share w far off is left
with about (w / (1 - w))^steps of its distance.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.aggregation.robust import check_at_least, from_rule
from fedjax_llm.aggregation.server_optimizer import check_positive
from fedjax_llm.types import Aggregation, PyTree


@dataclass(frozen=True)
class GeometricMedian:
    """The smoothed geometric median of the client deltas, by their weights.

    Attributes:
      iterations: steps after the mean.
      smoothing: nu, the distance below which a delta draws no stronger, in the units of the adapters.
    """

    iterations: int = 16
    smoothing: float = 1e-6

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack``.

        Raises:
          UserError: ``iterations`` or ``smoothing`` is not positive.
        """
        check_at_least(1, iterations=self.iterations)
        check_positive(smoothing=self.smoothing)

        def rule(deltas: PyTree, weights: Array) -> PyTree:
            def mean(pull: Array) -> PyTree:
                return trees.weighted_sum(pull / jnp.sum(pull), deltas)

            def step(_: Array, centre: PyTree) -> PyTree:
                return mean(weights / jnp.maximum(self.smoothing, trees.norms(trees.subtract(deltas, centre))))

            return jax.lax.fori_loop(0, self.iterations, step, mean(weights))

        return from_rule(rule)
