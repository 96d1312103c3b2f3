"""The round: cohort -> batches -> client updates, chunk by chunk -> the server's view -> aggregation.

Where a privacy mechanism bounds and blurs what is released is decided here, and only here, by the mechanism's fields:
gradients are clipped and steps are noised in local training, deltas and sums in ``federation/release.py``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.data.packing import pack, target_count
from fedjax_llm.data.records import EncodedExample, unit_name
from fedjax_llm.errors import UserError
from fedjax_llm.federation import release
from fedjax_llm.federation.clients import Client
from fedjax_llm.federation.plan import ClientReport, RoundPlan, RoundReport
from fedjax_llm.federation.sampling import (
    Cycle,
    attendance,
    round_key,
    sample_clients,
    sample_cohort,
    sample_steps,
    sample_units,
    secret_round_key,
    unit_group,
)
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining, Secrets
from fedjax_llm.types import Params, PyTree, RoundState


class _Chunk(NamedTuple):
    """The outcome of a chunk of clients: leaves [C, ...] of which the first ``len(reports)`` are real."""

    adapters: PyTree
    kept: dict[str, PyTree]
    deltas: PyTree
    weights: Array
    below_clip: Array
    reports: tuple[ClientReport, ...]
    padded_tokens: int


def initial_state(plan: RoundPlan, adapters: PyTree) -> RoundState:
    """The state before the first round. In the setting local every site has adapters of its own, [N, ...]."""
    count, mechanism = len(plan.clients), plan.mechanism
    client_state = {}
    if plan.local.keep_optimizer == "yes":
        client_state["optimizer"] = jax.vmap(plan.trainer.optimizer.init)(trees.repeat(adapters, count))
    if plan.trainer.mix is not None:
        assert mechanism is not None
        client_state["noise"] = trees.repeat(mechanism.correlated.init(trees.zeros(adapters)), count)
    server_state = plan.aggregation.init(adapters)
    privacy_state = release.initial_state(mechanism, trees.zeros(adapters))
    if plan.setting == "local":
        adapters = trees.repeat(adapters, count)
    return RoundState(jnp.int32(0), adapters, server_state, client_state, privacy_state)


def cohort_of(plan: RoundPlan, number: int, attempt: int = 0) -> np.ndarray:
    """The clients of a round, int [C], ascending; under a mechanism that samples them a secret, and maybe nobody."""
    mechanism = plan.mechanism
    if mechanism is not None and mechanism.cohort_probability is not None:
        key = secret_round_key(_secret(plan), number, attempt, "cohort")
        return sample_clients(key, len(plan.clients), mechanism.cohort_probability)
    return sample_cohort(round_key(plan.key, number, "cohort"), len(plan.clients), plan.cohort)


def run_round(plan: RoundPlan, params: Params, state: RoundState, attempt: int = 0) -> tuple[RoundState, RoundReport]:
    """One round.

    Args:
      plan: what stays the same.
      params: the frozen weights.
      state: after the round before.
      attempt: how often this round has been released with other noise before (``privacy/ledger.py``).

    Returns:
      The next state, and a report.

    Raises:
      UserError: without differential privacy, not one client of the cohort came back with a finite update.
    """
    number = int(state.round) + 1
    cohort = cohort_of(plan, number, attempt)
    sampled = plan.mechanism is not None and plan.mechanism.cohort_probability is not None
    slots = min(plan.execution.clients_per_chunk, len(plan.clients) if sampled else len(cohort))
    view, adapters, client_state = release.nothing(plan, state.adapters), state.adapters, dict(state.client_state)
    reports: list[ClientReport] = []
    padded_tokens, below_clip = 0, jnp.float32(0)
    for first in range(0, len(cohort), slots):
        members = cohort[first : first + slots]
        # Slots that stay empty point past the end: reading clamps, writing drops.
        index = jnp.asarray(np.concatenate([members, np.full(slots - len(members), len(plan.clients))]))
        chunk = _run_chunk(plan, params, state, members, index, (number, attempt))
        if plan.setting == "local":
            adapters = trees.put(adapters, index, chunk.adapters)
        else:
            view = release.join(view, plan.aggregation.view, chunk.deltas, chunk.weights, len(members))
        for name, kept in chunk.kept.items():
            client_state[name] = trees.put(client_state[name], index, kept)
        below_clip += chunk.below_clip
        reports.extend(chunk.reports)
        padded_tokens += chunk.padded_tokens
    if plan.mechanism is None and not any(report.included for report in reports):
        raise UserError(
            f"round {number}: not one client came back with a finite update (losses: "
            + ", ".join(f"{report.name} {report.loss:.3g}" for report in reports)
            + "); lower training.optimizer.learning_rate"
        )
    server_state, privacy_state, clip_norm = state.server_state, state.privacy_state, None
    if plan.mechanism is not None:
        clip_norm = release.clip_norm(plan.mechanism, privacy_state)
        view, privacy_state = release.noised_sum(plan, view, privacy_state, below_clip, number, attempt)
    if view is not None:
        adapters, server_state = _aggregate(plan.aggregation.update, view, state.server_state, state.adapters)
    return RoundState(jnp.int32(number), adapters, server_state, client_state, privacy_state), RoundReport(
        clients=tuple(reports),
        tokens=sum(report.tokens for report in reports),
        padded_tokens=padded_tokens,
        update_norm=_distance(adapters, state.adapters),
        clip_norm=None if clip_norm is None else float(clip_norm),
    )


def _run_chunk(
    plan: RoundPlan, params: Params, state: RoundState, members: np.ndarray, index: Array, moment: tuple[int, int]
) -> _Chunk:
    """Local training of a chunk of the cohort, in a round and attempt."""
    clients, slots, mechanism = [plan.clients[i] for i in members], len(index), plan.mechanism
    past = _past(plan, moment[0])
    work = [_work(plan, int(i), *moment, past) for i in members]
    ids = jnp.array([client.id for client in clients] + [0] * (slots - len(clients)))
    dropout = round_key(plan.key, moment[0], "dropout")
    if mechanism is not None:
        dropout = secret_round_key(_secret(plan), *moment, "dropout")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout, ids)
    anchor = trees.take(state.adapters, index) if plan.setting == "local" else trees.repeat(state.adapters, slots)
    kept = {name: trees.take(tree, index) for name, tree in state.client_state.items()}
    public = None
    if mechanism is not None and mechanism.clipped == "gradients":
        public = [float(mechanism.denominators[i]) for i in members]
    per_token = plan.local.normalise == "token"
    batches = list(pack(work, plan.shapes, clients=slots, per_token=per_token, denominators=public))
    rates = _learning_rates(plan.local, work, slots, moment[0], plan.federation.rounds)
    begun = client_update.start(plan.trainer, anchor, kept.get("optimizer"), kept.get("noise", ()))
    secrets = _secrets(plan, ids, index, *moment)
    if plan.trunk is not None:  # in microbatches of its own, with less padding than a step's
        plan.trunk.fill([example for batch in batches for example in batch.examples], advance=lambda count: None)
    ended = client_update.run(plan.trainer, params, begun, batches, keys, rates, plan.frozen, secrets, plan.trunk)
    updates = release.updates(plan, ended, anchor, jnp.asarray(_weights(plan, clients, slots)), state.privacy_state)
    deltas = release.noised_deltas(plan, updates.deltas, ids, index, *moment)
    # Noise that was drawn is gone, whatever became of the update: its state always moves on.
    moved_on = {"optimizer": trees.select(updates.finite, ended.optimizer, begun.optimizer), "noise": ended.noise}
    return _Chunk(
        adapters=trees.select(updates.finite, ended.adapters, anchor),
        kept={name: moved_on[name] for name in kept},
        deltas=deltas,
        weights=updates.weights,
        below_clip=updates.below_clip,
        reports=_reports(clients, work, per_token, ended.loss, updates),
        padded_tokens=sum(batch.tokens.size for batch in batches),
    )


def _work(plan: RoundPlan, place: int, number: int, attempt: int, past: np.ndarray | None) -> Sequence[Sequence[Any]]:
    """The batches of a client's round: Poisson samples of its units under a mechanism that samples them."""
    client, local, mechanism = plan.clients[place], plan.local, plan.mechanism
    if mechanism is None or mechanism.sampling is None:
        steps = None if local.local_epochs is not None else local.local_steps
        key = jax.random.fold_in(round_key(plan.key, number, "order"), client.id)
        return sample_steps(key, client.examples, local.batch_size, steps, local.local_epochs)
    key = jax.random.fold_in(secret_round_key(_secret(plan), number, attempt, "units"), client.id)
    probability = float(mechanism.sampling[place])
    cycle = None if past is None else _cycle(plan, place, int(past[place]))
    return sample_units(key, client.units, probability, local.local_steps, mechanism.examples_per_unit, cycle)


