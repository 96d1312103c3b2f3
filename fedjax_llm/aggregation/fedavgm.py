"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): FedAvg with momentum at the server."""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, check_share, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedAvgM:
    """SGD with momentum on the negative mean delta.

    Attributes:
      server_lr: learning rate of the server.
      momentum: beta; 0 is FedAvg.
      nesterov: look ahead by one step.
    """

    server_lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr)
        check_share(momentum=self.momentum)
        return from_optax(optax.sgd(self.server_lr, momentum=self.momentum, nesterov=self.nesterov))
