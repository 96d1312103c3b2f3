"""What a simulated attack by malicious clients is.

An attack is a frozen dataclass in a file of its own whose ``make()`` gives an :class:`Attack`. Malicious clients know
everything (the honest clients' messages and the algorithm), which is what robust aggregation is judged against.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError
from fedjax_llm.types import PyTree, Stack


class Attack(NamedTuple):
    """An attack as pure functions.

    Attributes:
      corrupt: ``corrupt(stack, malicious [C], key) -> stack`` changes the messages of the malicious clients, and of no
        other; ``None``: they send what they have trained.
      poison: ``poison(records, rng) -> records`` changes a malicious site's training records; ``None``: they stay.
    """

    corrupt: Callable[[Stack, Array, Array], Stack] | None = None
    poison: Callable[[Sequence[Record], np.random.Generator], tuple[Record, ...]] | None = None


class AttackConfig(Protocol):
    """A frozen dataclass of an attack's parameters."""

    def make(self) -> Attack:
        """The attack with these parameters."""
        ...


def forged(stack: Stack, malicious: Array, messages: PyTree) -> Stack:
    """The stack with other messages from the malicious clients that are there; all else bit for bit as it was.

    Args:
      stack: what was sent, leaves [C, ...] of any type.
      malicious: bool [C].
      messages: what malicious clients send instead, leaves [C, ...] or [...] of any type.
    """
    cast = jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), messages, stack.messages)
    return Stack(trees.select(malicious & (stack.weights > 0), cast, stack.messages), stack.weights)


def times(stack: Stack, malicious: Array, factor: float) -> Stack:
    """The stack with the messages of the malicious clients [C] multiplied by ``factor``."""
    return forged(stack, malicious, jax.tree.map(lambda leaf: factor * leaf, stack.messages))


def check_positive(**values: float) -> None:
    """Refuses parameters of an attack that must be positive and finite, by name.

    Raises:
      UserError: naming the one that is not.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"attack.{name} is {value}; it must be positive and finite")
