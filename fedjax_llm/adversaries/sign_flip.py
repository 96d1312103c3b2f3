"""Sign flipping (Li et al. 2019, arXiv 1811.03761): malicious clients send what would undo their work."""

from dataclasses import dataclass

from jax import Array

from fedjax_llm.adversaries.attack import Attack, check_positive, times
from fedjax_llm.types import Stack


@dataclass(frozen=True)
class SignFlip:
    """Malicious clients send minus ``scale`` times their message.

    Attributes:
      scale: 1 keeps the norm, so that bounds on norms do not tell.
    """

    scale: float = 1.0

    def make(self) -> Attack:
        """The attack on messages.

        Raises:
          UserError: ``scale`` is not positive.
        """
        check_positive(scale=self.scale)

        def corrupt(stack: Stack, malicious: Array, key: Array) -> Stack:
            return times(stack, malicious, -self.scale)

        return Attack(corrupt)
