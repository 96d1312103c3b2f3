"""FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463): the factors ``a`` are averaged, every client keeps its own ``b``.

Both are trained. What the paper calls A is ``a`` here, and its B is ``b``. Every client ends with a model of its own.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedSaLora:
    """The mean of the deltas of ``a``, added to the server's; ``b`` never travels.

    Attributes:
      server_lr: how far to go along the mean delta; 1 is the paper's average.
    """

    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr)
        return from_optax(optax.sgd(self.server_lr))._replace(personal=_personal)


def _personal(module: str, factor: str) -> bool:
    return factor == "b"
