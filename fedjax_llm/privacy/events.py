"""What a round releases about one account, as plain values that a ledger can hold."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["gaussian", "banded", "matrix", "discrete gaussian", "skellam"]
LATTICE = ("discrete gaussian", "skellam")
"""Kinds whose noise is a sum of integer shares (``privacy/lattice.py``)."""


@dataclass(frozen=True)
class Event:
    """Releases whose noise has standard deviation ``noise_multiplier`` times the sensitivity to one unit.

    Attributes:
      kind: ``gaussian``: ``count`` releases with independent noise, each of a fresh Poisson sample of the units;
        ``banded``: ``count`` steps of a banded matrix mechanism with cyclic Poisson sampling (Choquette-Choo et al.
        2023, arXiv 2306.08153): every ``bands`` steps cost one sampled Gaussian release;
        ``matrix``: steps of a matrix mechanism without amplification, which as a whole is one Gaussian release,
        charged in full with its first step;
        ``discrete gaussian``, ``skellam``: as ``gaussian``, but what is released are integers, and the noise is the sum
        of ``summands`` independent shares of that distribution.
      noise_multiplier: standard deviation of the noise over the sensitivity to adding or removing one unit.
      sampling_probability: with which a unit takes part in a release; 1 where there is no (secret) sampling.
      count: how many releases (steps).
      bands: of a ``banded`` mechanism.
      summands: shares that the noise is the sum of.
      sensitivity: the L2 norm, in integers, of what one unit changes: shares have standard deviation
        ``noise_multiplier * sensitivity / sqrt(summands)``.
      values: integers in a release.
    """

    kind: Kind
    noise_multiplier: float
    sampling_probability: float = 1.0
    count: int = 1
    bands: int = 1
    summands: int = 0
    sensitivity: float = 0.0
    values: int = 0


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal events as one with the summed count, in the order of their first appearance."""
    counts: dict[Event, int] = {}
    for event in events:
        alike = replace(event, count=1)
        counts[alike] = counts.get(alike, 0) + event.count
    return tuple(replace(event, count=count) for event, count in counts.items())
