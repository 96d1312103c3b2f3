"""Stochastic rounding to bfloat16: two bytes a value, unbiased.

Gupta et al. 2015, "Deep learning with limited numerical precision" (arXiv 1502.02551), section 3.1, round to one of the
two nearest numbers with the probabilities that make the mean the value itself. A bfloat16 is the upper half of an f32,
so that is done here on the bits: a uniform 16-bit number is added to the lower half, which is then cut off.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.vector import unbiased


@dataclass(frozen=True)
class Bfloat16:
    """Half the bytes of f32; what a bfloat16 holds already stays as it is."""

    def make(self) -> Codec:
        """The compression as pure functions."""
        return unbiased(_rounded, lambda count: 2 * count)


def _rounded(key: Array, vector: Array) -> Array:
    """Values rounded at random to numbers of which the lower 16 bits are zero."""
    bits = jax.lax.bitcast_convert_type(vector, jnp.uint32)
    noise = jax.random.bits(key, vector.shape, jnp.uint16).astype(jnp.uint32)

    def upper_half(word: Array) -> Array:
        return jax.lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)

    rounded = upper_half(bits + noise)
    # Beyond the largest bfloat16 there is only infinity: such a value is rounded down.
    return jnp.where(jnp.isfinite(rounded), rounded, upper_half(bits))
