"""Encoded messages as bytes, in plain NumPy: what proves that a codec's output fits into the bytes that it counts."""

import numpy as np


def quantised_bytes(decoded: np.ndarray, given: np.ndarray, bits: int, block: int) -> bytes:
    """Scales (f32, of what was given), then all codes as one string of bits."""
    levels, scales, codes = 2 ** (bits - 1) - 1, [], []
    for first in range(0, given.size, block):
        scale = np.abs(given[first : first + block]).max()
        place = decoded[first : first + block].astype(np.float64) * levels / (scale or 1.0)
        code = np.round(place)
        assert np.abs(place - code).max() < 1e-3  # it is one of the levels
        assert np.abs(code).max() <= levels
        scales.append(scale)
        codes.append((code + levels).astype(np.uint8))
    string = np.unpackbits(np.concatenate(codes)[:, None], axis=1)[:, 8 - bits :]
    return np.array(scales, "<f4").tobytes() + np.packbits(string.ravel()).tobytes()


def quantised_values(data: bytes, size: int, bits: int, block: int) -> np.ndarray:
    """What a server makes of them that knows the size of the message."""
    levels, blocks = 2 ** (bits - 1) - 1, -(-size // block)
    scales = np.repeat(np.frombuffer(data[: 4 * blocks], "<f4"), block)[:size]
    string = np.unpackbits(np.frombuffer(data[4 * blocks :], np.uint8))[: size * bits].reshape(size, bits)
    codes = (string @ (1 << np.arange(bits)[::-1]) - levels).astype(np.float32)
    return np.clip(codes * (scales * np.float32(1 / levels)), -scales, scales)


def bfloat16_bytes(decoded: np.ndarray) -> bytes:
    """The upper halves."""
    words = decoded.astype("<f4").view("<u4")
    assert not (words & 0xFFFF).any()
    return (words >> 16).astype("<u2").tobytes()


def bfloat16_values(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def index_bytes(index: np.ndarray, width: int) -> bytes:
    """Indices in ``width`` bytes each."""
    return index.astype("<u4")[:, None].view(np.uint8)[:, :width].tobytes()


def indices(data: bytes, width: int) -> np.ndarray:
    whole = np.zeros((len(data) // width, 4), np.uint8)
    whole[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return whole.view("<u4").ravel()


def largest(vector: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest magnitudes, falling; the first of equal ones first."""
    return np.argsort(-np.abs(vector), kind="stable")[:count]
