"""Integer noise from a cryptographic stream: discrete Gaussian and Skellam, vectorised.

The stream is AES-256 in counter mode; the same key gives the same noise, so a key is used for one draw and never made
of a clock. Uniforms have 53 bits, and acceptance is decided in float64: probabilities are right to about 1e-10 of
themselves, and values of probability below 2^-53 never come. Neither leaks more than that would be added to delta.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
LARGEST_STDDEV = 2.0**20
"""Of a share: the samplers' floats are exact enough up to here."""
_SMALL_MEAN = 30.0
_STEP = 2.0**-53


def words(key: bytes) -> Callable[[int], np.ndarray]:
    """A stream of independent random 64-bit words: each call gives the next so many, as uint64 [count].

    Args:
      key: 32 bytes, used for nothing else.

    Raises:
      ValueError: a key of another length.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return lambda count: np.frombuffer(stream.update(bytes(8 * count)), "<u8")


def uniforms(drawn: np.ndarray) -> np.ndarray:
    """Words as numbers in (0, 1), multiples of 2^-53 and a half of that: f64, of the same shape."""
    return ((drawn >> np.uint64(11)).astype(np.float64) + 0.5) * _STEP


def discrete_gaussian(key: bytes, stddev: float, size: int) -> np.ndarray:
    """Integers x with probability in proportion to exp(-x^2 / (2 stddev^2)).

    By rejection from the discrete Laplace distribution (Canonne, Kamath & Steinke 2020, arXiv 2004.00010, algorithm 3),
    with float64 in place of the paper's exact Bernoulli draws. About 1.3 candidates a value are drawn.

    Args:
      key: 32 bytes, used for nothing else.
      stddev: sigma, at most 2^20.
      size: how many.

    Returns:
      int64 [size].

    Raises:
      ValueError: an impossible value.
    """
    _check(stddev, size)
    width = np.floor(stddev) + 1

    def candidates(next_words: Callable[[int], np.ndarray], count: int) -> np.ndarray:
        magnitude, acceptance = next_words(count), next_words(count)
        far = np.floor(-width * np.log(uniforms(magnitude)))
        negative = (magnitude & np.uint64(1)).astype(bool)  # a bit that the uniform does not use
        kept = uniforms(acceptance) < np.exp(-((far - stddev**2 / width) ** 2) / (2 * stddev**2))
        kept &= ~(negative & (far == 0))  # zero has one sign
        return np.where(negative, -far, far)[kept].astype(np.int64)

    return _until(key, size, candidates)


def skellam(key: bytes, variance: float, size: int) -> np.ndarray:
    """Differences of two Poisson variables of mean ``variance / 2``.

    Args:
      key: 32 bytes, used for nothing else.
      variance: at most 2^40.
      size: how many.

    Returns:
      int64 [size].

    Raises:
      ValueError: an impossible value.
    """
    _check(variance**0.5 if variance > 0 else variance, size)
    both = _poisson(key, variance / 2, 2 * size)
    return both[:size] - both[size:]


def _poisson(key: bytes, mean: float, size: int) -> np.ndarray:
    """int64 [size] of Poisson variables."""
    if mean < _SMALL_MEAN:
        return np.searchsorted(_poisson_table(mean), uniforms(words(key)(size)), side="right").astype(np.int64)
    return _until(key, size, lambda next_words, count: _transformed_rejection(next_words, count, mean))


@lru_cache(maxsize=8)
def _poisson_table(mean: float) -> np.ndarray:
    """Cumulative probabilities of 0, 1, ... as far as 53 bits can tell them from 1."""
    counts = np.arange(1, int(mean + 12 * mean**0.5 + 30))
    steps = np.concatenate([[-mean], np.log(mean) - np.log(counts)])
    return np.cumsum(np.exp(np.cumsum(steps)))


def _transformed_rejection(next_words: Callable[[int], np.ndarray], count: int, mean: float) -> np.ndarray:
    """Those of ``count`` candidates that are accepted: PTRS of Hörmann 1993 (Insurance: Math. & Econ. 12, p. 43)."""
    b = 0.931 + 2.53 * mean**0.5
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    u, v = uniforms(next_words(count)) - 0.5, uniforms(next_words(count))
    us = 0.5 - np.abs(u)
    found = np.floor((2 * a / us + b) * u + mean + 0.43)
    accepted = (us >= 0.07) & (v <= 0.9277 - 3.6224 / (b - 2))
    unsure = np.flatnonzero(~accepted & (found >= 0) & ~((us < 0.013) & (v > us)))
    density = np.log(v[unsure] * inverse_alpha / (a / us[unsure] ** 2 + b))
    accepted[unsure] = density <= log_poisson(found[unsure], mean)
    return found[accepted].astype(np.int64)


def log_poisson(counts: np.ndarray, mean: float) -> np.ndarray:
    """The logarithm of a Poisson probability, without the cancellation of ``lgamma`` at large means.

    With k = mean (1 + x) and Stirling's series it is mean (x - (1 + x) log1p(x)) - log(2 pi k) / 2 - 1 / (12 k) + ...,
    right to 1e-9 for means up to 2^40 and counts within some standard deviations.

    Args:
      counts: f64 [...], whole numbers, at least 0.
      mean: lambda.
    """
    k = np.maximum(counts, 1.0)
    x = (k - mean) / mean
    series = 1 / (12 * k) - 1 / (360 * k**3) + 1 / (1260 * k**5)
    return np.where(
        counts < 1, -mean, mean * (x - (1 + x) * np.log1p(x)) - np.log(2 * np.pi * k) / 2 - series
    )  # fmt: skip


def _until(key: bytes, size: int, candidates: Callable[[Callable[[int], np.ndarray], int], np.ndarray]) -> np.ndarray:
    """The first ``size`` accepted values; the stream goes on while some are missing."""
    next_words, found, have = words(key), [], 0
    while have < size:
        found.append(candidates(next_words, int(1.4 * (size - have)) + 64))
        have += len(found[-1])
    return np.concatenate(found)[:size] if found else np.zeros(0, np.int64)


def _check(stddev: float, size: int) -> None:
    """Refuses what the samplers are not made for."""
    if not 0 < stddev <= LARGEST_STDDEV:
        raise ValueError(f"the standard deviation is {stddev}; it must be positive and at most {LARGEST_STDDEV:g}")
    if size < 0:
        raise ValueError(f"the size is {size}; it must not be negative")
