"""The round: cohort -> batches -> client updates, chunk by chunk -> the server's view -> aggregation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.data.packing import Shape, pack, target_count
from fedjax_llm.errors import UserError
from fedjax_llm.federation.clients import Client
from fedjax_llm.federation.sampling import round_key, sample_cohort, sample_steps
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.types import Aggregation, Params, PyTree, RoundState, Setting, Stack, Sum, View


@dataclass(frozen=True)
class Federation:
    """Rounds and cohorts.

    Attributes:
      rounds: how many.
      cohort: sites that take part in a round; ``None``: all.
      weighting: whether a client's update weighs as many training ``examples`` as its site holds, or all weigh alike.
    """

    rounds: int = 10
    cohort: int | None = None
    weighting: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.rounds < 1:
            raise UserError(f"federation.rounds is {self.rounds}; it must be at least 1")
        if self.cohort is not None and self.cohort < 1:
            raise UserError(f"federation.cohort is {self.cohort}; it must be at least 1, or None for all sites")


@dataclass(frozen=True)
class Execution:
    """How the computation is laid out. Nothing here may change a result (beyond the rounding of f32 sums).

    Attributes:
      clients_per_chunk: clients whose local states are held at a time.
      tokens_per_microbatch: padded tokens of a training step; bounds its memory.
      buckets: row lengths that are compiled.
      evaluation_buckets: the same for held-out evaluation, which needs no backward pass.
      remat: recompute activations in the backward pass.
    """

    clients_per_chunk: int = 16
    tokens_per_microbatch: int = 512
    buckets: int = 3
    evaluation_buckets: int = 3
    remat: bool = False

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("clients_per_chunk", "tokens_per_microbatch", "buckets", "evaluation_buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"execution.{name} is {getattr(self, name)}; it must be at least 1")


class RoundPlan(NamedTuple):
    """All that stays the same from round to round.

    Attributes:
      setting: of the run.
      trainer: the static half of local training.
      aggregation: the server's algorithm.
      federation: rounds and cohorts.
      local: what clients do.
      execution: chunks.
      shapes: of microbatches.
      clients: all of them, in the order of the client axis of a run's state.
      cohort: clients a round.
      key: of the run.
    """

    setting: Setting
    trainer: Trainer
    aggregation: Aggregation
    federation: Federation
    local: LocalTraining
    execution: Execution
    shapes: tuple[Shape, ...]
    clients: tuple[Client, ...]
    cohort: int
    key: Array


@dataclass(frozen=True)
class ClientReport:
    """What a client did in a round. ``loss`` is in nats a target token; ``included`` says whether it was finite."""

    name: str
    loss: float
    tokens: int
    examples: int
    update_norm: float
    included: bool


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round. Tokens are counted without and with padding."""

    clients: tuple[ClientReport, ...]
    tokens: int
    padded_tokens: int
    update_norm: float


class _Chunk(NamedTuple):
    """The outcome of a chunk of clients: leaves [C, ...] of which the first ``len(reports)`` are real."""

    adapters: PyTree
    optimizer: PyTree
    deltas: PyTree
    weights: Array
    finite: Array
    reports: tuple[ClientReport, ...]
    padded_tokens: int


def initial_state(plan: RoundPlan, adapters: PyTree) -> RoundState:
    """The state before the first round. In the setting local every site has adapters of its own, [N, ...]."""
    count = len(plan.clients)
    client_state = {}
    if plan.local.keep_optimizer == "yes":
        client_state["optimizer"] = jax.vmap(plan.trainer.optimizer.init)(trees.repeat(adapters, count))
    server_state = plan.aggregation.init(adapters)
    if plan.setting == "local":
        adapters = trees.repeat(adapters, count)
    return RoundState(jnp.int32(0), adapters, server_state, client_state)


def run_round(plan: RoundPlan, params: Params, state: RoundState) -> tuple[RoundState, RoundReport]:
    """One round.

    Args:
      plan: what stays the same.
      params: the frozen weights.
      state: after the round before.

    Returns:
      The next state, and a report.

    Raises:
      UserError: not one client of the cohort came back with a finite update.
    """
    number = int(state.round) + 1
    cohort = sample_cohort(round_key(plan.key, number, "cohort"), len(plan.clients), plan.cohort)
    slots = min(plan.execution.clients_per_chunk, len(cohort))
    view, adapters, client_state = None, state.adapters, state.client_state
    reports: list[ClientReport] = []
    padded_tokens = 0
    for first in range(0, len(cohort), slots):
        members = cohort[first : first + slots]
        # Slots that stay empty point past the end: reading clamps, writing drops.
        index = jnp.asarray(np.concatenate([members, np.full(slots - len(members), len(plan.clients))]))
        chunk = _run_chunk(plan, params, state, [plan.clients[i] for i in members], index, number)
        if plan.setting == "local":
            adapters = trees.put(adapters, index, chunk.adapters)
        else:
            view = _join(view, plan.aggregation.view, chunk)
        if client_state:
            client_state = client_state | {"optimizer": trees.put(client_state["optimizer"], index, chunk.optimizer)}
        reports.extend(chunk.reports)
        padded_tokens += chunk.padded_tokens
    if not any(report.included for report in reports):
        raise UserError(
            f"round {number}: not one client came back with a finite update (losses: "
            + ", ".join(f"{report.name} {report.loss:.3g}" for report in reports)
            + "); lower training.optimizer.learning_rate"
        )
    server_state = state.server_state
    if view is not None:
        adapters, server_state = _aggregate(plan.aggregation.update, view, state.server_state, state.adapters)
    return RoundState(jnp.int32(number), adapters, server_state, client_state), RoundReport(
        clients=tuple(reports),
        tokens=sum(report.tokens for report in reports),
        padded_tokens=padded_tokens,
        update_norm=_distance(adapters, state.adapters),
    )


