"""A message as one vector, which is what compressions code, and checks of their parameters.

The vector holds all arrays of floating-point numbers, one after another, in f32. All else travels exactly and counts in
its own type: integers, and scalars, such as a client's number of steps, which an algorithm divides by.

A message may have hundreds of leaves. What works on the vector is compiled; the leaves are cut out of it one by one, by
a function that is compiled once a shape, since one program with hundreds of outputs would take long to compile.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.errors import UserError
from fedjax_llm.types import PyTree

SEED_BYTES = 8
"""What the key of a random rotation or of hash functions takes: the two words of a Threefry key."""
LARGEST = 1e30
"""Sums of up to 1e8 values of this size stay finite in f32; larger ones are cut before they are summed."""


def coded(leaf: Any) -> bool:
    """Whether a leaf (an array, or its shape and type) is part of the vector."""
    return leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def length(message: PyTree) -> int:
    """How many values the vector holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(message) if coded(leaf))


def exact_bytes(message: PyTree) -> int:
    """Bytes of what travels as it is."""
    rest = [leaf for leaf in jax.tree.leaves(message) if not coded(leaf)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in rest)


def flat(message: PyTree) -> Array:
    """The vector, f32 [n], of a message with at least one array."""
    return jnp.concatenate([leaf.ravel().astype(jnp.float32) for leaf in jax.tree.leaves(message) if coded(leaf)])


def replaced(message: PyTree, vector: Array) -> PyTree:
    """The message with another vector; every leaf keeps its shape and type."""
    leaves, structure = jax.tree.flatten(message)
    found, first = [], 0
    for leaf in leaves:
        if coded(leaf):
            found.append(_piece(vector, first, leaf.shape, leaf.dtype))
            first += leaf.size
        else:
            found.append(leaf)
    return structure.unflatten(found)


@partial(jax.jit, static_argnums=(2, 3))
def _piece(vector: Array, first: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """One leaf, from place ``first`` on."""
    return jax.lax.dynamic_slice_in_dim(vector, first, math.prod(shape)).reshape(shape).astype(dtype)


def unbiased(code: Callable[[Array, Array], Array], nbytes: Callable[[int], int]) -> Codec:
    """A codec without bias and without memory.

    Args:
      code: ``code(key, vector [n]) -> vector [n]``, for n > 0.
      nbytes: ``nbytes(n)``: of the encoded vector.
    """
    compiled = jax.jit(code)

    def whole(key: Array, message: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        return (replaced(message, compiled(key, flat(message))) if length(message) else message), memory

    def count(message: PyTree) -> int:
        size = length(message)
        return (nbytes(size) if size else 0) + exact_bytes(message)

    return Codec(init=lambda message: (), code=whole, nbytes=count, unbiased=True)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuses what is no whole number, or out of bounds.

    Raises:
      UserError: naming ``compression.<name>``.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"compression.{name} is {value!r}; it must be a whole number {bounds}")


def codec_of_values(values: Any) -> tuple[Callable[[Array, Array], Array], Callable[[int], int]]:
    """The compression that another one applies to the values that it sends.

    Args:
      values: a compression that is unbiased, and so keeps no memory.

    Returns:
      ``code`` and ``nbytes`` as for :func:`unbiased`.

    Raises:
      UserError: it is none, it is biased, or its own parameters are impossible (``compression.values.<field>``).
    """
    if not hasattr(values, "make"):
        raise UserError(f"compression.values is {values!r}; it must be a compression, such as Quantise(8)")
    try:
        codec = values.make()
    except UserError as error:
        raise UserError(str(error).replace("compression.", "compression.values.", 1)) from error
    if not codec.unbiased:
        raise UserError(
            f"compression.values is {values!r}, which is biased; the values within another compression must be coded "
            "without bias and without memory: choose Quantise, Bfloat16 or Rotated"
        )
    return (
        lambda key, vector: codec.code(key, vector, ())[0],
        lambda count: codec.nbytes(jax.ShapeDtypeStruct((count,), jnp.float32)),
    )
