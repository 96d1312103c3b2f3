"""FedDyn (Acar et al. 2021, arXiv 2111.04263, Algorithm 1): a regulariser that aligns the clients' optima.

Every client k keeps h_k, an estimate of its gradient at its optimum. From the server's adapters x it minimises
``f_k(y) - <h_k, y> + alpha / 2 |y - x|^2`` and ends at y_k; then

    h_k <- h_k - alpha (y_k - x),    h <- h - alpha |S| / N mean(y_k - x),    x <- mean(y_k) - h / alpha.

At a fixed point all y_k equal x and the mean of the h_k is zero: x is stationary for the mean loss.

Where it differs from the paper:

- The minimum is approached by the local steps of the round, as in the authors' code.
- The means are weighted as the view is. The paper's are uniform, ``federation.weighting="uniform"``. By examples, h is
  the mean by examples of the h_k as long as every site takes part in every round, and an estimate of it otherwise.
- |S| / N is a hyper-parameter, since a sum does not tell how many sites there are.
- With an adaptive client optimiser (AdamW) the regulariser's gradient is rescaled along with the loss's.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm import trees
from fedjax_llm.aggregation.server_optimizer import check_portion, check_positive, mean, moved
from fedjax_llm.types import Aggregation, ClientRule, Local, PyTree, Sum, Trained


@dataclass(frozen=True)
class FedDyn:
    """FedAvg with a dynamic regulariser at the clients and its correction at the server.

    Each client keeps one tree like the adapters; no more travels than with FedAvg. ``training.proximal`` should be 0:
    the regulariser has that term already.

    Attributes:
      alpha: strength of the regulariser.
      participation: |S| / N, the share of the sites that take part in a round: ``federation.cohort`` over their number.
    """

    alpha: float = 0.1
    participation: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of deltas; the state is h, f32 like the adapters.

        Raises:
          UserError: ``alpha`` is not positive, or ``participation`` is not in (0, 1].
        """
        check_positive(alpha=self.alpha)
        check_portion(participation=self.participation)
        alpha = self.alpha

        def correct(gradient: PyTree, adapters: PyTree, local: Local) -> PyTree:
            def one(g: jax.Array, y: jax.Array, x: jax.Array, h: jax.Array) -> jax.Array:
                return g - h + alpha * (y.astype(jnp.float32) - x.astype(jnp.float32))

            return jax.tree.map(one, gradient, adapters, local.start, local.memory)

        def report(trained: Trained, local: Local) -> tuple[PyTree, PyTree]:
            return trained.delta, moved(local.memory, trained.delta, -alpha)

        def update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
            delta, present = mean(view), view.weight > 0
            state = moved(state, delta, -alpha * self.participation)
            step = jax.tree.map(lambda d, h: jnp.where(present, d - h / alpha, 0.0), delta, state)
            return moved(adapters, step), state

        client = ClientRule(init=trees.zeros, gradient=correct, report=report)
        return Aggregation(trees.zeros, update, Sum, client)
