"""Shares of discrete Gaussian noise (Kairouz, Liu & Steinke 2021, arXiv 2102.06387).

A sum of shares is only close to a discrete Gaussian, which costs nothing that one could measure from a standard
deviation of about 2 of each share on; calibration sees to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from fedjax_llm.privacy import discrete_noise, shares


@dataclass(frozen=True)
class DDGauss:
    """Every site adds discrete Gaussian noise.

    Attributes:
      bits: a message's values travel as integers of so many bits, 16 or 32; the sum is modulo ``2 ** bits``.
      tail: how many standard deviations of the sum fit the modulus; what is beyond wraps around, which is an error, not
        a leak.
      beta: how many draws of a message's random rounding are refused at most (unit ``site``).
    """

    bits: int = 32
    tail: float = 6.0
    beta: float = math.exp(-0.5)
    kind: ClassVar[Literal["discrete gaussian"]] = "discrete gaussian"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        shares.check("DDGauss", self.bits, self.tail, self.beta)

    def draw(self, stddev: float) -> Callable[[bytes, int], np.ndarray]:
        """(32-byte key, size) -> int64 [size] of this parameter."""
        return partial(_draw, stddev)


def _draw(stddev: float, key: bytes, size: int) -> np.ndarray:
    """A share."""
    return discrete_noise.discrete_gaussian(key, stddev, size)
