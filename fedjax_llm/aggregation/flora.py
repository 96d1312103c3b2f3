"""FLoRA (Wang et al. 2024, arXiv 2409.05976): the clients' factors are stacked and merged into the frozen weights.

The stacked factors' product is the mean of the clients' products, whatever their ranks, so nothing is lost. It moves
into the weights, and every round starts from fresh adapters: a random ``a``, and ``b`` of zeros.

The mean product is kept as a matrix [in, out] in f32 for every adapted module, since the stacks of all rounds together
would outgrow it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.aggregation.products import exact_matmul, send_whole, shares, side_by_side
from fedjax_llm.errors import UserError
from fedjax_llm.types import Adapters, Aggregation, ClientRule, PyTree, Stack


@dataclass(frozen=True)
class FLora:
    """The mean of the clients' products, added to the frozen weights.

    Attributes:
      seed: of the fresh factors ``a``, which are drawn anew for every round.
    """

    seed: int = 0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack`` of whole adapters."""
        if not 0 <= self.seed < 2**31:
            raise UserError(f"aggregation.seed is {self.seed}; it must be at least 0 and below 2**31")
        seed = self.seed

        def update(view: Stack, state: PyTree, adapters: Adapters) -> tuple[Adapters, PyTree]:
            share, number = shares(view.weights), state["round"] + 1
            residual = {}
            for path, factors in view.messages.items():
                stacked = side_by_side(factors, share)
                residual[path] = state["residual"][path] + exact_matmul(stacked["a"], stacked["b"])
            fresh = _fresh(jax.random.fold_in(jax.random.key(seed), number), adapters)
            after = (fresh, {"round": number, "residual": residual})
            return trees.select(jnp.any(view.weights > 0), after, (adapters, state))

        return Aggregation(
            init=_init,
            update=update,
            view=Stack,
            client=ClientRule(report=send_whole),
            residual=lambda state: state["residual"],
            download=_download,
            ranks=True,
            whole=True,
        )


def _init(adapters: Adapters) -> PyTree:
    """No round, and nothing merged."""
    products = jax.eval_shape(low_rank.products, adapters)
    return {"round": jnp.int32(0), "residual": trees.zeros(products)}


def _fresh(key: jax.Array, adapters: Adapters) -> Adapters:
    """Adapters like these that change nothing."""
    found = {}
    for path, factors in adapters.items():
        a = low_rank.drawn(key, path, factors["a"].shape, "kaiming")
        found[path] = {"a": a.astype(factors["a"].dtype), "b": jnp.zeros_like(factors["b"])}
    return found


def _download(cohort: int, adapters: Adapters) -> int:
    """The stacked factors of the cohort, of which one client's worth is counted as the adapters; all of full rank."""
    return (cohort - 1) * low_rank.nbytes(adapters)
