"""Inner product manipulation (Xie et al. 2020, arXiv 1903.03936): malicious clients agree on a step back.

All of them send minus epsilon times the mean of the honest messages. A small epsilon puts them near the honest ones
and all in one place, which a rule that looks for near neighbours takes for the best; a large one turns the mean around:
with h honest and m malicious clients of equal weight, from epsilon = h / m on.

The mean is unweighted, as in the paper. Where no honest client is there it is zero.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.adversaries.attack import Attack, check_positive, forged
from fedjax_llm.types import Stack


@dataclass(frozen=True)
class InnerProduct:
    """Malicious clients send minus ``epsilon`` times the mean of the honest messages.

    Attributes:
      epsilon: how far back.
    """

    epsilon: float = 0.5

    def make(self) -> Attack:
        """The attack on messages.

        Raises:
          UserError: ``epsilon`` is not positive.
        """
        check_positive(epsilon=self.epsilon)

        def corrupt(stack: Stack, malicious: Array, key: Array) -> Stack:
            honest = ~malicious & (stack.weights > 0)
            mean = trees.weighted_sum(honest / jnp.maximum(jnp.sum(honest), 1), stack.messages)
            return forged(stack, malicious, jax.tree.map(lambda leaf: -self.epsilon * leaf[None], mean))

        return Attack(corrupt)
