"""q-FedAvg (Li et al. 2020, arXiv 1905.10497, Algorithm 2): clients of high loss weigh more, for an even accuracy.

It minimises sum_k p_k F_k^(q+1) / (q + 1). With F_k the loss at the server's adapters, delta_k what the client moved,
g_k = -L delta_k its stand-in for a gradient, and L = 1 / eta the stand-in for the gradient's Lipschitz constant,

    x <- x - sum_k F_k^q g_k / sum_k h_k,    h_k = q F_k^(q-1) |g_k|^2 + L F_k^q.

Where it differs from the paper:

- Numerator and denominator are both divided by L, which cancels; so q = 0 is FedAvg to the bit.
- F_k is the mean loss over the examples that the client trains on in the round: with ``training.local_epochs=1`` all
  that it holds, as in the paper.
- The paper draws clients with probability p_k and sums them alike. Here cohorts are uniform, and each client's terms
  are weighted by the view's weights, which has the same expectation.
- F_k is at least 1e-10, so that F_k^(q-1) is finite; the authors' code adds as much.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.server_optimizer import check_positive, moved
from fedjax_llm.errors import UserError
from fedjax_llm.types import Aggregation, ClientRule, Local, PyTree, Sum, Trained

_LEAST_LOSS = 1e-10


@dataclass(frozen=True)
class QFedAvg:
    """FedAvg with weights that grow with the q-th power of a client's loss, and a step that shrinks accordingly.

    Attributes:
      q: how much evenness counts; 0 is FedAvg.
      learning_rate: 1 / L; the clients' learning rate, ``training.optimizer.learning_rate``. A larger one takes larger
        steps where q > 0.
    """

    q: float = 1.0
    learning_rate: float = 1e-3

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of {"delta": F^q delta, "step": h / L}; there is no state.

        Raises:
          UserError: ``q`` is negative or not finite, or ``learning_rate`` is not positive.
        """
        if not 0 <= self.q < math.inf:
            raise UserError(f"aggregation.q is {self.q}; it must be finite and not negative")
        check_positive(learning_rate=self.learning_rate)
        q, lipschitz = self.q, 1 / self.learning_rate

        def report(trained: Trained, local: Local) -> tuple[PyTree, PyTree]:
            assert trained.probe_loss is not None
            loss = jnp.maximum(trained.probe_loss, _LEAST_LOSS)
            power = loss**q
            square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(trained.delta))
            step = power + q * loss ** (q - 1) * lipschitz * square
            return {"delta": jax.tree.map(lambda d: power * d, trained.delta), "step": step}, local.memory

        return Aggregation(lambda adapters: (), _update, Sum, ClientRule(report=report, probe=True))


def _update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
    """The sum of the weighted deltas over that of the steps."""
    step = view.total["step"]
    any_step = step > 0  # not without clients, nor where all losses^q vanish
    inverse = jnp.where(any_step, 1.0 / jnp.where(any_step, step, 1.0), 0.0)
    return moved(adapters, view.total["delta"], inverse), state
