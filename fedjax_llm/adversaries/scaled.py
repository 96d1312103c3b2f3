"""Model replacement (Bagdasaryan et al. 2020, AISTATS, arXiv 1807.00459): a delta that drowns the others.

With the server's adapters G and a malicious client's X it sends gamma (X - G), and a factor gamma of n / eta, for n
clients of equal weight and a server that goes eta of the way along their mean, replaces G by X. Here X is what the
client has trained, on records that another attack may have poisoned.
"""

from dataclasses import dataclass

from jax import Array

from fedjax_llm.adversaries.attack import Attack, check_positive, times
from fedjax_llm.types import Stack


@dataclass(frozen=True)
class ScaledUpdate:
    """Malicious clients send ``factor`` times their message.

    Attributes:
      factor: gamma; the cohort's size, for a lone client among equals, makes the mean its own.
    """

    factor: float = 10.0

    def make(self) -> Attack:
        """The attack on messages.

        Raises:
          UserError: ``factor`` is not positive.
        """
        check_positive(factor=self.factor)

        def corrupt(stack: Stack, malicious: Array, key: Array) -> Stack:
            return times(stack, malicious, self.factor)

        return Attack(corrupt)