def _past(plan: RoundPlan, number: int) -> np.ndarray | None:
    """In how many earlier rounds each client took part, int [N]; ``None`` where units do not take turns."""
    mechanism = plan.mechanism
    if mechanism is None or mechanism.correlated is None or mechanism.correlated.cyclic == 1:
        return None
    return attendance(plan.key, number - 1, len(plan.clients), plan.cohort).sum(axis=0)


def _cycle(plan: RoundPlan, place: int, past: int) -> Cycle:
    """Whose turn it is at a client that took part in ``past`` rounds before."""
    mechanism, client = plan.mechanism, plan.clients[place]
    assert mechanism is not None
    groups = mechanism.correlated.cyclic
    names = [unit_name(unit[0].record_id, unit[0].owner, mechanism.unit) for unit in client.units]
    member = np.array([unit_group(name, groups, client.id) for name in names])
    return Cycle(past * plan.local.local_steps, groups, member)


def _secret(plan: RoundPlan) -> Array:
    """The run's secret key."""
    assert plan.secret_key is not None, "a plan with a mechanism has a secret key"
    return plan.secret_key


def _secrets(plan: RoundPlan, ids: Array, index: Array, number: int, attempt: int) -> Secrets | None:
    """The keys and the size of the noise that sites add to their steps, where they do."""
    if plan.mechanism is None or plan.mechanism.noised != "steps":
        return None
    return Secrets(*release.site_noise(plan, ids, index, number, attempt))


