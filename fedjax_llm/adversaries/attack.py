"""What a simulated attack by malicious clients is.

An attack is a frozen dataclass in a file of its own whose ``make()`` gives an :class:`Attack`. Malicious clients know
everything (the honest clients' messages and the algorithm), which is what robust aggregation is judged against.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jax import Array

from fedjax_llm.data.records import Record
from fedjax_llm.types import Stack


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
