"""The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, Definition 1 and Algorithm 1, option I).

Every client has one vote in every coordinate, however much data it holds, so weights only say who is there: weighed
votes would let a client that claims much data decide alone. The paper takes medians of gradients; here they are of the
deltas of local training.
"""

from dataclasses import dataclass

from fedjax_llm.aggregation.robust import coordinate_median, from_rule
from fedjax_llm.types import Aggregation


@dataclass(frozen=True)
class CoordinateMedian:
    """The median of the client deltas, coordinate by coordinate; of an even number the mean of the middle two."""

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack``."""
        return from_rule(lambda deltas, weights: coordinate_median(deltas, weights > 0))
