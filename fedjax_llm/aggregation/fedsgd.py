"""FedSGD (McMahan et al. 2017, arXiv 1602.05629, section 2): the server takes one gradient step a round.

With one local step of plain SGD at learning rate 1 a client's delta is its negative mean gradient, so that the negative
mean delta is the mean gradient, and the server's optimiser steps with it. Momentum at the server is an addition; the
paper's rule is ``momentum=0``.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, check_share, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedSgd:
    """SGD at the server on the clients' mean gradient.

    It wants one local step of ``training.optimizer=Optimizer("sgd", 1.0)``, with constant schedules and
    ``training.proximal=0``. The paper's gradient is over all that a client holds: ``training.local_epochs=1`` and a
    ``training.batch_size`` of at least the largest site's number of examples. ``local_steps=1`` takes the gradient of
    one batch instead. With other settings the deltas are no gradients, and the algorithm is FedAvgM.

    Attributes:
      server_lr: the learning rate.
      momentum: of the server's optimiser.
    """

    server_lr: float = 0.1
    momentum: float = 0.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of deltas.

        Raises:
          UserError: ``server_lr`` is not positive, or ``momentum`` is not in [0, 1).
        """
        check_positive(server_lr=self.server_lr)
        check_share(momentum=self.momentum)
        return from_optax(optax.sgd(self.server_lr, momentum=self.momentum or None))
