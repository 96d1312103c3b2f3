"""The largest values alone, with a memory of the others (Stich et al. 2018, arXiv 1809.07599, Algorithm 1, top-k).

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2): what was not sent is added
to the next message, so that everything is sent in the end. With coded values it is the composition of Basu et al. 2019
(Qsparse-local-SGD, arXiv 1906.02367): the memory then holds the error of the coding too.

Difference from the papers: their memory is of gradients times the learning rate, of every step; here it is of a
client's message of a round, and moves on only in rounds in which the client takes part.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.vector import codec_of_values, coded, exact_bytes, flat, length, replaced
from fedjax_llm.errors import UserError
from fedjax_llm.types import PyTree


@dataclass(frozen=True)
class TopK:
    """The k values of largest magnitude of the whole message. On the wire: k indices, and k values.

    An index takes the fewest whole bytes that tell all places of the message apart.

    Attributes:
      share: of the message's values that are sent, in (0, 1]: k = ceil(share * n).
      error_feedback: whether a client remembers what it did not send, and adds it to its next message.
      values: how the k values are coded, in the order of their magnitudes: a compression that is unbiased, such as
        ``Quantise(8)``; ``None``: as f32.
    """

    share: float = 0.01
    error_feedback: bool = True
    values: Any = None

    def make(self) -> Codec:
        """The compression as pure functions.

        Raises:
          UserError: an impossible value.
        """
        if not 0 < self.share <= 1:
            raise UserError(f"compression.share is {self.share}; it must be above 0 and at most 1")
        inner, inner_bytes = (None, None) if self.values is None else codec_of_values(self.values)

        def init(message: PyTree) -> PyTree:
            if not self.error_feedback:
                return ()
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape if coded(leaf) else (), jnp.float32), message)

        @jax.jit
        def largest_of(key: Array, vector: Array) -> Array:
            _, index = jax.lax.top_k(jnp.abs(vector), self._kept(vector.size))
            kept = vector[index] if inner is None else inner(key, vector[index])
            return jnp.zeros_like(vector).at[index].set(kept)

        def code(key: Array, message: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
            if not length(message):
                return message, memory
            wanted = flat(message)
            if self.error_feedback:
                largest = jnp.finfo(jnp.float32).max
                wanted = jnp.clip(wanted + flat(memory), -largest, largest)
            sent = replaced(message, largest_of(key, wanted))
            return sent, replaced(memory, wanted - flat(sent)) if self.error_feedback else memory

        def nbytes(message: PyTree) -> int:
            count = length(message)
            if not count:
                return exact_bytes(message)
            kept = self._kept(count)
            values = 4 * kept if inner_bytes is None else inner_bytes(kept)
            return kept * _index_bytes(count) + values + exact_bytes(message)

        return Codec(init=init, code=code, nbytes=nbytes, unbiased=False)

    def _kept(self, count: int) -> int:
        """How many of ``count`` values are sent. The share is taken as it is written: 0.07 of 100 are 7."""
        return math.ceil(Fraction(str(self.share)) * count)


def _index_bytes(count: int) -> int:
    """The fewest whole bytes that tell ``count`` places apart."""
    return max(1, -(-(count - 1).bit_length() // 8))
