"""The formulas of a transformer layer, one head and one position at a time, in float64 numpy."""

from collections.abc import Callable

import numpy as np


def normed(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Over the last axis to a mean square of one, times a weight."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * weight


def rotated(head: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """A head [hd] turned as pairs of numbers: each frequency turns one complex number."""
    half = len(frequencies)
    turned = (head[:half] + 1j * head[half : 2 * half]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag, head[2 * half :]])


def attended(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, window: int | None, cap: float | None
) -> np.ndarray:
    """Causal attention of heads [L, H, hd] over [L, KV, hd], as [L, H * hd]."""
    length, heads, _ = query.shape
    found = np.zeros_like(query)
    for at in range(length):
        first = 0 if window is None else max(0, at - window + 1)
        for head in range(heads):
            own = head // (heads // key.shape[1])
            scores = key[first : at + 1, own] @ query[at, head] * scale
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            found[at, head] = weights / weights.sum() @ value[first : at + 1, own]
    return found.reshape(length, -1)


def gelu(x: np.ndarray) -> np.ndarray:
    """By tanh (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gated(x: np.ndarray, mlp: dict, activation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Of the three matrices of an MLP."""
    gate, up, down = (np.asarray(mlp[f"{name}_proj"]["kernel"], np.float64) for name in ("gate", "up", "down"))
    return (activation(x @ gate) * (x @ up)) @ down
