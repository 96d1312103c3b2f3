"""Gaussian messages (Blanchard et al. 2017, NeurIPS, "Machine learning with adversaries").

Malicious clients send independent normals of mean zero, whatever they have trained. Draws depend on the round and on a
client's place in its cohort.
"""

from dataclasses import dataclass

import jax
from jax import Array

from fedjax_llm.adversaries.attack import Attack, check_positive, forged
from fedjax_llm.privacy.noise import gaussian
from fedjax_llm.types import Stack


@dataclass(frozen=True)
class GaussianUpdate:
    """Malicious clients send noise instead of their message.

    Attributes:
      stddev: of every element, in the units of the message.
    """

    stddev: float = 1.0

    def make(self) -> Attack:
        """The attack on messages.

        Raises:
          UserError: ``stddev`` is not positive.
        """
        check_positive(stddev=self.stddev)

        def corrupt(stack: Stack, malicious: Array, key: Array) -> Stack:
            keys = jax.random.split(key, len(stack.weights))
            noise = jax.vmap(gaussian, (0, 0, None))(keys, stack.messages, self.stddev)
            return forged(stack, malicious, noise)

        return Attack(corrupt)
