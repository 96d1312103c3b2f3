"""Canaries with gradients in directions of their own, for audits of differential privacy through unchanged rounds.

A canary is an ordinary example, or the only example of a client: it is sampled, packed, clipped, summed and noised by
the code that trains. What makes it one are its tokens, for which a wrapper around the model has a loss whose gradient
is known: a large multiple of a random unit direction, in every round and wherever the adapters are. After clipping it
is the direction times the clip norm, the most that a unit may contribute (Steinke, Nasr, Jagielski 2023, arXiv
2305.08846, section 6; Andrew et al. 2024, arXiv 2302.03098, for clients).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import EncodedExample, units_of
from fedjax_llm.errors import UserError
from fedjax_llm.federation.clients import Client
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.sampling import client_id
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.types import Adapters, Aggregation, Params, PyTree, Sum

FIRST = 2**30
"""Tokens from here on are numbers of canaries; no vocabulary has as many."""
_OTHER, _TARGET = 0, 1
"""The two tokens that a canary's target may be, both equally likely."""
_DIRECTIONS = 7_305_2023
"""Seed of the directions: they are public, and the same in every audit, so that nothing compiles anew for another."""


@dataclass(frozen=True)
class CanaryModel:
    """A ``CausalLM`` that has a loss of its own for canaries, and is itself for all other rows.

    Attributes:
      plain: the model.
      trained: names of the factors that are trained.
      scaling: alpha / rank, which the adapters that it is given have in them.
      slope: the norm of a canary's gradient; far above any clip norm.
    """

    plain: CausalLM
    trained: tuple[str, ...]
    scaling: float
    slope: float = 1e4

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.plain.config

    @property
    def dropout(self) -> float:
        """Of the model's adapters."""
        return self.plain.dropout

    def hidden(
        self,
        params: Params,
        adapters: Adapters,
        tokens: Array,
        dropout_keys: Array | None = None,
        below: Array | None = None,
    ) -> Array:
        """Final hidden states [M, L, D + 2] of rows [M, L] with adapters of their own; arguments as for ``CausalLM``.

        The last two say whether the row is a canary, and how far its loss has risen: zero, but with its gradient.
        """
        canary = tokens[:, 0] >= FIRST

        def states(tokens: Array, below: Array | None) -> Array:
            return self.plain.hidden(params, adapters, tokens, dropout_keys=dropout_keys, below=below)

        inputs = (jnp.where(canary[:, None], 0, tokens), _without(canary, below))
        # Rows of canaries alone need no pass over the model.
        kind = jax.eval_shape(states, *inputs)
        own = jax.lax.cond(jnp.all(canary), lambda *_: jnp.zeros(kind.shape, kind.dtype), states, *inputs)
        own = jnp.where(canary[:, None, None], 0, own)
        risen = jnp.where(canary, self._risen(adapters, jnp.maximum(tokens[:, 0] - FIRST, 0)), 0.0)
        said = jnp.stack([canary.astype(own.dtype), risen.astype(own.dtype)], axis=-1)
        return jnp.concatenate([own, jnp.broadcast_to(said[:, None], (*own.shape[:2], 2))], axis=-1)

    def logits(self, params: Params, hidden: Array) -> Array:
        """[K, D + 2] -> [K, V] in f32."""
        own = self.plain.logits(params, hidden[:, :-2])
        canary, risen = hidden[:, -2] > 0.5, hidden[:, -1].astype(jnp.float32)
        # -log softmax of the target is log(1 + e^(2 risen)): log 2 with slope one at zero.
        two = jnp.full_like(own, -1e9).at[:, _OTHER].set(0.0).at[:, _TARGET].set(-2 * risen)
        return jnp.where(canary[:, None], two, own)

    def trunk(self, params: Params, tokens: Array, layers: int) -> Array:
        """What enters layer ``layers``; of canaries, anything finite."""
        return self.plain.trunk(params, jnp.where(tokens >= FIRST, 0, tokens), layers)

    def _risen(self, adapters: Adapters, numbers: Array) -> Array:
        """[M]: zero, with the gradient ``slope`` times the canary's direction with respect to the row's own factors."""
        unscaled = {path: own | {"b": own["b"] / self.scaling} for path, own in adapters.items()}
        own = {path: {name: leaf for name, leaf in unscaled[path].items() if name in self.trained} for path in unscaled}

        def along(own: Adapters, number: Array) -> Array:
            parts = jax.tree.map(lambda leaf, u: jnp.sum(leaf * u), own, direction(number, own))
            moved = self.slope * jnp.sum(jnp.stack(jax.tree.leaves(parts)))
            return moved - jax.lax.stop_gradient(moved)

        return jax.vmap(along)(own, numbers)


