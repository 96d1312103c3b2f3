"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): adapters of different ranks, padded with zeros, that prune themselves.

A client of rank r takes the first r components of the server's adapters, and its components beyond r are zeros in what
it sends. The server averages the factors with weights in proportion to the Frobenius norms of the clients' products, in
place of the numbers of their examples (sparsity-weighted aggregation). While a client trains, its loss has

    penalty * sum over modules of |a[:, g r : r]| |b[g r : r, :]|

added, with g = ``gamma``. Where the sum of these products of norms ends below where it began, the client goes on with
rank g r (rank self-pruning).

The paper speaks of one adapted matrix; here a client has one weight and one rank for all of them: the norm is over all
modules together, and so is the sum that decides. A client that prunes itself sends what it trained this once; its rank
is lower from the next round on. Where all products are zero the clients weigh alike.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import trees
from fedjax_llm.aggregation.products import exact_matmul, send_whole, shares
from fedjax_llm.aggregation.server_optimizer import check_portion
from fedjax_llm.errors import UserError
from fedjax_llm.types import Adapters, Aggregation, ClientRule, Local, PyTree, Stack


@dataclass(frozen=True)
class HetLora:
    """The mean of the zero-padded factors, by the norms of the clients' products.

    Attributes:
      gamma: the share of its components that a client is left with when it prunes itself, rounded down to at least one;
        1: it never does.
      penalty: lambda, of the norms of the components that might be pruned. It counts in any case, but ranks can change
        only where ``lora.ranks`` is given.
    """

    gamma: float = 0.99
    penalty: float = 1e-3

    def make(self) -> Aggregation:
        """The algorithm as pure functions of a ``Stack`` of whole adapters."""
        check_portion(gamma=self.gamma)
        if not 0 <= self.penalty < math.inf:
            raise UserError(f"aggregation.penalty is {self.penalty}; it must be finite and not negative")
        gamma, penalty = self.gamma, self.penalty

        def corrected(gradient: Adapters, adapters: Adapters, local: Local) -> Adapters:
            added = jax.grad(_prunable)(adapters, local.rank, gamma)
            return jax.tree.map(lambda g, p: g + penalty * p, gradient, added)

        def rank(end: Adapters, local: Local) -> Array:
            shrunk = _prunable(end, local.rank, gamma) < _prunable(local.start, local.rank, gamma)
            return jnp.where(shrunk, _remaining(local.rank, gamma), local.rank)

        return Aggregation(
            init=lambda adapters: (),
            update=_update,
            view=Stack,
            client=ClientRule(gradient=corrected if penalty else None, report=send_whole, rank=rank),
            ranks=True,
            whole=True,
        )


def _update(view: Stack, state: PyTree, adapters: Adapters) -> tuple[Adapters, PyTree]:
    present = view.weights > 0
    norm = jnp.where(present, jax.vmap(_norm)(view.messages), 0.0)
    share = shares(jnp.where(jnp.any(norm > 0), norm, present))
    mean = jax.tree.map(lambda m, a: m.astype(a.dtype), trees.weighted_sum(share, view.messages), adapters)
    return trees.select(jnp.any(present), mean, adapters), state


def _norm(adapters: Adapters) -> Array:
    """The Frobenius norm of all products ``a b`` of one client, from the factors' Gram matrices [R, R]."""
    squares = jnp.float32(0)
    for factors in adapters.values():
        a, b = (factors[name].astype(jnp.float32) for name in ("a", "b"))
        squares += jnp.sum(exact_matmul(a.T, a) * exact_matmul(b, b.T))
    return jnp.sqrt(jnp.maximum(squares, 0.0))


def _remaining(rank: Array, gamma: float) -> Array:
    """How many of ``rank`` components are left after pruning."""
    # Without the small addend 0.7 * 10 would round down to 6 in f32.
    return jnp.maximum(jnp.floor(gamma * rank + 1e-4).astype(rank.dtype), 1)


def _prunable(adapters: Adapters, rank: Array, gamma: float) -> Array:
    """The sum over modules of the products of norms of the components that pruning would take."""
    total = jnp.float32(0)
    for factors in adapters.values():
        component = jnp.arange(factors["a"].shape[-1])
        taken = (component >= _remaining(rank, gamma)) & (component < rank)
        total += _root(factors["a"], taken) * _root(factors["b"], taken[:, None])
    return total


def _root(factor: Array, taken: Array) -> Array:
    """Norm of the entries that are taken, with a gradient of zero where it is zero."""
    square = jnp.sum(jnp.square(jnp.where(taken, factor.astype(jnp.float32), 0.0)))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
