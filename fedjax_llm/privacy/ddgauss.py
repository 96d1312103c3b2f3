"""Shares of discrete Gaussian noise (Kairouz, Liu & Steinke 2021, arXiv 2102.06387).

A sum of shares is only close to a discrete Gaussian, which costs nothing that one could measure from a standard
deviation of about 2 of each share on; calibration sees to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from fedjax_llm.privacy import discrete_noise, shares


@dataclass(frozen=True)
class DDGauss(shares.Integers):
    """Every site adds discrete Gaussian noise."""

    kind: ClassVar[Literal["discrete gaussian"]] = "discrete gaussian"

    def draw(self, stddev: float) -> Callable[[bytes, int], np.ndarray]:
        """(32-byte key, size) -> int64 [size] of this parameter."""
        return partial(_draw, stddev)


def _draw(stddev: float, key: bytes, size: int) -> np.ndarray:
    """A share."""
    return discrete_noise.discrete_gaussian(key, stddev, size)
