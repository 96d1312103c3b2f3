"""Shares of Skellam noise, the difference of two Poisson variables (Agarwal, Kairouz & Liu 2021, arXiv 2110.04995).

A sum of shares is Skellam again, so that it is accounted for exactly as what it is, however many there are; and it can
be taken apart into shares for owners whose data are at several sites. That is what speaks for it beside ``DDGauss``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from fedjax_llm.privacy import discrete_noise, shares


@dataclass(frozen=True)
class Skellam(shares.Integers):
    """Every site adds Skellam noise."""

    kind: ClassVar[Literal["skellam"]] = "skellam"

    def draw(self, stddev: float) -> Callable[[bytes, int], np.ndarray]:
        """(32-byte key, size) -> int64 [size] of this standard deviation."""
        return partial(_draw, stddev**2)


def _draw(variance: float, key: bytes, size: int) -> np.ndarray:
    """A share."""
    return discrete_noise.skellam(key, variance, size)
