"""FedYogi (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2): Yogi (Zaheer et al. 2018) at the server.

The optax optimiser corrects the bias of its moments, which the paper's algorithm does not. Both moments start at zero:
``optax.yogi`` starts the first one at 1e-6, which moves the adapters even where no client has changed them.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, check_share, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedYogi:
    """Yogi on the negative mean delta.

    Attributes:
      server_lr: eta, learning rate of the server.
      b1: decay of the first moment.
      b2: decay of the second moment.
      tau: the degree of adaptivity, added to the root of the second moment.
    """

    server_lr: float = 1e-2
    b1: float = 0.9
    b2: float = 0.99
    tau: float = 1e-3

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr, tau=self.tau)
        check_share(b1=self.b1, b2=self.b2)
        scale = optax.scale_by_yogi(b1=self.b1, b2=self.b2, eps=self.tau, initial_accumulator_value=0.0)
        return from_optax(optax.chain(scale, optax.scale_by_learning_rate(self.server_lr)))
