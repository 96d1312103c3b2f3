"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105, Algorithm 1): many local steps, and an outer Nesterov step.

With g the negative mean delta (the outer gradient), the outer optimiser is SGD with Nesterov momentum as PyTorch has it
and optax too:

    m <- mu m + g,    x <- x - lr (g + mu m).

The paper's mean over the replicas is uniform, ``federation.weighting="uniform"``. Its replicas keep the state of their
inner optimiser from round to round, ``training.keep_optimizer="yes"``.
"""

from dataclasses import dataclass

import optax

from fedjax_llm.aggregation.server_optimizer import check_positive, check_share, from_optax
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class DiLoCo:
    """SGD with Nesterov momentum on the negative mean delta.

    The paper's clients train with AdamW for some hundred steps a round: ``training.local_steps=500``.

    Attributes:
      server_lr: of the outer optimiser.
      momentum: mu, of the outer optimiser.
    """

    server_lr: float = 0.7
    momentum: float = 0.9

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Sum`` of deltas.

        Raises:
          UserError: ``server_lr`` is not positive, or ``momentum`` is not in [0, 1).
        """
        check_positive(server_lr=self.server_lr)
        check_share(momentum=self.momentum)
        return from_optax(optax.sgd(self.server_lr, momentum=self.momentum, nesterov=True))
