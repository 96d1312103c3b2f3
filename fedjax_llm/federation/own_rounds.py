"""Rounds over a loss function of one's own (``federation/own_loss.py``): a client's examples are rows of its arrays.

There are no token rows here whose adapters could stand side by side: gradients by example are a ``vmap`` of ``grad``.
All else is what rounds of language models do, by the same functions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.errors import UserError
from fedjax_llm.federation import release
from fedjax_llm.federation.cohorts import answers_of, slots_filled, slots_of
from fedjax_llm.federation.local_work import Work, at_once, learning_rates, public_denominators, weights, work_of
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import aggregated, initial_state
from fedjax_llm.privacy import guarantee, statement
from fedjax_llm.privacy.clipping import Clip, clip_units
from fedjax_llm.privacy.events import Event, merge
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import Mechanism, releases
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalState, Secrets, Trainer
from fedjax_llm.types import Local, PyTree, RoundState

Loss = Callable[[PyTree, PyTree], Array]
"""``loss(params, example)``: a scalar, of one example."""


class Job(NamedTuple):
    """What stays the same from round to round.

    Attributes:
      plan: of the rounds; its clients' examples are their numbers, and their units hold one each.
      loss: of the trained modules and one example.
      data: all clients' examples one after another, leaves [n, ...].
      first: int32 [N], where each client's begin.
      privacy: what was asked for.
    """

    plan: RoundPlan
    loss: Loss
    data: PyTree
    first: Array
    privacy: Privacy


@dataclass(frozen=True)
class Report:
    """What happened in a round.

    Attributes:
      number: of the round, from 1.
      losses: mean loss of each client of the cohort over the examples that it trained on, in its local steps; ``None``
        where no example was sampled. No guarantee covers it.
      excluded: clients whose update was not finite, and counts for nothing.
      update_norm: by how much the server's parameters moved.
      clip_norm: the bound on a unit's contribution; ``None`` without differential privacy.
      charged: account -> what was released about it up to this round; it adds up with other runs on the same data.
      privacy: what was asked for.
      mechanism: with its noise; ``None`` without differential privacy.
    """

    number: int
    losses: Mapping[str, float | None]
    excluded: tuple[str, ...]
    update_norm: float
    clip_norm: float | None
    charged: Mapping[str, tuple[Event, ...]]
    privacy: Privacy
    mechanism: Mechanism | None

    @property
    def loss(self) -> float | None:
        """The mean of the clients' losses, each counted once; ``None`` where nobody trained."""
        found = [loss for loss in self.losses.values() if loss is not None]
        return sum(found) / len(found) if found else None

    def epsilons(self) -> dict[str, float]:
        """Epsilon by account, of all rounds up to this one; accounting takes a moment. Empty without a mechanism."""
        if self.mechanism is None:
            return {}
        return guarantee.spent(self.mechanism, self.charged, self.privacy.delta, self.privacy.accountant)

    def guarantee(self) -> str:
        """What may be said about these rounds' privacy, in one sentence."""
        if self.mechanism is None:
            return "no differential privacy"
        return statement.line(self.mechanism.unit, self.privacy.delta, self.epsilons())


class _Steps(NamedTuple):
    """The local steps of a chunk of clients.

    Attributes:
      places: int32 [S, C, B], of the examples in the job's data.
      taken: bool [S, C, B]: which of the places count.
      finished: bool [S, C]: which steps are taken.
      divide: f32 [S, C], what a step's sums are divided by.
      rates: f32 [S, C], factors of the base learning rate.
    """

    places: Array
    taken: Array
    finished: Array
    divide: Array
    rates: Array


class _Chunk(NamedTuple):
    """The outcome of a chunk of clients."""

    updates: release.Updates
    messages: PyTree
    kept: dict[str, PyTree]
    losses: dict[str, float | None]


def rounds(job: Job, modules: PyTree) -> Iterator[tuple[PyTree, Report]]:
    """All rounds: the server's modules after each, and what happened."""
    plan, state = job.plan, initial_state(job.plan, modules)
    charged: dict[str, tuple[Event, ...]] = {}
    for number in range(1, plan.federation.rounds + 1):
        cohort = answers_of(plan, number, attempt=0).cohort
        if plan.mechanism is not None:
            events = releases(plan.mechanism, [plan.clients[place].name for place in cohort])
            charged = charged | {name: merge((*charged.get(name, ()), event)) for name, event in events.items()}
            if _exceeded(job, charged):
                return
        state, report = _run_round(job, state, cohort, charged)
        yield state.adapters, report


