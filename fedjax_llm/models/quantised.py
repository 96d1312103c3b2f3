"""Frozen matrices in 8 or 4 bits, beside adapters in full precision (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Along its inputs every column of a matrix [D, F] is cut into blocks. A block is stored as small integers and one f32
scale, its largest absolute value or a 127th of it. A matrix is dequantised where it is used, and again in the backward
pass, which is handed codes alone.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError

Quantise = Literal["none", "int8", "nf4"]

BLOCK = 64
"""Inputs that share a scale, as in the paper; fewer where they do not divide a matrix."""
_LEAST = 8
"""Below that, scales would take as much as what they scale."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of 4-bit NormalFloat, quantiles of a normal distribution (Dettmers et al. 2023, appendix E)."""


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("kind", "dtype"))
@dataclass(frozen=True)
class Quantised:
    """A matrix [D, F] of which only codes are kept. Its parts are cut over devices as the matrix itself would be.

    Attributes:
      codes: ``int8``: int8 [D, F]. ``nf4``: uint8 [D/2, F], in each byte a number of the first half of a block in the
        low bits, and of its second half in the high bits.
      scales: f32 [D/B, F], with blocks of B inputs.
      kind: how the codes are read.
      dtype: that the matrix is dequantised into.
    """

    codes: Array
    scales: Array
    kind: Literal["int8", "nf4"]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """(D, F), of the matrix."""
        return self.codes.shape[0] * (2 if self.kind == "nf4" else 1), self.codes.shape[1]

    @property
    def size(self) -> int:
        """How many numbers the matrix has."""
        return math.prod(self.shape)


def quantise(matrix: np.ndarray, kind: Literal["int8", "nf4"], dtype: str = "float32", name: str = "") -> Quantised:
    """The nearest codes of every block, computed in f32 on the host.

    ``int8`` is symmetric: integers from -127 to 127 times the block's largest absolute value / 127. ``nf4`` holds for
    each number which of sixteen levels is nearest, as a share of the block's largest absolute value.

    Args:
      matrix: [D, F].
      kind: of the codes.
      dtype: that the matrix is dequantised into.
      name: of the matrix, for errors.

    Raises:
      UserError: D is no multiple of 8, or a number is not finite.
    """
    inputs, outputs = matrix.shape
    block = math.gcd(inputs, BLOCK)
    if block < _LEAST:
        raise UserError(
            f"model.quantise is {kind!r}, but {name or 'a matrix'} has {inputs} inputs, no multiple of {_LEAST}; "
            "set model.quantise to 'none'"
        )
    blocks = np.asarray(matrix, np.float32).reshape(-1, block, outputs)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise UserError(f"{name or 'a matrix'} holds numbers that are not finite; download the model again")
    scales = largest / np.float32(127) if kind == "int8" else largest
    shares = blocks / np.where(scales > 0, scales, np.float32(1))
    if kind == "int8":
        codes = np.clip(np.rint(shares), -127, 127).astype(np.int8)
    else:
        levels = np.asarray(NF4, np.float32)
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, shares).astype(np.uint8)
        codes = nearest[:, : block // 2] | nearest[:, block // 2 :] << 4
    return Quantised(jnp.asarray(codes.reshape(-1, outputs)), jnp.asarray(scales[:, 0]), kind, dtype)


def dense(kernel: Array | Quantised) -> Array:
    """The matrix [D, F] that codes stand for; an array as it is."""
    if not isinstance(kernel, Quantised):
        return kernel
    count, outputs = kernel.scales.shape
    codes = kernel.codes.reshape(count, -1, outputs)
    if kernel.kind == "nf4":
        halves = jnp.concatenate([codes & 15, codes >> 4], axis=1)
        codes = jnp.asarray(NF4, jnp.float32).at[halves].get(mode="promise_in_bounds")
    wide = codes.astype(jnp.float32) * kernel.scales[:, None]
    return wide.reshape(kernel.shape).astype(kernel.dtype)


def product(x: Array, kernel: Array | Quantised) -> Array:
    """``x W``: [..., D] by [D, F]. Of codes the backward pass finds nothing but themselves."""
    return _dequantised_product(x, kernel) if isinstance(kernel, Quantised) else x @ kernel


@jax.checkpoint
def _dequantised_product(x: Array, kernel: Quantised) -> Array:
    """Dequantises again in the backward pass."""
    return x @ dense(kernel)


def is_quantised(leaf: object) -> bool:
    """For ``jax.tree`` functions that should see matrices, not their codes and scales."""
    return isinstance(leaf, Quantised)
