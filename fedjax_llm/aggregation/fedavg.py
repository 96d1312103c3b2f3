"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): the server takes the weighted mean of the clients."""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedAvg:
    """The mean of the client deltas, added to the server's adapters.

    Attributes:
      server_lr: how far to go along the mean delta; 1 is the plain average.
    """

    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr)
        return from_optax(optax.sgd(self.server_lr))
