"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1 with option II): control variates against drift.

Every client k keeps c_k, an estimate of its own mean gradient, and the server keeps c, the mean of all clients' c_k.
A local step follows ``g - c_k + c``. After K steps from x to y_k,

    c_k+ = c_k - c + (x - y_k) / (K eta),    x <- x + eta_g mean(y_k - x),    c <- c + |S| / N mean(c_k+ - c_k).

Where it differs from the paper:

- K eta is the sum of the learning rates of the round's steps, so schedules are covered.
- The means are weighted as the view is. The paper's are uniform, ``federation.weighting="uniform"``. By examples, c is
  the mean by examples of the c_k as long as every site takes part in every round, and an estimate of it otherwise.
- |S| / N is a hyper-parameter, since a sum does not tell how many sites there are.
- The formulas are about plain SGD. An adaptive client optimiser (AdamW) rescales ``g - c_k + c``, and ``(x - y_k) /
  (K eta)`` is then no mean of gradients: the control variates are a heuristic.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm import trees
from fedjax_llm.aggregation.server_optimizer import check_portion, check_positive, mean, moved
from fedjax_llm.types import Aggregation, ClientRule, Local, PyTree, Sum, Trained


@dataclass(frozen=True)
class Scaffold:
    """FedAvg whose local steps are corrected by the difference of the server's and the client's control variates.

    It is meant for ``training.optimizer.name="sgd"``. Each client keeps, receives and sends one tree like the adapters
    more than with FedAvg.

    Attributes:
      server_lr: eta_g, how far to go along the mean delta.
      participation: |S| / N, the share of the sites that take part in a round: ``federation.cohort`` over their number.
    """

    server_lr: float = 1.0
    participation: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of {"delta", "control"}; the state is c, f32 like the adapters.

        Raises:
          UserError: ``server_lr`` is not positive, or ``participation`` is not in (0, 1].
        """
        check_positive(server_lr=self.server_lr)
        check_portion(participation=self.participation)

        def update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
            received = mean(view)
            control = moved(state, received["control"], self.participation)
            return moved(adapters, received["delta"], self.server_lr), control

        client = ClientRule(init=trees.zeros, gradient=_corrected, report=_report)
        return Aggregation(trees.zeros, update, Sum, client, broadcast=lambda state: state)


def _corrected(gradient: PyTree, adapters: PyTree, local: Local) -> PyTree:
    """``g - c_k + c``."""
    return jax.tree.map(lambda g, own, everyone: g - own + everyone, gradient, local.memory, local.received)


def _report(trained: Trained, local: Local) -> tuple[PyTree, PyTree]:
    """The delta and ``c_k+ - c_k``; and c_k+."""
    took = trained.rate > 0  # without a step nothing was learnt of the gradient
    inverse = 1.0 / jnp.where(took, trained.rate, 1.0)
    change = jax.tree.map(lambda d, c: jnp.where(took, -inverse * d - c, 0.0), trained.delta, local.received)
    return {"delta": trained.delta, "control": change}, jax.tree.map(jnp.add, local.memory, change)
