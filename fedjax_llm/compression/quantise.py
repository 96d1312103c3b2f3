"""Stochastic uniform quantisation (QSGD, Alistarh et al. 2017, arXiv 1610.02132, section 3.1).

A value x of a block is coded as one of the levels -s..s on a linear grid of step M / s, where s = 2^(bits - 1) - 1: the
one below or above x at random, so that the mean is x. The mean squared error of a block of n values is at most
n M^2 / (4 s^2), and at most sqrt(n) / s times its squared norm.

Differences from section 3.1 of the paper: M is the largest magnitude of a block instead of the Euclidean norm of all
values (a finer grid, for which the second bound still holds), and codes take a fixed number of bits instead of Elias
codes, so that the size does not depend on the data.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.vector import check_whole, unbiased


@dataclass(frozen=True)
class Quantise:
    """Few bits a value, unbiased. On the wire: an f32 a block, and all codes as one string of bits.

    Attributes:
      bits: of a code, 2 to 8.
      block: values that share a scale, counted through the whole message; the last block may be shorter.
    """

    bits: int = 8
    block: int = 1024

    def make(self) -> Codec:
        """The compression as pure functions.

        Raises:
          UserError: an impossible value.
        """
        check_whole("bits", self.bits, 2, 8)
        check_whole("block", self.block, 1)
        levels = 2 ** (self.bits - 1) - 1

        def code(key: Array, vector: Array) -> Array:
            return _quantised(key, vector, levels, self.block)

        return unbiased(code, lambda count: -(-count * self.bits // 8) + 4 * -(-count // self.block))


def _quantised(key: Array, vector: Array, levels: int, block: int) -> Array:
    """A vector as it is decoded."""
    width = min(block, vector.size)
    rows = jnp.pad(vector, (0, -vector.size % width)).reshape(-1, width)
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    # Below the smallest normal number a device may take the scale for zero, and would divide by it.
    scale = jnp.where(largest >= jnp.finfo(jnp.float32).tiny, largest, 0.0)
    place = jnp.clip(rows / jnp.where(scale > 0, scale, 1.0), -1.0, 1.0) * levels
    below = jnp.floor(place)
    # The uniform number is compared with the exact remainder: added to the place, it would be rounded.
    code = below + (jax.random.uniform(key, rows.shape) < place - below)
    decoded = jnp.clip(code * (scale * jnp.float32(1 / levels)), -scale, scale)
    return decoded.ravel()[: vector.size]
