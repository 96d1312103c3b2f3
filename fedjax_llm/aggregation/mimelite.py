"""MimeLite (Karimireddy et al. 2020, arXiv 2008.03606, Algorithm 1 without the SVRG correction) with momentum SGD.

Clients step with the server's momentum m, which stays fixed during the round; the server moves to the mean of the
clients, and updates m with the mean gradient at the adapters x that the clients started from:

    locally:  y <- y - eta ((1 - beta) g(y) + beta m),
    server:   x <- mean(y_k),    m <- (1 - beta) mean(grad f_k(x)) + beta m.

grad f_k(x) is taken over the examples that the client trains on in the round. With ``training.local_epochs=1`` these
are all that it holds, and the gradient is the paper's full batch; with ``local_steps`` it is an estimate, as good as
they are many. The means are weighted as the view is; the paper's are uniform.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm import trees
from fedjax_llm.aggregation.server_optimizer import check_share, mean, moved
from fedjax_llm.types import Aggregation, ClientRule, Local, PyTree, Sum, Trained


@dataclass(frozen=True)
class MimeLite:
    """FedAvg whose clients step with the server's momentum.

    It is meant for ``training.optimizer.name="sgd"`` without momentum of its own. Each client receives and sends one
    tree like the adapters more than with FedAvg, and computes one gradient more for each example.

    Attributes:
      momentum: beta; 0 is FedAvg.
    """

    momentum: float = 0.9

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of {"delta", "gradient"}; the state is m, f32 like the adapters.

        Raises:
          UserError: ``momentum`` is not in [0, 1).
        """
        check_share(momentum=self.momentum)
        beta = self.momentum

        def blended(gradient: jax.Array, momentum: jax.Array) -> jax.Array:
            return (1 - beta) * gradient + beta * momentum

        def correct(gradient: PyTree, adapters: PyTree, local: Local) -> PyTree:
            return jax.tree.map(blended, gradient, local.received)

        def update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
            received, present = mean(view), view.weight > 0
            momentum = jax.tree.map(lambda g, m: jnp.where(present, blended(g, m), m), received["gradient"], state)
            return moved(adapters, received["delta"]), momentum

        client = ClientRule(gradient=correct, report=_report, probe=True)
        return Aggregation(trees.zeros, update, Sum, client, broadcast=lambda state: state)


def _report(trained: Trained, local: Local) -> tuple[PyTree, PyTree]:
    """The delta, and the gradient where it started."""
    return {"delta": trained.delta, "gradient": trained.probe_gradient}, local.memory
