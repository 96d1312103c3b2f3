"""RoLoRA (Chen et al. 2024, arXiv 2409.02346; Chen et al. 2025, arXiv 2502.01755, Algorithm 1): one factor a round.

Odd rounds train ``b`` and leave ``a`` alone, even rounds the other way round. Where one factor is everybody's, the mean
of the other is the mean of the products, and half as much is sent up. ``b`` comes first, since it starts at zero, where
``a`` has no gradient.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class RoLora:
    """The mean of the deltas of the factor whose turn it is, added to the server's.

    Attributes:
      server_lr: how far to go along the mean delta; 1 is the paper's average.
    """

    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``, in which the other factor's deltas are zero."""
        check_positive(server_lr=self.server_lr)
        return from_optax(optax.sgd(self.server_lr))._replace(live=_live, whole=True)


def _live(number: int) -> dict[str, float]:
    """Which factor is trained in a round, counted from 1."""
    odd = number % 2 == 1
    return {"a": float(not odd), "b": float(odd)}
