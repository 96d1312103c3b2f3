"""Messages as integers modulo 2^32: sums are exact there, in any order, and masks hide them perfectly.

A client of weight w sends ``round(w * x * S)`` for every number x of its message, w itself on a grid of its own, and
how many numbers it had to cut. The grid is chosen from public bounds before anything is sent, so that no sum of any
cohort can leave the range: with |x| <= B and weights that add up to at most W, the sum of C clients is at most
``W B S + C / 2`` in integers, and S is the largest power of two that keeps this below 2^31. The weighted mean that is
read off the sum then differs from that of the (cut) messages by at most :func:`error_bound`.

The same functions work on NumPy and on JAX arrays, on any device, and give the same bits: each number is one product
in f32, rounded to the nearest integer, and scales are powers of two.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import UserError

EXTRA = 2
"""Numbers that travel after the message's own: the weight, and how many numbers were cut."""
_LARGEST = 2**31 * (1 - 2**-20)
"""The range, less what rounding in f32 may add."""
_FINEST = 2.0**40
"""No scale is larger: it would resolve less than f32 does."""


class Grid(NamedTuple):
    """How numbers become integers, the same for all clients of a round.

    Attributes:
      scale: S, integers a unit of weight times number; a power of two.
      weight_scale: integers a unit of weight; a power of two.
      bound: B, the largest absolute value of a number; larger ones are cut.
      clients: C, the most whose messages a sum may hold.
      weight: W, the most that their weights may add up to.
    """

    scale: float
    weight_scale: float
    bound: float
    clients: int
    weight: float


def grid(bound: float, clients: int, weight: float) -> Grid:
    """The finest grid on which no sum can overflow.

    Args:
      bound: B.
      clients: C.
      weight: W.

    Raises:
      UserError: a bound that is not positive and finite, or sums so large that less than one step is left of a number.
    """
    if not 0 < bound < math.inf or not 0 < weight < math.inf:
        raise UserError(f"secure.bound is {bound} and weights add up to {weight}; both must be positive and finite")
    room = _LARGEST - clients
    if room <= weight or room <= weight * bound:
        raise UserError(
            f"secure.bound is {bound:g}, and the weights of {clients:,} clients add up to {weight:g}: their sum leaves "
            "no room for a single step below 2^31. Lower secure.bound, or set federation.weighting to 'uniform'"
        )
    return Grid(_power(room / (weight * bound)), _power(room / weight), bound, clients, weight)


def _power(largest: float) -> float:
    """The largest power of two up to a number, within reason."""
    return min(2.0 ** math.floor(math.log2(largest)), _FINEST)


def quantise(values: Any, weights: Any, on: Grid) -> Any:
    """Messages as integers.

    Args:
      values: f32 [C, P], finite.
      weights: f32 [C], not negative.
      on: the grid.

    Returns:
      uint32 [C, P + 2] of the same kind of array (NumPy or JAX).
    """
    xp = _namespace(values)
    cut = xp.clip(values, -on.bound, on.bound)
    outside = xp.sum(xp.abs(values) > on.bound, axis=1, keepdims=True, dtype=xp.int32)
    factor = weights[:, None] * xp.float32(on.scale)
    numbers = xp.rint(cut * factor).astype(xp.int32)
    whole = xp.rint(weights[:, None] * xp.float32(on.weight_scale)).astype(xp.int32)
    return xp.concatenate([numbers, whole, outside], axis=1).astype(xp.uint32)


def total(vectors: Any) -> Any:
    """[C, P] -> [P]: the sum modulo 2^32 of unsigned integers, exact whatever the order, on the host or on a device."""
    xp = _namespace(vectors)
    return xp.sum(vectors, axis=0, dtype=xp.uint32)


class Read(NamedTuple):
    """What a sum says: f32 [P] weighted sums of the messages, the total weight, and how many numbers were cut."""

    values: np.ndarray
    weight: float
    cut: int


def read(summed: np.ndarray, on: Grid) -> Read:
    """The weighted sum of the messages.

    Args:
      summed: uint32 [P + 2], on the host.
      on: the grid.
    """
    lifted = centred(summed, 32)
    values = (lifted[:-EXTRA] / on.scale).astype(np.float32)
    return Read(values, float(lifted[-2] / on.weight_scale), int(summed[-1]))


def centred(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers modulo 2^bits as int64 in [-2^(bits - 1), 2^(bits - 1))."""
    half = 1 << (bits - 1)
    return ((values.astype(np.int64) + half) & ((1 << bits) - 1)) - half


def error_bound(on: Grid, clients: int, weight: float, largest: float | None = None) -> float:
    """How far a number of the weighted mean can be from that of the (cut) messages in exact arithmetic.

    Every client's rounding adds a half of a step, and its product in f32 a part in 2^24 of itself; reading the sum as
    f32 adds another part. What a weight loses on its own grid (nothing, for whole numbers) counts alike.

    Args:
      on: the grid.
      clients: in the sum.
      weight: that their weights add up to, above zero.
      largest: absolute value of any number; ``None``: the grid's bound.
    """
    largest = on.bound if largest is None else min(largest, on.bound)
    rounding = clients / (2 * on.scale * weight)
    weights = clients * largest / (2 * on.weight_scale * weight)
    return rounding + weights + 4 * largest * 2**-24


def _namespace(array: Any) -> Any:
    """NumPy or jax.numpy, as the array is one of theirs."""
    return jnp if isinstance(array, jax.Array) else np
