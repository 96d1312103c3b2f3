"""Clipping that knows its own sensitivity."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.errors import UserError
from fedjax_llm.types import PyTree


@dataclass(frozen=True)
class Clip:
    """A bound on the Euclidean norm of one unit's contribution.

    Attributes:
      norm: C, the bound over all adapters together: the sensitivity of a sum to adding or removing one unit.
      scope: ``flat``: one factor for the whole tree; ``layers``: each adapted module (a key of the adapters) is clipped
        on its own to C / sqrt(modules), so that the norm over all of them is at most C.
    """

    norm: float
    scope: Literal["flat", "layers"] = "flat"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not 0 < self.norm < float("inf"):
            raise UserError(f"the clip norm is {self.norm}; it must be positive and finite")


def factors(tree: PyTree, clip: Clip, norm: Array | float | None = None) -> PyTree:
    """What each unit's gradient is multiplied by.

    Args:
      tree: module -> leaves [U, ...], one entry a unit.
      clip: the bound.
      norm: in place of ``clip.norm`` where the norm changes over the rounds.

    Returns:
      module -> f32 [U], in [0, 1]; 0 for a unit whose contribution is not finite, which cannot be bounded otherwise.
    """
    bound = jnp.float32(clip.norm if norm is None else norm)
    if clip.scope == "flat":
        factor = _factor(trees.norms(tree), bound)
        return dict.fromkeys(tree, factor)
    share = bound / jnp.sqrt(jnp.float32(len(tree)))
    finite = jnp.isfinite(trees.norms(tree))
    return {name: jnp.where(finite, _factor(trees.norms(part), share), 0.0) for name, part in tree.items()}


def clip_units(tree: PyTree, clip: Clip, norm: Array | float | None = None) -> PyTree:
    """Leaves [U, ...] in f32, every unit's contribution within the bound.

    Args:
      tree: module -> leaves [U, ...].
      clip: the bound.
      norm: in place of ``clip.norm``.

    Examples:
      >>> gradients = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}  # of two units, with norms 5 and 0.5
      >>> print(clip_units(gradients, Clip(norm=1.0))["w"].round(3))
      [[0.6 0.8]
       [0.3 0.4]]
    """
    scale = factors(tree, clip, norm)

    def bounded(factor: Array, leaf: Array) -> Array:
        wide = factor.reshape(factor.shape + (1,) * (leaf.ndim - 1))
        return jnp.where(wide > 0, leaf.astype(jnp.float32) * wide, 0.0)

    return {name: jax.tree.map(lambda leaf, f=scale[name]: bounded(f, leaf), part) for name, part in tree.items()}


def _factor(norms: Array, bound: Array) -> Array:
    """min(1, C / norm) [U], and 0 where the norm is not finite.

    Rounding in f32 leaves norms up to 2e-7 of C beside C, so what is clipped is clipped to a little less.
    """
    shrunk = jnp.where(norms > bound, bound * (1 - 2.0**-21) / jnp.maximum(norms, bound), 1.0)
    return jnp.where(jnp.isfinite(norms), shrunk, 0.0)
