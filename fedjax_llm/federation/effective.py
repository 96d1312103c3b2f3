"""The effective weights: frozen weights, what an algorithm has moved into them, and the product of the factors.

Averaging two factors is not averaging their product (Sun et al. 2024, arXiv 2403.12313): how far apart the two are is
measured here, in every round.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import lora as low_rank
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.types import Adapters, Params, PyTree, RoundState


class Ideal(NamedTuple):
    """Weighted sum of the clients' products, module -> [in, out], and the total weight."""

    total: dict[str, Array]
    weight: Array


def params(plan: RoundPlan, base: Params, server_state: PyTree) -> Params:
    """The weights that the adapters come on top of."""
    change = moved(plan, server_state)
    return _add(base, change) if change else base


_add = jax.jit(low_rank.add)


def moved(plan: RoundPlan, server_state: PyTree) -> dict[str, Array]:
    """What has been added to the frozen weights, module -> [in, out], with all scalings in it."""
    residual, change = plan.aggregation.residual, dict(plan.offset)
    for path, products in ({} if residual is None else residual(server_state)).items():
        change[path] = change.get(path, 0.0) + plan.trainer.scaling * products
    return change


def measured(plan: RoundPlan, adapters: Adapters) -> bool:
    """Whether the error of averaging can be told.

    It cannot where clients keep factors of their own or begin at different times, nor for DoRA, whose weights are no
    sum of products. Where noise is added after local training, what the clients ended with is no release, and nothing
    that is computed from it may be shown.
    """
    released = plan.mechanism is None or plan.mechanism.noised == "steps"
    linear = not any("m" in factors for factors in adapters.values())
    federated = plan.setting == "federated" and plan.aggregation.personal is None
    federated = federated and plan.federation.asynchronous is None  # the clients did not begin together
    return plan.measure_error and federated and released and linear


def nothing(plan: RoundPlan, adapters: Adapters) -> Ideal | None:
    """Before any client."""
    return Ideal({}, jnp.float32(0)) if measured(plan, adapters) else None


def join(plan: RoundPlan, ideal: Ideal | None, adapters: PyTree, weights: Array) -> Ideal | None:
    """With the clients [C] of one more chunk, by their weights."""
    if ideal is None:
        return None
    total = _products(low_rank.join(adapters, plan.frozen), weights)
    if ideal.total:
        total = jax.tree.map(jnp.add, ideal.total, total)
    return Ideal(total, ideal.weight + jnp.sum(weights))


@jax.jit
def _products(adapters: Adapters, weights: Array) -> dict[str, Array]:
    """Module -> the weighted sum of the clients' products [in, out]; a factor without the axis [C] is everybody's."""
    exact, count, found = jax.lax.Precision.HIGHEST, weights.shape[0], {}
    for path, factors in low_rank.whole(adapters).items():
        a, b = (factors[name].astype(jnp.float32) for name in ("a", "b"))
        a = a if a.ndim == 3 else jnp.broadcast_to(a, (count, *a.shape))
        b = (b if b.ndim == 3 else jnp.broadcast_to(b, (count, *b.shape))) * weights[:, None, None]
        found[path] = jnp.einsum("cir,cro->io", a, b, precision=exact)
    return found


def error(plan: RoundPlan, ideal: Ideal | None, before: RoundState, after: RoundState) -> float | None:
    """Distance of the server's effective change of the weights from the clients' mean, relative to that mean.

    Args:
      plan: of the rounds.
      ideal: of all clients of the round; ``None``: it is not measured.
      before: the round: what had been moved into the weights then was every client's.
      after: the round.

    Returns:
      The ratio of Frobenius norms over all adapted modules; 0 where nobody moved, ``None`` where nobody took part.
    """
    if ideal is None or not ideal.total or not float(ideal.weight) > 0:
        return None
    given = low_rank.products(low_rank.join(after.adapters, plan.frozen))
    states = (before.server_state, after.server_state)
    offset = {path: part / plan.trainer.scaling for path, part in plan.offset.items()}
    apart, size = _norms(plan.aggregation.residual, *states, ideal, given, offset)
    return math.sqrt(float(apart) / float(size)) if float(size) > 0 else float(apart > 0)


@partial(jax.jit, static_argnums=0)
def _norms(
    residual, before: PyTree, after: PyTree, ideal: Ideal, given: dict[str, Array], offset: dict[str, Array]
) -> tuple[Array, Array]:
    """The squares of the distance, and of what the mean has over the base model, without the scaling."""
    apart, size = jnp.float32(0), jnp.float32(0)
    old, new = ({} if residual is None else residual(state) for state in (before, after))
    for path, product in given.items():
        wanted = ideal.total[path] / ideal.weight + old.get(path, 0.0)
        apart += jnp.sum(jnp.square(wanted - product - new.get(path, 0.0)))
        size += jnp.sum(jnp.square(wanted + offset.get(path, 0.0)))
    return apart, size
