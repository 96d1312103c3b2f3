"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): the server takes the weighted mean of the clients.

Over both factors of the adapters it is FedIT (Zhang et al. 2023, arXiv 2305.05644): the mean of the factors is not the
mean of their products. With ``lora.train="b"`` it is FFA-LoRA (Sun et al. 2024, arXiv 2403.12313), and with
``lora.train="core"`` it is Fed-SB (Singhal et al. 2025, arXiv 2502.15436); both are exact. Where clients train adapters
of different ranks, a component counts as not moved by those that do not train it.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class FedAvg:
    """The mean of the client deltas, added to the server's adapters.

    Attributes:
      server_lr: how far to go along the mean delta; 1 is the plain average.
    """

    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(server_lr=self.server_lr)
        return from_optax(optax.sgd(self.server_lr))._replace(ranks=True)
