"""How work is timed: after a warm-up, and in turns where it is compared; and how fast a matrix product is here."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

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


_LAYERS = ((1024, 576, 1536), (2048, 2048, 2048), (1024, 576, 4096))
"""(m, k, n) of products like those in a transformer's layers."""


def matmul_peak(shapes: Sequence[tuple[int, int, int]] = _LAYERS, repeats: int = 10) -> float:
    """This machine's f32 matrix-product peak in FLOP/s: the best of several shapes (m, k, n) and repeats."""
    multiply, best = jax.jit(lambda a, b: a @ b), 0.0
    for m, k, n in shapes:
        a, b = jnp.ones((m, k)), jnp.ones((k, n))
        seconds = min(timed(lambda: multiply(a, b), repeats))  # noqa: B023
        best = max(best, 2.0 * m * k * n / seconds)
    return best
