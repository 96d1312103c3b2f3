"""A random rotation around a quantiser (Suresh et al. 2017, arXiv 1611.00429, section 3).

The rotation H D (D random signs, H the orthonormal Walsh-Hadamard matrix) spreads the energy of a block of d values
evenly: a rotated value is a sum with random signs, so the largest square is at most (2 ln(2d) + 2) / d of the squared
norm in the mean. The mean squared error of :class:`~fedjax_llm.compression.quantise.Quantise` with s levels is then at
most (ln(2d) + 1) / (2 s^2) times the squared norm, where it can be sqrt(d) / s times without the rotation. The server
turns back what it decodes.

Differences from the paper: the vector is rotated in blocks, of which only the last is padded to a power of two (padding
the whole vector may cost twice the bytes); and every client draws its own rotation, whose seed it sends, instead of all
sharing one.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.vector import LARGEST, SEED_BYTES, check_whole, codec_of_values, unbiased
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class Rotated:
    """Rotates blocks of values before another compression codes them. On the wire: the seed, and what that one sends.

    Attributes:
      values: how the rotated values are coded: a compression that is unbiased.
      block: values that are rotated together, a power of two; best where the values' own blocks are as long.
    """

    values: Any = Quantise(4)
    block: int = 1024

    def make(self) -> Codec:
        """The compression as pure functions.

        Raises:
          UserError: an impossible value.
        """
        check_whole("block", self.block, 1)
        if self.block & (self.block - 1):
            raise UserError(f"compression.block is {self.block}; it must be a power of two, such as 1024")
        inner, inner_bytes = codec_of_values(self.values)

        def code(key: Array, vector: Array) -> Array:
            seed, own = jax.random.split(key)
            length = _padded(vector.size, self.block)
            signs = jax.random.rademacher(seed, (length,), jnp.float32)
            bounded = jnp.pad(jnp.clip(vector, -LARGEST, LARGEST), (0, length - vector.size))
            decoded = inner(own, _hadamard_blocks(signs * bounded, self.block))
            return (signs * _hadamard_blocks(decoded, self.block))[: vector.size]

        return unbiased(code, lambda count: SEED_BYTES + inner_bytes(_padded(count, self.block)))


def hadamard(values: Array) -> Array:
    """The orthonormal Walsh-Hadamard transform, its own inverse, in d log2(d) additions.

    Args:
      values: [..., d], d a power of two.

    Examples:
      >>> print(hadamard(jnp.array([1.0, 0.0, 0.0, 0.0])))
      [0.5 0.5 0.5 0.5]
    """
    leading, width, half = values.shape[:-1], values.shape[-1], 1
    out = values
    while half < width:
        pairs = out.reshape(*leading, width // (2 * half), 2, half)
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        out = jnp.stack([one + other, one - other], axis=-2).reshape(values.shape)
        half *= 2
    return out * jnp.float32(width**-0.5)


def _padded(count: int, block: int) -> int:
    """The length of ``count`` values in blocks of which the last is padded to a power of two."""
    rest = count % block
    return count - rest + (1 << (rest - 1).bit_length() if rest else 0)


def _hadamard_blocks(vector: Array, block: int) -> Array:
    """Every block of a padded vector transformed; the last may be shorter."""
    whole = vector.size - vector.size % block
    parts = [hadamard(vector[:whole].reshape(-1, block)).ravel()] if whole else []
    if whole < vector.size:
        parts.append(hadamard(vector[whole:]))
    return jnp.concatenate(parts)
