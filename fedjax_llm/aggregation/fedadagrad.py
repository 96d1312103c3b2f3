"""FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2): Adagrad at the server.

The step is divided by ``sqrt(tau^2 + the sum of squares)``; the paper's algorithm adds tau once more outside the root.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedAdagrad:
    """Adagrad on the negative mean delta.

    Attributes:
      server_lr: eta, learning rate of the server.
      tau: the degree of adaptivity; the sum of squares starts at its square.
    """

    server_lr: float = 1e-2
    tau: float = 1e-3

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr, tau=self.tau)
        return from_optax(optax.adagrad(self.server_lr, initial_accumulator_value=self.tau**2, eps=0.0))