def _exceeded(job: Job, charged: Mapping[str, tuple[Event, ...]]) -> bool:
    """Whether a round must not run. Noise that was calibrated to the budget keeps it by itself."""
    privacy, mechanism = job.privacy, job.plan.mechanism
    assert mechanism is not None
    if privacy.budget is None or (privacy.target_epsilon is not None and privacy.budget >= privacy.target_epsilon):
        return False
    spent = guarantee.spent(mechanism, charged, privacy.delta, privacy.accountant)
    return max(spent.values()) > privacy.budget


def _run_round(
    job: Job, state: RoundState, cohort: np.ndarray, charged: Mapping[str, tuple[Event, ...]]
) -> tuple[RoundState, Report]:
    """One round."""
    plan, number, slots = job.plan, int(state.round) + 1, slots_of(job.plan)
    view, kept, below_clip = release.nothing(plan, state.adapters), dict(state.client_state), jnp.float32(0)
    losses: dict[str, float | None] = {}
    excluded: list[str] = []
    for start in range(0, len(cohort), slots):
        members = cohort[start : start + slots]
        index = slots_filled(plan, members, slots)
        chunk = _run_chunk(job, state, members, index, number)
        view = release.join(view, plan.aggregation.view, chunk.messages, chunk.updates.weights, len(members))
        kept = {name: trees.put(tree, index, chunk.kept[name]) for name, tree in kept.items()}
        below_clip += chunk.updates.below_clip
        losses |= chunk.losses
        finite = np.asarray(chunk.updates.finite)[: len(members)]
        excluded += [plan.clients[place].name for place in members[~finite]]
    if plan.mechanism is None and len(excluded) == len(cohort):
        raise UserError(
            f"round {number}: not one client came back with a finite update (of {len(cohort)}). Lower "
            "training.optimizer.learning_rate, and look for values in the data that are not finite"
        )
    view = release.seen(plan, view, cohort, number)
    view, privacy_state = release.noised_sum(plan, view, state.privacy_state, below_clip, number, attempt=0)
    adapters, server_state = aggregated(plan.aggregation.update, view, state.server_state, state.adapters)
    bound = None if plan.mechanism is None else float(release.clip_norm(plan.mechanism, state.privacy_state))
    moved = float(trees.norms(trees.repeat(trees.subtract(adapters, state.adapters), 1))[0])
    report = Report(number, losses, tuple(excluded), moved, bound, charged, job.privacy, plan.mechanism)
    return RoundState(jnp.int32(number), adapters, server_state, kept, privacy_state), report


def _run_chunk(job: Job, state: RoundState, members: np.ndarray, index: Array, number: int) -> _Chunk:
    """Local training of a chunk of the cohort, and what leaves the clients."""
    plan, slots, rule = job.plan, len(index), job.plan.aggregation.client
    clients = [plan.clients[place] for place in members]
    work = [work_of(plan, int(place), number, 0, past=None) for place in members]
    ids = jnp.array([client.id for client in clients] + [0] * (slots - len(clients)))
    kept = {name: trees.take(tree, index) for name, tree in state.client_state.items()}
    received = () if plan.aggregation.broadcast is None else plan.aggregation.broadcast(state.server_state)
    local = Local(
        start=trees.repeat(state.adapters, slots),
        memory=kept.get("memory", ()),
        received=trees.repeat(received, slots),
        rank=jnp.zeros(slots, jnp.int32),
    )
    steps = _steps(job, members, work, slots, number)
    begun = client_update.start(plan.trainer, local.start, kept.get("optimizer"), kept.get("noise", ()))
    secrets = None
    if plan.trainer.noisy:
        secrets = Secrets(*release.site_noise(plan, ids, index, number, attempt=0))
    ended = _trained(job.loss, plan.trainer, job.data, begun, steps, local, secrets)
    probe = ()
    if rule.probe:
        whole = _steps(job, members, [at_once(own) for own in work], slots, number, probe=True)
        probe = _probed(job.loss, job.data, local.start, whole)
    taken = jnp.array([len(own) for own in work] + [0] * (slots - len(work)), jnp.float32)
    rate = plan.local.optimizer.learning_rate * jnp.sum(steps.rates * steps.finished, axis=0)
    outcome = release.Outcome(ended, local, taken, rate, probe)
    updates = release.updates(plan, outcome, jnp.asarray(weights(plan, clients, slots)), state.privacy_state)
    after = {"noise": ended.noise, "memory": updates.memory}
    after["optimizer"] = trees.select(updates.finite, ended.optimizer, begun.optimizer)
    counts = [sum(map(len, own)) for own in work]
    sums = zip(clients, np.asarray(ended.loss).tolist(), counts, strict=False)
    return _Chunk(
        updates=updates,
        messages=release.noised_messages(plan, updates.messages, ids, index, number, attempt=0),
        kept={name: after[name] for name in kept},
        losses={client.name: total / count if count else None for client, total, count in sums},
    )


