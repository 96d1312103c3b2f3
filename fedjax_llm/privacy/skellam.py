"""Shares of Skellam noise, the difference of two Poisson variables (Agarwal, Kairouz & Liu 2021, arXiv 2110.04995).

A sum of shares is Skellam again, so that it is accounted for exactly as what it is, however many there are; and it can
be taken apart into shares for owners whose data are at several sites. That is what speaks for it beside ``DDGauss``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from fedjax_llm.privacy import discrete_noise, shares


@dataclass(frozen=True)
class Skellam:
    """Every site adds Skellam noise.

    Attributes:
      bits: a message's values travel as integers of so many bits, 16 or 32; the sum is modulo ``2 ** bits``.
      tail: how many standard deviations of the sum fit the modulus; what is beyond wraps around, which is an error, not
        a leak.
      beta: how many draws of a message's random rounding are refused at most (unit ``site``).
    """

    bits: int = 32
    tail: float = 6.0
    beta: float = math.exp(-0.5)
    kind: ClassVar[Literal["skellam"]] = "skellam"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        shares.check("Skellam", self.bits, self.tail, self.beta)

    def draw(self, stddev: float) -> Callable[[bytes, int], np.ndarray]:
        """(32-byte key, size) -> int64 [size] of this standard deviation."""
        return partial(_draw, stddev**2)


def _draw(variance: float, key: bytes, size: int) -> np.ndarray:
    """A share."""
    return discrete_noise.skellam(key, variance, size)
