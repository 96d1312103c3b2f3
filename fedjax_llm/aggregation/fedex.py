"""FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432): averaged factors, and what they miss in the frozen weights.

The server averages ``a`` and ``b``, and adds to the frozen weights the residual, which is the mean of the clients'
products less the product of the means. So the clients' mean is exact. The residual of a round has rank C R at most and
travels as factors; ``residual_rank`` cuts it down to its largest singular values, as the paper's truncated form does.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.aggregation.products import changes, exact_matmul, principal, shares
from fedjax_llm.errors import UserError
from fedjax_llm.types import Adapters, Aggregation, PyTree, Stack


@dataclass(frozen=True)
class FedExLora:
    """The mean of the factors, and the residual of their products.

    Attributes:
      residual_rank: of what one round adds to the frozen weights; ``None``: all of it, which is exact.
    """

    residual_rank: int | None = None

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack`` of deltas."""
        rank = self.residual_rank
        if rank is not None and rank < 1:
            raise UserError(f"aggregation.residual_rank is {rank}; it must be at least 1, or None for all")

        def update(view: Stack, state: dict[str, jax.Array], adapters: Adapters) -> tuple[Adapters, PyTree]:
            means, rest = changes(adapters, view.messages, shares(view.weights))
            residual = {}
            for path, factors in rest.items():
                added = factors if rank is None else principal(factors, rank)
                residual[path] = state[path] + exact_matmul(added["a"], added["b"])
            return trees.select(jnp.any(view.weights > 0), (means, residual), (adapters, state))

        def download(cohort: int, adapters: Adapters) -> int:
            """Bytes of a round's residual in f32: as factors, or as it is where that is less."""
            total = 0
            for factors in adapters.values():
                fan_in, own = factors["a"].shape
                fan_out = factors["b"].shape[1]
                width = min(cohort * own, fan_in, fan_out, *(() if rank is None else (rank,)))
                total += 4 * min(width * (fan_in + fan_out), fan_in * fan_out)
            return total

        return Aggregation(
            init=lambda adapters: trees.zeros(jax.eval_shape(low_rank.products, adapters)),
            update=update,
            view=Stack,
            residual=lambda state: state,
            download=download,
            whole=True,
        )
