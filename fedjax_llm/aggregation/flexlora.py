"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the mean of the clients' products, decomposed again.

Clients of any rank send whole factors. The server takes the singular value decomposition of the weighted mean of their
products and keeps the R largest components: the paper's A is V^T, and its B is U S, so that the singular values are in
``b`` here and ``a`` has orthonormal columns. A client of rank r takes the first r components, which are the best
approximation of that rank.

The paper's code decomposes the dense mean; here two QR decompositions of the stacked factors come first, which gives
the same. It divides by alpha over each client's own rank; here alpha / R is one for all clients, and products are meant
without it.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.aggregation.products import principal, send_whole, shares, side_by_side
from fedjax_llm.types import Adapters, Aggregation, ClientRule, PyTree, Stack


@dataclass(frozen=True)
class FlexLora:
    """The best approximation of rank R of the mean of the clients' products."""

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack`` of whole adapters."""
        return Aggregation(
            init=lambda adapters: (),
            update=_update,
            view=Stack,
            client=ClientRule(report=send_whole),
            ranks=True,
            whole=True,
        )


def _update(view: Stack, state: PyTree, adapters: Adapters) -> tuple[Adapters, PyTree]:
    share, rank, found = shares(view.weights), low_rank.rank_of(adapters), {}
    for path, factors in view.messages.items():
        best = principal(side_by_side(factors, share), rank)
        found[path] = {name: best[name].astype(leaf.dtype) for name, leaf in adapters[path].items()}
    return trees.select(jnp.any(view.weights > 0), found, adapters), state
