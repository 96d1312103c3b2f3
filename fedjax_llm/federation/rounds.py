"""The round: cohort -> batches -> client updates, chunk by chunk -> the server's view -> aggregation.

Where a privacy mechanism bounds and blurs what is released is decided here, and only here, by the mechanism's fields:
gradients are clipped and steps are noised in local training, messages and sums in ``federation/release.py``.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import lora as low_rank
from fedjax_llm import mesh as meshes
from fedjax_llm import trees
from fedjax_llm.data.packing import pack
from fedjax_llm.federation import effective, release, secured
from fedjax_llm.federation.availability import Answers
from fedjax_llm.federation.cohorts import answers_of, slots_filled, slots_of
from fedjax_llm.federation.communication import in_vain, traffic_of
from fedjax_llm.federation.hosts import ALONE, Hosts
from fedjax_llm.federation.joining import Part, joined
from fedjax_llm.federation.local_work import (
    at_once,
    learning_rates,
    past_rounds,
    public_denominators,
    secret,
    weights,
    work_of,
)
from fedjax_llm.federation.plan import ClientReport, RoundPlan, RoundReport
from fedjax_llm.federation.reporting import check_included, client_reports, with_traffic, with_waste
from fedjax_llm.federation.sampling import round_key, secret_round_key
from fedjax_llm.federation.secured import Ended
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalState, Secrets
from fedjax_llm.types import Local, Params, PyTree, RoundState, Stack, Sum, View

Masked = Callable[[np.ndarray, PyTree, Array], None]
"""Places of clients, their messages [C, ...] and weights f32 [C], of which the first are theirs -> nothing."""


class Moment(NamedTuple):
    """What all chunks of a round share: its number and attempt, the weights, what the server sends, what is trained.

    ``staleness`` tells by client how many steps the server has taken since it began.
    """

    number: int
    attempt: int
    params: Params
    received: PyTree
    live: dict[str, float] | None
    staleness: dict[int, int]


class _Chunk(NamedTuple):
    """The outcome of a chunk of clients: leaves [C, ...] of which the first ``len(reports)`` are real."""

    adapters: PyTree
    kept: dict[str, PyTree]
    messages: PyTree
    weights: Array
    below_clip: Array
    reports: tuple[ClientReport, ...]
    padded_tokens: int


def initial_state(plan: RoundPlan, adapters: PyTree) -> RoundState:
    """The state before the first round. In the setting local every site has adapters of its own, [N, ...]."""
    count, mechanism, algorithm = len(plan.clients), plan.mechanism, plan.aggregation
    own, shared = low_rank.partition(adapters, algorithm.personal)
    client_state: dict[str, PyTree] = {}
    if plan.local.keep_optimizer == "yes":
        client_state["optimizer"] = jax.vmap(plan.trainer.optimizer.init)(trees.repeat(adapters, count))
    if plan.trainer.mix is not None:
        assert mechanism is not None
        client_state["noise"] = trees.repeat(mechanism.correlated.init(trees.zeros(adapters)), count)
    if algorithm.personal is not None:
        client_state["personal"] = trees.repeat(own, count)
    if algorithm.client.init is not None:
        client_state["memory"] = trees.repeat(algorithm.client.init(shared), count)
    if algorithm.own is not None:
        client_state["own"] = trees.repeat(adapters, count)
    if plan.federation.asynchronous is not None and plan.setting == "federated":
        client_state["started"] = trees.repeat(shared, count)
    if plan.codec is not None:
        client_state["compression"] = trees.repeat(plan.codec.init(release.template(plan, adapters)), count)
    if plan.ranks:
        client_state["rank"] = jnp.array(plan.ranks, jnp.int32)
    server_state = algorithm.init(shared)
    privacy_state = release.initial_state(mechanism, trees.zeros(shared))
    if plan.setting == "local":
        shared = trees.repeat(shared, count)
    return RoundState(jnp.int32(0), shared, server_state, client_state, privacy_state)


def run_round(
    plan: RoundPlan, params: Params, state: RoundState, attempt: int = 0, hosts: Hosts = ALONE
) -> tuple[RoundState, RoundReport]:
    """One round.

    Args:
      plan: what stays the same.
      params: the frozen weights.
      state: after the round before.
      attempt: how often this round has been released with other noise before (``privacy/ledger.py``).
      hosts: each trains its own clients; then all take the same step.

    Returns:
      The next state, and a report.

    Raises:
      UserError: without differential privacy, not one client of the cohort came back with a finite update.
    """
    number = int(state.round) + 1
    answers = answers_of(plan, number, attempt)
    slots, cohort, state = slots_of(plan), answers.cohort, meshes.place(plan.trainer.mesh, state)
    moment = moment_of(plan, params, state, answers, number, attempt)
    ended = None
    if hosts.train is not None:
        part, ended = hosts.train(plan, state, cohort, attempt)
    else:
        exchange = secured.begin(plan, state, answers, moment.received, moment.live, attempt)
        mine = cohort[[hosts.owns(int(member)) for member in cohort]] if hosts.count > 1 else cohort
        masked = None if exchange is None else partial(secured.add, exchange)
        part = joined(hosts, plan, state, cohort, run_chunks(plan, moment, state, mine, slots, masked))
        ended = None if exchange is None else secured.end(exchange)
    cohort, view, ideal, adapters, client_state, below_clip, reports, padded_tokens = part
    check_included(plan, number, reports)
    view = release.seen(plan, view, cohort, number)
    if ended is not None:
        view, client_state, reports = ended.view, _kept_if(ended, client_state, state), with_traffic(reports, ended)
    after = RoundState(jnp.int32(number), adapters, state.server_state, client_state, state.privacy_state)
    after = replace(after, **_served(plan, moment, state, view, below_clip))
    if "started" in client_state:
        client_state["started"] = _started(client_state["started"], answers, state.adapters, after.adapters)
    return after, RoundReport(
        clients=tuple(reports),
        tokens=sum(report.tokens for report in reports),
        padded_tokens=padded_tokens,
        update_norm=_distance(after.adapters, state.adapters),
        clip_norm=None if plan.mechanism is None else float(release.clip_norm(plan.mechanism, state.privacy_state)),
        aggregation_error=effective.error(plan, ideal, state, after),
        secure=None if ended is None else ended.report,
        **_in_vain(plan, state, moment, answers, ended),
    )


def run_chunks(
    plan: RoundPlan, moment: Moment, state: RoundState, cohort: np.ndarray, slots: int, masked: Masked | None
) -> Part:
    """Local training of clients, ``slots`` at a time.

    Args:
      plan: of the rounds.
      moment: of the round.
      state: that it begins with.
      cohort: places of the clients among all.
      slots: clients at a time.
      masked: takes their messages, which are to be seen by nobody; ``None``: they are put into the view.
    """
    kind = plan.aggregation.view if plan.corrupt is None else Stack  # attackers see all; the algorithm sees its view
    view, adapters, client_state = release.nothing(plan, state.adapters), state.adapters, dict(state.client_state)
    reports: list[ClientReport] = []
    padded_tokens, below_clip, ideal = 0, jnp.float32(0), effective.nothing(plan, state.adapters)
    for first in range(0, len(cohort), slots):
        members = cohort[first : first + slots]
        index = slots_filled(plan, members, slots)
        chunk = _run_chunk(plan, moment, state, members, index)
        if plan.setting == "local":
            adapters = trees.put(adapters, index, chunk.adapters)
        elif masked is not None:
            masked(members, chunk.messages, chunk.weights)
        else:
            view = release.join(view, kind, chunk.messages, chunk.weights, len(members))
            ideal = effective.join(plan, ideal, chunk.adapters, chunk.weights)
        for name, kept in chunk.kept.items():
            client_state[name] = trees.put(client_state[name], index, kept)
        below_clip += chunk.below_clip
        reports.extend(chunk.reports)
        padded_tokens += chunk.padded_tokens
    return Part(cohort, view, ideal, adapters, client_state, below_clip, reports, padded_tokens)


def _kept_if(ended: Ended, client_state: dict[str, PyTree], before: RoundState) -> dict[str, PyTree]:
    """What clients keep of a round; if it was abandoned, as if it had not been, but for noise, which was drawn."""
    if ended.view is not None:
        return client_state
    return before.client_state | {name: kept for name, kept in client_state.items() if name == "noise"}


def _in_vain(
    plan: RoundPlan, state: RoundState, moment: Moment, answers: Answers, ended: Ended | None
) -> dict[str, Any]:
    """What a report says of clients that were selected in vain; nothing where all answer at once."""
    federation = plan.federation
    if plan.setting != "federated" or (federation.availability is None and federation.asynchronous is None):
        return {}
    message = release.message_like(plan, state)
    ranks = np.asarray(state.client_state.get("rank", ())).tolist()
    found = in_vain(plan, state.adapters, moment.received, message, moment.live, ranks, answers)
    return found if ended is None else found | {"wasted": with_waste(found["wasted"], ended)}


def _started(started: PyTree, answers: Answers, before: PyTree, after: PyTree) -> PyTree:
    """What asynchronous clients train from, [N, ...]: for those who began in this round or begin after it anew."""
    for places, adapters in ((answers.before, before), (answers.after, after)):
        if len(places):
            started = trees.put(started, jnp.asarray(places), trees.repeat(adapters, len(places)))
    return started


def moment_of(
    plan: RoundPlan, params: Params, state: RoundState, answers: Answers, number: int, attempt: int
) -> Moment:
    """What all chunks of a round share.

    Args:
      plan: of the rounds.
      params: the frozen weights.
      state: that the round begins with.
      answers: who takes part.
      number: of the round.
      attempt: at it.
    """
    algorithm, ages = plan.aggregation, zip(answers.cohort.tolist(), answers.staleness.tolist(), strict=True)
    return Moment(
        number=number,
        attempt=attempt,
        params=effective.params(plan, params, state.server_state),
        received=() if algorithm.broadcast is None else algorithm.broadcast(state.server_state),
        live=None if algorithm.live is None else algorithm.live(number),
        staleness=dict(ages),
    )


def _served(
    plan: RoundPlan, moment: Moment, state: RoundState, view: View | None, below_clip: Array
) -> dict[str, PyTree]:
    """What the server makes of its view: the parts of the state that change."""
    if view is None:
        return {}
    privacy_state = state.privacy_state
    if plan.mechanism is not None:
        asked = (moment.number, moment.attempt)
        view, privacy_state = release.noised_sum(plan, view, privacy_state, below_clip, *asked)
        if isinstance(view, Sum) and moment.live is not None:  # no noise where nothing is trained
            live = {name: jnp.float32(on) for name, on in moment.live.items()}
            view = Sum(low_rank.masked(view.total, live), view.weight)
    adapters, server_state = aggregated(plan.aggregation.update, view, state.server_state, state.adapters)
    return {"adapters": adapters, "server_state": server_state, "privacy_state": privacy_state}


def _run_chunk(plan: RoundPlan, moment: Moment, state: RoundState, members: np.ndarray, index: Array) -> _Chunk:
    """Local training of a chunk of the cohort."""
    number, attempt = moment.number, moment.attempt
    clients, slots, algorithm = [plan.clients[i] for i in members], len(index), plan.aggregation
    past = past_rounds(plan, number)
    work = [work_of(plan, int(i), number, attempt, past) for i in members]
    ids = jnp.array([client.id for client in clients] + [0] * (slots - len(clients)))
    keys = _dropout_keys(plan, ids, number, attempt)
    kept = {name: trees.take(tree, index) for name, tree in state.client_state.items()}
    staleness = np.array([moment.staleness[int(i)] for i in members] + [0] * (slots - len(members)))
    local = meshes.place(plan.trainer.mesh, _local(plan, moment, state, index, kept, staleness), meshes.CLIENTS)
    pack_options: dict[str, Any] = {
        "clients": slots,
        "per_token": plan.local.normalise == "token",
        "denominators": public_denominators(plan, members),
        "bins": plan.execution.mesh.bins,
        "share": plan.shared_row,
    }
    batches = list(pack(work, plan.shapes, **pack_options))
    rates = learning_rates(plan.local, work, slots, number, plan.federation.rounds)
    begun = client_update.start(plan.trainer, local.start, kept.get("optimizer"), kept.get("noise", ()))
    secrets = _secrets(plan, ids, index, number, attempt)
    if plan.trunk is not None:  # in microbatches of its own, with less padding than a step's
        plan.trunk.fill([example for batch in batches for example in batch.examples], advance=lambda count: None)
    fixed = (plan.frozen, secrets, plan.trunk)
    trained = {"local": local, "live": moment.live}
    ended = client_update.run(plan.trainer, moment.params, begun, batches, keys, rates, *fixed, **trained)
    own = kept.get("own")
    if algorithm.own is not None:  # Ditto: once more, from its own adapters, pulled towards the server's
        trainer = plan.trainer._replace(proximal=algorithm.own, correct=None)
        alone = client_update.start(trainer, own)
        own = client_update.run(trainer, moment.params, alone, batches, keys, rates, *fixed, local=local).adapters
    probe = ()
    if algorithm.client.probe:
        whole = list(pack([at_once(steps) for steps in work], plan.shapes, **pack_options))
        probe = client_update.probe(plan.trainer, moment.params, local.start, whole, keys, plan.frozen, plan.trunk)
    steps = jnp.array([len(own) for own in work] + [0] * (slots - len(work)), jnp.float32)
    rate = jnp.asarray(plan.local.optimizer.learning_rate * rates.sum(axis=1), jnp.float32)
    outcome = release.Outcome(ended, local, steps, rate, probe)
    updates = release.updates(plan, outcome, jnp.asarray(weights(plan, clients, slots)), state.privacy_state)
    messages = release.staled(plan, updates.messages, staleness)
    messages = release.noised_messages(plan, messages, ids, index, number, attempt)
    messages, lost = release.compressed(plan, messages, kept.get("compression", ()), ids, number, moment.live)
    ranks = np.asarray(local.rank)
    traffic = [traffic_of(plan, state.adapters, moment.received, messages, moment.live, int(rank)) for rank in ranks]
    return _Chunk(
        adapters=trees.select(updates.finite, ended.adapters, local.start),
        kept=_kept(plan, kept, own, lost, begun, ended, local, updates),
        messages=messages,
        weights=updates.weights,
        below_clip=updates.below_clip,
        reports=client_reports(plan, traffic, clients, work, ended.loss, updates, ranks, staleness),
        padded_tokens=sum(batch.tokens.size for batch in batches),
    )


def _local(
    plan: RoundPlan, moment: Moment, state: RoundState, index: Array, kept: dict[str, PyTree], staleness: np.ndarray
) -> Local:
    """What the clients of a chunk begin with, leaves [C, ...]."""
    slots = len(index)
    start = trees.take(state.adapters, index) if plan.setting == "local" else trees.repeat(state.adapters, slots)
    if "started" in kept:
        start = trees.select(jnp.asarray(staleness > 0), kept["started"], start)
    start = low_rank.join(start, kept.get("personal", {}))
    rank = kept.get("rank", jnp.full(slots, low_rank.rank_of(low_rank.join(start, plan.frozen)), jnp.int32))
    if plan.ranks:
        start = jax.vmap(low_rank.truncated)(start, rank)
    return Local(start, kept.get("memory", ()), trees.repeat(moment.received, slots), rank)


def _dropout_keys(plan: RoundPlan, ids: Array, number: int, attempt: int) -> Array:
    """The keys [C] of the clients' dropout in a round."""
    key = round_key(plan.key, number, "dropout")
    if plan.mechanism is not None:
        key = secret_round_key(secret(plan), number, attempt, "dropout")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _kept(
    plan: RoundPlan,
    kept: dict[str, PyTree],
    own: PyTree,
    lost: PyTree,
    begun: LocalState,
    ended: LocalState,
    local: Local,
    updates: release.Updates,
) -> dict[str, PyTree]:
    """What the clients of a chunk keep for the next round; where an update is not finite, as it was."""
    finite, algorithm = updates.finite, plan.aggregation
    # Noise that was drawn is gone, whatever became of the update: its state always moves on.
    after: dict[str, PyTree] = {"noise": ended.noise, "memory": updates.memory, "rank": local.rank}
    after["started"] = kept.get("started")
    after["optimizer"] = trees.select(finite, ended.optimizer, begun.optimizer)
    if algorithm.personal is not None:
        factors, _ = low_rank.partition(ended.adapters, algorithm.personal)
        after["personal"] = trees.select(finite, factors, kept["personal"])
    if algorithm.client.rank is not None and plan.ranks:
        after["rank"] = jnp.where(finite, jax.vmap(algorithm.client.rank)(ended.adapters, local), local.rank)
    if plan.codec is not None:
        # Under a mechanism every client's message counts, and nothing may tell whether its update was finite.
        private = plan.mechanism is not None
        after["compression"] = lost if private else trees.select(finite, lost, kept.get("compression", ()))
    if algorithm.own is not None:
        after["own"] = trees.select(jnp.asarray(trees.finite(own)), own, kept["own"])
    return {name: after[name] for name in kept}


def _secrets(plan: RoundPlan, ids: Array, index: Array, number: int, attempt: int) -> Secrets | None:
    """The keys and the size of the noise that sites add to their steps, where they do."""
    if plan.mechanism is None or plan.mechanism.noised != "steps":
        return None
    return Secrets(*release.site_noise(plan, ids, index, number, attempt))


@partial(jax.jit, static_argnums=0)
def aggregated(
    update: Callable[[View, PyTree, PyTree], tuple[PyTree, PyTree]], view: View, state: PyTree, adapters: PyTree
) -> tuple[PyTree, PyTree]:
    """The server's step, compiled: ``update(view, state, adapters)`` of an algorithm."""
    return update(view, state, adapters)


@jax.jit
def _squared_distance(one: PyTree, other: PyTree) -> Array:
    squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a.astype(jnp.float32) - b)), one, other)
    return jnp.sum(jnp.stack(jax.tree.leaves(squares)))


def _distance(one: PyTree, other: PyTree) -> float:
    """Euclidean distance of two trees."""
    return math.sqrt(float(_squared_distance(one, other)))
