"""FedNova (Wang et al. 2020, arXiv 2007.07481, section 4): deltas are normalised by the clients' numbers of steps.

Where clients take unequal numbers of steps, a mean of deltas follows the clients that step most. FedNova averages
directions instead, and goes along them as far as the clients went on average. With a_k the weights of a client's
gradients in its delta, and p_k the clients' weights,

    x <- x + tau_eff sum_k p_k delta_k / |a_k|_1,    tau_eff = sum_k p_k |a_k|_1.

Plain SGD weights each gradient with the learning rate of its step, so |a_k|_1 is the sum of these: with a constant rate
the number of steps tau_k, but for a factor that cancels. With momentum or a proximal term at the clients the paper's
a_k are others, which are not computed here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.server_optimizer import check_positive, mean, moved
from fedjax_llm.types import Aggregation, ClientRule, Local, PyTree, Sum, Trained


@dataclass(frozen=True)
class FedNova:
    """The mean direction, times the mean length of the way.

    It equals FedAvg where all clients take equally many steps, and matters with ``training.local_epochs`` over sites
    of unequal size. It is meant for ``training.optimizer.name="sgd"``.

    Attributes:
      server_lr: how far to go along the result; 1 is the paper's.
    """

    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of {"delta": normalised, "rate": its norm}; there is no state.

        Raises:
          UserError: ``server_lr`` is not positive.
        """
        check_positive(server_lr=self.server_lr)

        def update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
            received = mean(view)
            return moved(adapters, received["delta"], self.server_lr * received["rate"]), state

        return Aggregation(lambda adapters: (), update, Sum, ClientRule(report=_report))


def _report(trained: Trained, local: Local) -> tuple[PyTree, PyTree]:
    """The delta over the sum of the learning rates, and that sum."""
    inverse = 1.0 / jnp.where(trained.rate > 0, trained.rate, 1.0)  # without a step the delta is zero
    return {"delta": jax.tree.map(lambda d: inverse * d, trained.delta), "rate": trained.rate}, local.memory