def _run_chunk(
    plan: RoundPlan, params: Params, state: RoundState, clients: Sequence[Client], index: Array, number: int
) -> _Chunk:
    """Local training of a chunk of the cohort."""
    local, slots = plan.local, len(index)
    order, dropout = (round_key(plan.key, number, purpose) for purpose in ("order", "dropout"))
    steps = None if local.local_epochs is not None else local.local_steps
    work = [
        sample_steps(jax.random.fold_in(order, c.id), c.examples, local.batch_size, steps, local.local_epochs)
        for c in clients
    ]
    ids = jnp.array([client.id for client in clients] + [0] * (slots - len(clients)))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout, ids)
    anchor = trees.take(state.adapters, index) if plan.setting == "local" else trees.repeat(state.adapters, slots)
    kept = trees.take(state.client_state["optimizer"], index) if "optimizer" in state.client_state else None
    per_token = local.normalise == "token"
    batches = list(pack(work, plan.shapes, clients=slots, per_token=per_token))
    rates = _learning_rates(local, work, slots, number, plan.federation.rounds)
    begun = client_update.start(plan.trainer, anchor, kept)
    ended = client_update.run(plan.trainer, params, begun, batches, keys, rates)
    weights = np.zeros(slots, np.float32)
    weights[: len(clients)] = [_weight(plan.federation, client) for client in clients]
    deltas, weights, norms, finite = _deltas(ended, anchor, weights)
    examples = [[example for step in steps for example in step] for steps in work]
    sums, norms, finite_host = (np.asarray(array) for array in (ended.loss, norms, finite))
    reports = tuple(
        ClientReport(
            name=client.name,
            loss=float(sums[c]) / (sum(map(target_count, seen)) if per_token else len(seen)),
            tokens=sum(len(example.tokens) for example in seen),
            examples=len(seen),
            update_norm=float(norms[c]),
            included=bool(finite_host[c]),
        )
        for c, (client, seen) in enumerate(zip(clients, examples, strict=True))
    )
    return _Chunk(
        adapters=trees.select(finite, ended.adapters, anchor),
        optimizer=trees.select(finite, ended.optimizer, begun.optimizer),
        deltas=deltas,
        weights=weights,
        finite=finite,
        reports=reports,
        padded_tokens=sum(batch.tokens.size for batch in batches),
    )


def _weight(federation: Federation, client: Client) -> float:
    """A client's weight in the average."""
    return float(len(client.examples)) if federation.weighting == "examples" else 1.0


def _learning_rates(
    local: LocalTraining, work: Sequence[Sequence[Any]], slots: int, number: int, rounds: int
) -> np.ndarray:
    """[C, S]: factors of the base learning rate for every client and local step of round ``number``."""
    over_rounds = local.round_schedule.factor(number - 1, rounds)
    rates = np.zeros((slots, max(len(steps) for steps in work)))
    for c, steps in enumerate(work):
        rates[c, : len(steps)] = [over_rounds * local.local_schedule.factor(s, len(steps)) for s in range(len(steps))]
    return rates


@jax.jit
def _deltas(ended: client_update.LocalState, anchor: PyTree, weights: Array) -> tuple[PyTree, Array, Array, Array]:
    """Deltas, weights, norms and finiteness of clients [C]; a client that is not finite gets weight and delta zero."""
    deltas = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old.astype(jnp.float32), ended.adapters, anchor)
    norms = trees.norms(deltas)
    finite = jnp.isfinite(norms) & jnp.isfinite(ended.loss)
    zeros = jax.tree.map(jnp.zeros_like, deltas)
    return trees.select(finite, deltas, zeros), jnp.where(finite, weights, 0.0), norms, finite


def _join(view: View | None, kind: type, chunk: _Chunk) -> View:
    """The server's view with one more chunk. A sum does not grow with the cohort; a stack does."""
    if kind is Stack:
        real = len(chunk.reports)
        part = Stack(jax.tree.map(lambda leaf: leaf[:real], chunk.deltas), chunk.weights[:real])
        return part if view is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), view, part)
    part = Sum(trees.weighted_sum(chunk.weights, chunk.deltas), jnp.sum(chunk.weights))
    return part if view is None else jax.tree.map(jnp.add, view, part)


_aggregate = jax.jit(lambda update, view, state, adapters: update(view, state, adapters), static_argnums=0)


@jax.jit
def _squared_distance(one: PyTree, other: PyTree) -> Array:
    squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a.astype(jnp.float32) - b)), one, other)
    return jnp.sum(jnp.stack(jax.tree.leaves(squares)))


def _distance(one: PyTree, other: PyTree) -> float:
    """Euclidean distance of two trees."""
    return math.sqrt(float(_squared_distance(one, other)))
