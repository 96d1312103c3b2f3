"""What the algorithms of adapters share that a server computes from a stack of clients' factors.

No client's product [in, out] is ever formed alone: products are summed, and decomposed, through factors that stand side
by side.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.types import Adapters, Factors, Local, PyTree, Trained

exact_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""A product of matrices in full f32 on every device."""


def shares(weights: Array) -> Array:
    """[C] -> [C]: the weights over their sum; zeros where all of them are zero."""
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1.0)


def side_by_side(factors: Factors, share: Array) -> Factors:
    """One pair of factors whose product is the sum of the clients' products by their shares.

    Args:
      factors: of one module: ``a`` [C, in, R] and ``b`` [C, R, out].
      share: [C].

    Returns:
      ``a`` [in, C R] and ``b`` [C R, out], f32.
    """
    a, b = (factors[name].astype(jnp.float32) for name in ("a", "b"))
    clients, fan_in, rank = a.shape
    a = jnp.moveaxis(a * share[:, None, None], 0, 1).reshape(fan_in, clients * rank)
    return {"a": a, "b": b.reshape(clients * rank, -1)}


def principal(factors: Factors, rank: int) -> Factors:
    """The best approximation of rank ``rank`` of a product, its components in the order of their singular values.

    Two QR decompositions leave a core that is no larger than the factors' common side, and only that is decomposed.

    Args:
      factors: ``a`` [in, K] and ``b`` [K, out], f32.
      rank: of the approximation; what is more than the product can have is cut off.

    Returns:
      ``a`` [in, R] with orthonormal columns and ``b`` [R, out], whose rows have the singular values as norms, so that
      the first components of both are the best approximation of that lower rank. The entry of largest magnitude of
      every column of ``a`` is positive: the sign of a singular vector is arbitrary.
    """
    left, left_core = jnp.linalg.qr(factors["a"])
    right, right_core = jnp.linalg.qr(factors["b"].T)
    u, values, vt = jnp.linalg.svd(exact_matmul(left_core, right_core.T), full_matrices=False)
    a = exact_matmul(left, u[:, :rank])
    b = exact_matmul(values[:rank, None] * vt[:rank], right.T)
    largest = jnp.take_along_axis(a, jnp.argmax(jnp.abs(a), axis=0)[None], axis=0)[0]
    sign = jnp.where(largest < 0, -1.0, 1.0)
    return {"a": a * sign, "b": b * sign[:, None]}


def changes(adapters: Adapters, deltas: Adapters, share: Array) -> tuple[Adapters, dict[str, Factors]]:
    """The mean of the clients' factors, and what their mean product has beyond the product of these means.

    The second is the sum of ``share[c] (da_c - da) (db_c - db)``, with ``da`` and ``db`` the means of the deltas: zero
    where no client moved, and free of the cancellation of two products that are almost equal. What the type of the
    adapters rounds off their means belongs to it too.

    Args:
      adapters: the server's, whole.
      deltas: of the clients, leaves [C, ...].
      share: [C].

    Returns:
      The adapters at the means, in their type, and by module factors ``a`` [in, K] and ``b`` [K, out] of the rest,
      K = (C + 2) R.
    """
    means, rest = {}, {}
    for path, moved in deltas.items():
        centre = {name: jnp.tensordot(share, leaf, axes=1, precision="highest") for name, leaf in moved.items()}
        precise = {name: leaf.astype(jnp.float32) + centre[name] for name, leaf in adapters[path].items()}
        means[path] = {name: leaf.astype(adapters[path][name].dtype) for name, leaf in precise.items()}
        lost = {name: leaf - means[path][name].astype(jnp.float32) for name, leaf in precise.items()}
        apart = side_by_side({name: leaf - centre[name] for name, leaf in moved.items()}, share)
        kept_a = means[path]["a"].astype(jnp.float32)
        rest[path] = {
            "a": jnp.concatenate([apart["a"], lost["a"], kept_a], axis=1),
            "b": jnp.concatenate([apart["b"], precise["b"], lost["b"]], axis=0),
        }
    return means, rest


def send_whole(trained: Trained, local: Local) -> tuple[PyTree, PyTree]:
    """A client's report: the adapters that it ended with, since the server knows not of which rank it began."""
    return trained.end, local.memory
