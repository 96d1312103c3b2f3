"""Pytree arithmetic over a leading client axis, which optax and jax do not have.

What rounds call outside of compiled programs is compiled here: one call for a tree, not one for each of its leaves.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.types import PyTree


def take(tree: PyTree, index: Array) -> PyTree:
    """Leaves [C, ...] -> [M, ...]: entry ``index[m]`` of each."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def put(tree: PyTree, index: Array, part: PyTree) -> PyTree:
    """``tree`` [N, ...] with entries ``index`` [C] replaced by those of ``part`` [C, ...]; indices >= N are dropped."""
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new, mode="drop"), tree, part)


@partial(jax.jit, static_argnums=1, inline=True)
def repeat(tree: PyTree, count: int) -> PyTree:
    """Leaves [...] -> [count, ...], all equal."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)


def segment_sum(tree: PyTree, segment: Array, count: int) -> PyTree:
    """Leaves [M, ...] -> [count, ...]: sums the entries of each segment."""
    return jax.tree.map(lambda leaf: jax.ops.segment_sum(leaf, segment, count), tree)


@partial(jax.jit, inline=True)
def zeros(tree: PyTree) -> PyTree:
    """Zeros with the shapes of ``tree`` in f32, the type of sums and noise."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)


@partial(jax.jit, inline=True)
def select(mask: Array, yes: PyTree, no: PyTree) -> PyTree:
    """Per client (mask [C]): the leaves of ``yes`` or of ``no``, never mixed arithmetically, so NaN does not spread."""

    def pick(one: Array, other: Array) -> Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (one.ndim - 1)), one, other)

    return jax.tree.map(pick, yes, no)


@partial(jax.jit, inline=True)
def weighted_sum(weights: Array, tree: PyTree) -> PyTree:
    """Leaves [C, ...] -> [...]: the sum of ``weights[c]`` times entry c, in f32.

    Examples:
      >>> print(weighted_sum(jnp.array([1.0, 3.0]), {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])})["w"])
      [1. 3.]
    """
    # In full f32 on every device: half the bits would round a sum of many clipped updates by more than one of them.
    exact = jax.lax.Precision.HIGHEST
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf.astype(jnp.float32), axes=1, precision=exact), tree)


def norms(tree: PyTree) -> Array:
    """[C]: the Euclidean norm of each client's entries over the whole tree, in f32."""
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(jnp.sum(jnp.stack(squares), axis=0))


def finite(tree: PyTree) -> Array | bool:
    """[C]: whether all of a client's entries are finite; of a tree without leaves, they are."""
    every: Array | bool = True
    for leaf in jax.tree.leaves(tree):
        every = every & jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    return every


def subtract(one: PyTree, other: PyTree) -> PyTree:
    """``one - other``, leaf by leaf, with broadcasting."""
    return jax.tree.map(jnp.subtract, one, other)