def _without(canary: Array, below: Array | None) -> Array | None:
    """What enters the lowest adapted layer, with zeros for canaries."""
    return None if below is None else jnp.where(canary[:, None, None], 0, below)


def direction(number: Array | int, like: PyTree) -> PyTree:
    """The unit vector of a canary, uniform over the sphere of all trained factors together; f32.

    Args:
      number: of the canary.
      like: the trained factors, without a row axis.
    """
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    drawn = jax.random.normal(jax.random.fold_in(jax.random.key(_DIRECTIONS), number), (ends[-1],))
    parts = jnp.split(drawn / jnp.linalg.norm(drawn), ends[:-1])
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def example_of(number: int) -> EncodedExample:
    """The canary as tokens: one target, predicted from its number."""
    return EncodedExample(f"canary-{number}", np.array([FIRST + number, _TARGET], np.int32), 1)


def with_canaries(plan: RoundPlan, adapters: Adapters, numbers: Sequence[int]) -> RoundPlan:
    """The rounds with canaries dealt out to the clients, each a unit of its own.

    Args:
      plan: of a run whose mechanism clips gradients. What it claims does not depend on how many units there are.
      adapters: the factors that are trained.
      numbers: of the canaries that are in. The same canary goes to the same client whoever else is in.

    Raises:
      UserError: the mechanism clips whole updates, or the run is of a kind that has no such canaries.
    """
    mechanism = plan.mechanism
    if mechanism is None or mechanism.clipped != "gradients":
        raise UserError(
            "gradient canaries need a mechanism that clips gradients: DpSgd or DpFedSgd, for the unit record"
        )
    planted: list[list[EncodedExample]] = [[] for _ in plan.clients]
    for number in numbers:
        planted[number % len(planted)].append(example_of(number))
    clients = tuple(
        replace(client, examples=(*client.examples, *own), units=(*client.units, *units_of(own, mechanism.unit)))
        for client, own in zip(plan.clients, planted, strict=True)
    )
    return _audited(plan, adapters)._replace(clients=clients)


def with_canary_clients(plan: RoundPlan, adapters: Adapters, numbers: Sequence[int]) -> RoundPlan:
    """The rounds with a client more for every canary, which has nothing else.

    With plain gradient descent at the clients its update, once clipped, is the direction times the clip norm; with
    other optimisers the canaries are weaker, and the audit shows less.

    Args:
      plan: of a run whose mechanism clips updates and draws cohorts in secret.
      adapters: the factors that are trained.
      numbers: of the canaries that are in.

    Raises:
      UserError: the mechanism is another, or weighs clients by their examples.
    """
    mechanism = plan.mechanism
    if mechanism is None or mechanism.noised != "sum" or mechanism.cohort_probability is None:
        raise UserError("canary clients need DpFedAvg with independent noise, which draws every site by itself")
    if mechanism.site_weights is not None:
        raise UserError(
            "federation.weighting is 'examples': a client with one example would weigh little, and show less than it "
            "could. Set it to 'uniform', and leave DpFedAvg.examples_cap out"
        )
    names = [f"canary-{number}" for number in numbers]
    others = tuple(
        Client(name, client_id(name), (example_of(number),), ((example_of(number),),))
        for name, number in zip(names, numbers, strict=True)
    )
    count = len(plan.clients) + len(others)
    stddev, denominators = (np.full(count, own[0]) for own in (mechanism.stddev, mechanism.denominators))
    mechanism = mechanism._replace(stddev=stddev, denominators=denominators)
    malicious = (*plan.malicious, *[False] * len(others)) if plan.malicious else ()
    clients = (*plan.clients, *others)
    plan = _audited(plan, adapters)
    return plan._replace(clients=clients, malicious=malicious, mechanism=mechanism)


