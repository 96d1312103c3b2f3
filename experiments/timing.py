"""How the benchmark times: after a warm-up, and what is compared in turns."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

Work = Callable[[], Any]


def once(work: Work) -> float:
    """Seconds of one call, until its arrays are there."""
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def timed(work: Work, repeats: int) -> list[float]:
    """Seconds of each repeat, after one warm-up that is not counted."""
    once(work)
    return [once(work) for _ in range(repeats)]


def paired(one: Work, other: Work, repeats: int) -> list[tuple[float, float]]:
    """Seconds of both in each repeat, taking turns at going first; after one warm-up of both."""
    once(one), once(other)
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            later, earlier = once(other), once(one)
            pairs.append((earlier, later))
        else:
            pairs.append((once(one), once(other)))
    return pairs


def spread(ratios: Iterable[float]) -> dict[str, float]:
    """The median of ratios, the lowest and the highest."""
    ordered = sorted(ratios)
    found = {"ratio": statistics.median(ordered), "low": ordered[0], "high": ordered[-1]}
    return {name: round(value, 3) for name, value in found.items()}
