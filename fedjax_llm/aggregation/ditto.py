"""Ditto (Li et al. 2021, arXiv 2012.04221, Algorithm 1): FedAvg, and besides it adapters of every client's own.

A client of a round trains the server's adapters as in FedAvg, and with the same batches its own ones, v, whose gradient
has ``strength (v - w)`` added, w being the server's adapters at the start of the round. What is its own never travels.

The paper gives the two trainings step counts of their own; here they share the batches and the optimiser's settings, as
in the authors' code.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class Ditto:
    """FedAvg, and personal adapters that are pulled towards the server's.

    Attributes:
      strength: lambda, of the pull; the larger, the nearer the personal adapters stay to the server's.
      server_lr: how far to go along the mean delta; 1 is the plain average.
    """

    strength: float = 0.1
    server_lr: float = 1.0

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum``."""
        check_positive(strength=self.strength, server_lr=self.server_lr)
        return from_optax(optax.sgd(self.server_lr))._replace(own=self.strength)
