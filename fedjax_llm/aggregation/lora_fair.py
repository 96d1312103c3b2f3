"""LoRA-FAIR (Bian et al. 2024, arXiv 2411.14961, equation 8): the mean of the factors, with a correction of ``b``.

With the means ``a`` and ``b`` of the factors, and W the mean of the clients' products, the server looks for the ``db``
that brings ``a (b + db)`` near W while it stays small, and sends ``a`` and ``b + db``.

The paper measures nearness by the cosine of the two, the size of ``db`` by its norm, and searches by SGD. Here both are
squared Frobenius norms,

    |a (b + db) - W|^2 + ridge |db|^2,

so that the minimum is the solution of one linear system of R equations, ``(a^T a + ridge) db = a^T (W - a b)``, without
steps or rates to choose. It has the same two limits: W as near as ``a`` allows, or the plain mean.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import jax.scipy as jsp

from fedjax_llm import trees
from fedjax_llm.aggregation.products import changes, exact_matmul, shares
from fedjax_llm.aggregation.server_optimizer import check_positive
from fedjax_llm.types import Adapters, Aggregation, PyTree, Stack


@dataclass(frozen=True)
class LoraFair:
    """The mean of the factors, ``b`` corrected towards the mean of the products.

    Attributes:
      ridge: lambda, of the size of the correction, beside the squares of the singular values of ``a``.
    """

    ridge: float = 0.01

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack`` of deltas."""
        check_positive(ridge=self.ridge)
        ridge = self.ridge

        def update(view: Stack, state: PyTree, adapters: Adapters) -> tuple[Adapters, PyTree]:
            means, rest = changes(adapters, view.messages, shares(view.weights))
            found = {}
            for path, factors in rest.items():
                a = means[path]["a"].astype(jnp.float32)
                target = exact_matmul(exact_matmul(a.T, factors["a"]), factors["b"])
                system = exact_matmul(a.T, a) + ridge * jnp.eye(a.shape[1])
                correction = jsp.linalg.solve(system, target, assume_a="pos")
                b = means[path]["b"]
                found[path] = {"a": means[path]["a"], "b": (b.astype(jnp.float32) + correction).astype(b.dtype)}
            return trees.select(jnp.any(view.weights > 0), found, adapters), state

        return Aggregation(init=lambda adapters: (), update=update, view=Stack, whole=True)
