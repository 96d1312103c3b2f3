"""A site's message as integers with its share of the noise, and back: rotate, scale, round, blur, reduce.

Distributed differential privacy after Kairouz, Liu & Steinke 2021 (arXiv 2102.06387, algorithm 1). The rotation is D
(random signs, the same for all sites of a round) and an orthonormal Walsh-Hadamard transform: it spreads the norm of a
message evenly over its numbers, so that they fit a small modulus. The message is padded to a power of two for it, by
zeros, which costs up to twice the integers. All of it is float64 on the host: a norm that privacy rests on is computed
from the integers themselves, exactly.

What changes in the integers when one unit comes or goes (``Shares.bound``):

- ``conditional``: the message itself is the unit. It is rounded at random, without bias, again and again until its norm
  is within the bound; that happens in the first try about half of the time or more.
- otherwise the message is a sum over units, rounded to the nearest integers. Two real numbers that differ by g are
  rounded to integers that differ by less than |g| + 1, so vectors of d numbers that differ by at most c s in norm are
  rounded to integers that differ by less than c s + sqrt(d).
"""

import math

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.discrete_noise import uniforms, words
from fedjax_llm.privacy.mechanism import Shares
from fedjax_llm.privacy.shares import encoded_length
from fedjax_llm.secure.ring import centred

__all__ = ["decode", "encode", "encoded_length", "rotate"]

_MOST_TRIES = 1000
_CLIPPED = 1 + 1e-5
"""A norm of float32 that was clipped to 1 may be that much."""


def encode(
    vector: np.ndarray, shares: Shares, *, noise_key: bytes, rounding_key: bytes, rotation_key: bytes
) -> np.ndarray:
    """A message as integers modulo 2^bits, with noise.

    Args:
      vector: float [d].
      shares: how.
      noise_key: 32 bytes that only this site knows, for its share of the noise.
      rounding_key: 32 more, for rounding.
      rotation_key: 32 bytes that all sites of the round have in common.

    Returns:
      uint16 or uint32 [D], D from :func:`encoded_length`.

    Raises:
      UserError: the message is not finite; or longer than the clip norm where it is the unit, so that no rounding can
        be within the bound.
    """
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not math.isfinite(norm):
        raise UserError("a message holds numbers that are not finite; it was not clipped")
    if shares.conditional and shares.clip_norm < norm <= shares.clip_norm * _CLIPPED:
        vector = vector.astype(np.float64) * (shares.clip_norm / norm)
    rotated = rotate(vector, rotation_key) * shares.scale
    whole = _conditionally(rotated, shares, rounding_key) if shares.conditional else np.rint(rotated).astype(np.int64)
    return _reduced(whole + shares.draw(noise_key, whole.size), shares.bits)


def decode(total: np.ndarray, shares: Shares, *, rotation_key: bytes, values: int) -> np.ndarray:
    """The sum of the messages, with the sum of the noise.

    Args:
      total: uint [D], the sum modulo 2^bits.
      shares: how the messages were encoded.
      rotation_key: of the round.
      values: d.

    Returns:
      f32 [d].
    """
    back = _hadamard(centred(total, shares.bits) / shares.scale) * _signs(rotation_key, total.size)
    return back[:values].astype(np.float32)


def rotate(vector: np.ndarray, rotation_key: bytes) -> np.ndarray:
    """Float [d] -> f64 [D] of the same norm, spread evenly."""
    padded = np.zeros(encoded_length(vector.size))
    padded[: vector.size] = vector
    return _hadamard(padded * _signs(rotation_key, padded.size))


def _conditionally(rotated: np.ndarray, shares: Shares, key: bytes) -> np.ndarray:
    """Rounded at random without bias, until the integers' norm is within the bound: int64 [D]."""
    next_words, below = words(key), np.floor(rotated)
    for _ in range(_MOST_TRIES):
        found = (below + (uniforms(next_words(rotated.size)) < rotated - below)).astype(np.int64)
        # Exact: squares of integers of at most 31 bits, in Python's own integers where a sum could pass 63 bits.
        if float(np.abs(found).max(initial=0)) ** 2 * found.size < 2.0**62:
            squared = int(np.dot(found, found))
        else:
            squared = sum(int(number) ** 2 for number in found)
        if squared <= shares.bound**2:
            return found
    raise UserError(
        f"a message of norm {np.linalg.norm(rotated) / shares.scale:.6g} cannot be rounded to integers of norm "
        f"{shares.bound:.6g}, which was agreed for the clip norm {shares.clip_norm:g}: it was not clipped to that"
    )


def _reduced(whole: np.ndarray, bits: int) -> np.ndarray:
    """int64 modulo 2^bits, as the smallest of uint16 and uint32 that holds it."""
    return (whole & ((1 << bits) - 1)).astype("<u2" if bits <= 16 else "<u4")


def _signs(key: bytes, size: int) -> np.ndarray:
    """Random signs, f64 [size]."""
    bits = np.unpackbits(words(key)(-(-size // 64)).view(np.uint8), count=size)
    return 1.0 - 2.0 * bits


def _hadamard(vector: np.ndarray) -> np.ndarray:
    """The orthonormal Walsh-Hadamard transform, which is its own inverse: f64 [D]."""
    size, half = vector.size, 1
    while half < size:
        pairs = vector.reshape(-1, 2, half)
        vector = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).ravel()
        half *= 2
    return vector / math.sqrt(size)