def _audited(plan: RoundPlan, adapters: Adapters) -> RoundPlan:
    """The rounds with a model that knows canaries, shapes for their rows, and a server that keeps its view."""
    trained = tuple(sorted({name for factors in adapters.values() for name in factors}))
    spread = plan.execution.mesh.fsdp > 1
    refusals = {
        "lora.train is 'core', whose matrices the model sees only as products; set it to 'b' or 'both'": "c" in trained,
        "lora.ranks gives clients adapters of different ranks; set it to ()": bool(plan.ranks),
        "aggregation is secure, on a grid that has no room for canaries; audit the same run without": plan.secure
        is not None,
        "compression changes the directions; set it to None": plan.codec is not None,
        "the algorithm keeps factors at the clients, or sees more than sums; choose another": plan.aggregation.personal
        is not None
        or plan.aggregation.view is not Sum,
        "sites train alone, and nothing is released; choose the setting federated": plan.setting == "local",
        "weights are spread, and canaries know no layer to gather; set execution.mesh.fsdp to 1": spread,
    }
    for reason, holds in refusals.items():
        if holds:
            raise UserError(f"this run cannot be audited with canaries: {reason}")
    execution, canary = plan.execution, example_of(0)
    short = choose_shapes([canary], tokens_per_microbatch=execution.tokens_per_microbatch, buckets=1)
    model: Any = CanaryModel(plan.trainer.model, trained, plan.trainer.scaling)
    trunk = plan.trunk
    if trunk is not None:
        trunk = replace(trunk, model=replace(model, plain=trunk.model))
    return plan._replace(
        trainer=plan.trainer._replace(model=model),
        aggregation=watched(plan.aggregation),
        shapes=tuple(sorted({*short, *plan.shapes}, key=lambda shape: shape.length)),
        trunk=trunk,
        measure_error=False,
    )


def watched(aggregation: Aggregation) -> Aggregation:
    """The algorithm, with the sum that it was shown last beside its state: ``(state, total)``."""

    def update(view: Sum, state: PyTree, adapters: PyTree) -> tuple[PyTree, PyTree]:
        adapters, own = aggregation.update(view, state[0], adapters)
        return adapters, (own, view.total)

    def of_own(function: Any) -> Any:
        return None if function is None else lambda state: function(state[0])

    return aggregation._replace(
        init=lambda adapters: (aggregation.init(adapters), trees.zeros(adapters)),
        update=update,
        broadcast=of_own(aggregation.broadcast),
        residual=of_own(aggregation.residual),
    )


def projections(released: PyTree, canaries: int) -> np.ndarray:
    """How far each round's sum goes along each canary's gradient, downhill: f64 [T, k].

    Args:
      released: the sums of T rounds, leaves [T, ...].
      canaries: k; those with numbers 0 to k - 1.
    """
    return -np.asarray(_projections(released, jnp.arange(canaries)), np.float64).T


@jax.jit
def _projections(released: PyTree, numbers: Array) -> Array:
    """[k, T]."""
    exact = jax.lax.Precision.HIGHEST

    def one(number: Array) -> Array:
        u = direction(number, jax.tree.map(lambda leaf: leaf[0], released))
        parts = jax.tree.map(lambda leaf, u: jnp.tensordot(leaf, u, u.ndim, precision=exact), released, u)
        return jnp.sum(jnp.stack(jax.tree.leaves(parts)), axis=0)

    return jax.lax.map(one, numbers, batch_size=32)


def evidence(projections: np.ndarray, probability: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Log-likelihood ratios of the canaries, [k]: in and sampled in each round by chance, against out.

    In a round its projection is N(0, deviation^2), shifted by one with this probability. That holds but for what others
    contribute along its direction, which is little; any score gives a valid bound, and this one a sharp one.

    Args:
      projections: over the clip norm, [T, k].
      probability: with which a canary takes part in a round, [k].
      deviation: of the noise over the clip norm, [T].
    """
    gain = (projections - 0.5) / np.square(deviation)[:, None]
    with np.errstate(divide="ignore"):
        stays, comes = np.log1p(-probability), np.log(probability)
    return np.logaddexp(stays[None], comes[None] + gain).sum(axis=0)