def _steps(job: Job, members: np.ndarray, work: Sequence[Work], slots: int, number: int, probe: bool = False) -> _Steps:
    """The clients' batches as arrays whose shapes are the same from round to round, or nearly."""
    plan = job.plan
    count = 1 if probe else _most_steps(plan)
    largest = max((len(batch) for own in work for batch in own), default=0)
    width = 2 ** math.ceil(math.log2(max(largest, 1)))  # Poisson samples differ in size: few shapes are compiled
    if plan.mechanism is None and not probe:
        width = largest
    places, taken = np.zeros((count, slots, width), np.int32), np.zeros((count, slots, width), bool)
    finished, divide = np.zeros((count, slots), bool), np.ones((count, slots), np.float32)
    public, first = public_denominators(plan, members), np.asarray(job.first)
    for c, (member, own) in enumerate(zip(members, work, strict=True)):
        for s, batch in enumerate(own):
            rows = [unit[0] if isinstance(unit, tuple) else unit for unit in batch]
            places[s, c] = first[member]
            places[s, c, : len(rows)] += np.asarray(rows, np.int32)
            taken[s, c, : len(rows)] = True
            divide[s, c] = max(len(rows), 1) if public is None else public[c]
        finished[: len(own), c] = True
    rates = np.zeros((count, slots), np.float32)
    if not probe:
        found = learning_rates(plan.local, work, slots, number, plan.federation.rounds).T
        rates[: len(found)] = found
    return _Steps(*map(jnp.asarray, (places, taken, finished, divide, rates)))


def _most_steps(plan: RoundPlan) -> int:
    """Local steps of the client that takes the most."""
    local = plan.local
    if local.local_epochs is None:
        return local.local_steps
    return max(-(-len(client.examples) // local.batch_size) for client in plan.clients) * local.local_epochs


@partial(jax.jit, static_argnums=(0, 1))
def _trained(
    loss: Loss,
    trainer: Trainer,
    data: PyTree,
    state: LocalState,
    steps: _Steps,
    local: Local,
    secrets: Secrets | None,
) -> LocalState:
    """The clients after a round's local steps."""
    count, slots = steps.finished.shape

    def one(state: LocalState, inputs: tuple[Array, _Steps]) -> tuple[LocalState, None]:
        number, now = inputs
        losses, gradients = _summed(loss, trainer.clip, data, state.adapters, now)
        state = state._replace(gradients=gradients, loss=state.loss + losses)
        numbers = jnp.full(slots, number)
        return client_update.step(trainer, state, local, now.finished, now.divide, now.rates, numbers, secrets), None

    return jax.lax.scan(one, state, (jnp.arange(count), steps))[0]


@partial(jax.jit, static_argnums=0)
def _probed(loss: Loss, data: PyTree, adapters: PyTree, steps: _Steps) -> tuple[Array, PyTree]:
    """Mean loss [C] and gradient [C, ...] of all of a round's examples where the clients start."""
    now = jax.tree.map(lambda leaf: leaf[0], steps)
    losses, gradients = _summed(loss, None, data, adapters, now)
    return losses / now.divide, jax.tree.map(lambda g: jax.vmap(jnp.divide)(g, now.divide), gradients)


def _summed(loss: Loss, clip: Clip | None, data: PyTree, adapters: PyTree, now: _Steps) -> tuple[Array, PyTree]:
    """What one step adds to its clients' sums: losses [C], and gradients [C, ...], clipped by example if at all."""

    def plain(own: PyTree, examples: PyTree, taken: Array) -> tuple[Array, PyTree]:
        def total(own: PyTree) -> Array:
            return jnp.sum(jnp.where(taken, jax.vmap(loss, (None, 0))(own, examples), 0.0))

        return jax.value_and_grad(total)(own)

    def clipped(own: PyTree, examples: PyTree, taken: Array) -> tuple[Array, PyTree]:
        assert clip is not None
        losses, gradients = jax.vmap(jax.value_and_grad(loss), (None, 0))(own, examples)
        bounded = clip_units(gradients, clip)
        return jnp.sum(jnp.where(taken, losses, 0.0)), trees.weighted_sum(taken.astype(jnp.float32), bounded)

    losses, gradients = jax.vmap(plain if clip is None else clipped)(adapters, trees.take(data, now.places), now.taken)
    return losses.astype(jnp.float32), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
