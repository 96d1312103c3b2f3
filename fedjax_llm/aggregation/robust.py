"""What the rules that resist malicious clients share: who is there, ordered coordinates, and the step.

They see every client's delta. A client of weight zero is absent, and so is one whose delta is not finite, which no
honest client sends: one NaN must not decide the round. Absent clients keep their places in the stack, so that shapes
are static, and are masked: they sort last, as infinity, and count nowhere.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.aggregation.server_optimizer import moved
from fedjax_llm.errors import UserError
from fedjax_llm.types import Aggregation, PyTree, Stack


def from_rule(rule: Callable[[PyTree, Array], PyTree]) -> Aggregation:
    """An aggregation without state that adds to the adapters what a rule makes of the deltas.

    Args:
      rule: ``rule(deltas, weights) -> delta`` of f32 leaves [C, ...] and weights [C]. Whoever is absent has weight zero
        and a delta of zeros. What it gives where everybody is absent, be it NaN, is not used.
    """

    def update(view: Stack, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
        weights = jnp.where(trees.finite(view.messages), view.weights, 0.0)
        deltas = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), view.messages)
        deltas = trees.select(weights > 0, deltas, trees.zeros(deltas))
        anyone = jnp.any(weights > 0)
        after = moved(adapters, rule(deltas, weights))
        return jax.tree.map(lambda new, old: jnp.where(anyone, new, old), after, adapters), state

    return Aggregation(init=lambda adapters: (), update=update, view=Stack)


def of_clients(values: Array, leaf: Array) -> Array:
    """``values`` [C] with as many axes as ``leaf`` [C, ...]."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - 1))


def ascending(leaf: Array, present: Array) -> Array:
    """Each coordinate's values [C, ...] in ascending order, those of absent clients (present [C]) last, as infinity."""
    return jnp.sort(jnp.where(of_clients(present, leaf), leaf, jnp.inf), axis=0)


def middle(ordered: Array, count: Array) -> Array:
    """The median [...] of the first ``count`` of ascending values [C, ...]; if it is even, the mean of two."""
    return 0.5 * (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2])


def coordinate_median(deltas: PyTree, present: Array) -> PyTree:
    """Leaves [C, ...] -> [...]: the median of each coordinate over the clients that are there, bool [C]."""
    count = jnp.sum(present)
    return jax.tree.map(lambda leaf: middle(ascending(leaf, present), count), deltas)


def check_at_least(least: int, **values: int) -> None:
    """Refuses hyper-parameters that are too small, by name.

    Raises:
      UserError: naming the one that is.
    """
    for name, value in values.items():
        if value < least:
            raise UserError(f"aggregation.{name} is {value}; it must be at least {least}")


def check_cohort(cohort: int, needed: int, byzantine: int) -> None:
    """Refuses a cohort in which a rule cannot tolerate as many malicious clients; with none, any cohort will do.

    Raises:
      UserError: with the numbers.
    """
    if byzantine and cohort < needed:
        raise UserError(
            f"aggregation.byzantine is {byzantine}, which takes a cohort of at least {needed} clients, but it has "
            f"{cohort}; raise federation.cohort or lower aggregation.byzantine"
        )
