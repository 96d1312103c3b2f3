"""Count sketches of messages (Charikar et al. 2002; FetchSGD, Rothchild et al. 2020, arXiv 2007.07682).

Each row adds every value, times a random sign, to one of its columns at random. A row's estimate of a value is that
column times the sign: the value itself plus those that fell into the same column, with random signs. Its variance is
(|x|^2 - x_i^2) / columns (Larsen et al. 2021, arXiv 2102.02193). The median over the rows is robust to collisions with
large values. As signs are drawn independently, a row's error is symmetric about zero, and the rows are independent
(Pagh and Thorup 2022, arXiv 2205.08397); so the median of any number of rows, with the mean of the middle two where
that is even, has a symmetric error too, and is unbiased.

Differences from FetchSGD: every client draws its own hash functions, whose seed it sends, and the server decodes each
sketch by itself, where FetchSGD sums sketches with common hash functions, keeps momentum and errors as sketches and
takes the largest values of the estimate. A message without large values is drowned by the collisions: the error of a
row is n / columns times the message in the mean square.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.vector import LARGEST, SEED_BYTES, check_whole, unbiased


@dataclass(frozen=True)
class CountSketch:
    """A table of fixed size for the whole message, unbiased. On the wire: the table in f32, and the seed.

    Attributes:
      rows: independent estimates, of which the median is taken.
      columns: of each row.
    """

    rows: int = 5
    columns: int = 65536

    def make(self) -> Codec:
        """The compression as pure functions.

        Raises:
          UserError: an impossible value.
        """
        check_whole("rows", self.rows, 1)
        check_whole("columns", self.columns, 1, 2**31 - 1)

        def code(key: Array, vector: Array) -> Array:
            bounded = jnp.clip(vector, -LARGEST, LARGEST)
            # Row by row: the hash functions of all rows at once would take several times the message's memory.
            return _median(
                jax.lax.map(lambda own: _estimate(own, bounded, self.columns), jax.random.split(key, self.rows))
            )

        return unbiased(code, lambda count: 4 * self.rows * self.columns + SEED_BYTES)


def _estimate(key: Array, values: Array, columns: int) -> Array:
    """One row's estimate of values [n]."""
    of_signs, of_columns = jax.random.split(key)
    signs = jax.random.rademacher(of_signs, values.shape, jnp.float32)
    place = jax.random.randint(of_columns, values.shape, 0, columns)
    return signs * jnp.zeros(columns).at[place].add(signs * values)[place]


def _median(rows: Array) -> Array:
    """[rows, n] -> [n]."""
    ordered, middle = jnp.sort(rows, axis=0), rows.shape[0] // 2
    return ordered[middle] if rows.shape[0] % 2 else 0.5 * ordered[middle - 1] + 0.5 * ordered[middle]
