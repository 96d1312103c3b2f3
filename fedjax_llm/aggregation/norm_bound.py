"""Norm bounding (Sun et al. 2019, arXiv 1911.07963, "norm thresholding of updates"): no client moves the mean far.

The server scales each delta down to a norm, delta / max(1, |delta| / M) over all adapters together, and takes their
weighted mean.

It sees a ``Stack``. Clients could scale their deltas themselves and leave the server a ``Sum``, but then the bound
would hold for honest clients alone; to enforce it on sums takes proofs that the sums are of bounded messages. The noise
that the paper adds besides is left to the privacy mechanisms, which account for it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.aggregation.robust import from_rule
from fedjax_llm.aggregation.server_optimizer import check_positive
from fedjax_llm.types import Aggregation, PyTree


@dataclass(frozen=True)
class NormBound:
    """The weighted mean of the client deltas, each scaled down to a norm.

    Attributes:
      norm: M, the largest Euclidean norm of a delta, in the units of the adapters.
    """

    norm: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack``.

        Raises:
          UserError: ``norm`` is not positive.
        """
        check_positive(norm=self.norm)

        def rule(deltas: PyTree, weights: Array) -> PyTree:
            scale = 1.0 / jnp.maximum(1.0, trees.norms(deltas) / self.norm)
            return trees.weighted_sum(scale * weights / jnp.sum(weights), deltas)

        return from_rule(rule)
