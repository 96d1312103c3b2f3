"""What the algorithms share: an optax transformation applied to the negative mean delta, means, and checks of values.

Reddi et al. 2021, "Adaptive federated optimization" (arXiv 2003.00295), Algorithm 2: the mean client delta is a
pseudo-gradient of the server.
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.errors import UserError
from fedjax_llm.types import Aggregation, PyTree, Sum


def from_optax(transform: optax.GradientTransformation) -> Aggregation:
    """An aggregation that steps ``transform`` with the negative mean delta.

    Args:
      transform: any optax optimiser.

    Examples:
      >>> algorithm, adapters = from_optax(optax.sgd(0.5)), {"w": jnp.zeros(2)}
      >>> view = Sum(total={"w": jnp.array([6.0, 3.0])}, weight=jnp.float32(3))
      >>> print(algorithm.update(view, algorithm.init(adapters), adapters)[0]["w"])
      [1.  0.5]
    """

    def update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
        present = view.weight > 0
        pseudo_gradient = jax.tree.map(lambda d, a: (-d).astype(a.dtype), mean(view), adapters)
        updates, stepped = transform.update(pseudo_gradient, state, adapters)
        moved = optax.apply_updates(adapters, updates)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(present, new, old)

        return jax.tree.map(keep, moved, adapters), jax.tree.map(keep, stepped, state)

    return Aggregation(init=transform.init, update=update, view=Sum)


def mean(view: Sum) -> PyTree:
    """The weighted mean of the clients' messages; zeros where no client took part.

    Examples:
      >>> print(mean(Sum(total={"w": jnp.array([6.0, 3.0])}, weight=jnp.float32(3)))["w"])
      [2. 1.]
    """
    present = view.weight > 0
    share = jnp.where(present, 1.0 / jnp.where(present, view.weight, 1.0), 0.0)
    return jax.tree.map(lambda leaf: share * leaf, view.total)


def moved(adapters: PyTree, step: PyTree, scale: jax.Array | float = 1.0) -> PyTree:
    """The adapters with ``scale`` times a step in f32 added, in the type that they have."""
    return jax.tree.map(lambda a, s: (a + scale * s).astype(a.dtype), adapters, step)


def check_positive(**values: float) -> None:
    """Refuses hyper-parameters that must be positive and finite, by name.

    Raises:
      UserError: naming the one that is not.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"aggregation.{name} is {value}; it must be positive and finite")


def check_share(**values: float) -> None:
    """Refuses hyper-parameters that must be in [0, 1), by name.

    Raises:
      UserError: naming the one that is not.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"aggregation.{name} is {value}; it must be in [0, 1)")


def check_portion(**values: float) -> None:
    """Refuses hyper-parameters that must be in (0, 1], by name.

    Raises:
      UserError: naming the one that is not.
    """
    for name, value in values.items():
        if not 0 < value <= 1:
            raise UserError(f"aggregation.{name} is {value}; it must be above 0 and at most 1")