def _weights(plan: RoundPlan, clients: Sequence[Client], slots: int) -> np.ndarray:
    """f32 [C]: the clients' weights in the sum; zero in empty slots."""
    weights, mechanism = np.zeros(slots, np.float32), plan.mechanism
    for c, client in enumerate(clients):
        if mechanism is not None and mechanism.noised == "sum":
            weights[c] = 1.0 if mechanism.site_weights is None else mechanism.site_weights(len(client.examples))
        else:
            # What is public of a private site's size is its number of units.
            bounded = mechanism is not None and mechanism.clipped == "gradients"
            held = client.units if bounded else client.examples
            weights[c] = len(held) if plan.federation.weighting == "examples" else 1.0
    return weights


def _reports(
    clients: Sequence[Client], work: Sequence[Any], per_token: bool, losses: Array, updates: release.Updates
) -> tuple[ClientReport, ...]:
    """What each client did."""
    sums, norms, finite = (np.asarray(array) for array in (losses, updates.norms, updates.finite))
    reports = []
    for c, (client, steps) in enumerate(zip(clients, work, strict=True)):
        units = [unit if isinstance(unit, tuple) else (unit,) for step in steps for unit in step]
        seen: list[EncodedExample] = [example for unit in units for example in unit]
        count = sum(map(target_count, seen)) if per_token else len(units)
        reports.append(
            ClientReport(
                name=client.name,
                loss=float(sums[c]) / count if count else None,
                tokens=sum(len(example.tokens) for example in seen),
                examples=len(seen),
                update_norm=float(norms[c]),
                included=bool(finite[c]),
            )
        )
    return tuple(reports)


def _learning_rates(
    local: LocalTraining, work: Sequence[Sequence[Any]], slots: int, number: int, rounds: int
) -> np.ndarray:
    """[C, S]: factors of the base learning rate for every client and local step of round ``number``."""
    over_rounds = local.round_schedule.factor(number - 1, rounds)
    rates = np.zeros((slots, max(len(steps) for steps in work)))
    for c, steps in enumerate(work):
        rates[c, : len(steps)] = [over_rounds * local.local_schedule.factor(s, len(steps)) for s in range(len(steps))]
    return rates


_aggregate = jax.jit(lambda update, view, state, adapters: update(view, state, adapters), static_argnums=0)


@jax.jit
def _squared_distance(one: PyTree, other: PyTree) -> Array:
    squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a.astype(jnp.float32) - b)), one, other)
    return jnp.sum(jnp.stack(jax.tree.leaves(squares)))


def _distance(one: PyTree, other: PyTree) -> float:
    """Euclidean distance of two trees."""
    return math.sqrt(float(_squared_distance(one, other)))
