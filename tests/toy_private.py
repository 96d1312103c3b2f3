"""Private plans over the toy sites, and the same rounds as plain loops over sites, steps, units and examples."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tiny import tiny_adapters, tiny_model
from toy_rounds import KEY, LAYOUTS, SCALING, Sites, plain_loss, toy_example, toy_sites

from fedjax_llm import lora
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.experiment.planning import trainer_of
from fedjax_llm.federation.clients import clients_of, local_training_of
from fedjax_llm.federation.plan import Federation, RoundPlan, RoundReport
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.federation.sampling import (
    round_key,
    sample_clients,
    sample_cohort,
    sample_steps,
    sample_units,
    secret_round_key,
)
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.mechanism import Budget, MechanismConfig, Population, Regime
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Aggregation, Params, PyTree, RoundState, Stack, Sum

CLIP = 2.0  # the toy examples' gradients have norms of 1.5 to 6
ROWS = 4  # of the largest toy patient
SECRET = noise.run_key("reproducible", 5)


@cache
def private_sites(examples_of_record: int = 2) -> Sites:
    """The toy sites with this many examples a record and two records a patient, as far as they last."""
    return tuple(
        (
            name,
            tuple(
                replace(
                    example,
                    record_id=f"{name} record {i // examples_of_record}",
                    owner=f"{name} patient {i // (2 * examples_of_record)}",
                )
                for i, example in enumerate(examples)
            ),
        )
        for name, examples in toy_sites()
    )


class Base(NamedTuple):
    """What is trained, and on what: model, weights, trained and frozen factors, and whether the trunk is kept."""

    model: CausalLM
    params: Params
    adapters: Adapters
    frozen: Adapters
    trunk: bool


@cache
def toy_base(kind: str = "whole", dropout: float = 0.0) -> Base:
    """``whole``: both factors; ``b``: one factor; ``upper``: adapters above a layer whose states are kept."""
    model, params = tiny_model(layers=2 if kind == "upper" else 1, dropout=dropout)
    return Base(model, params, *toy_adapters(kind), kind == "upper")


def toy_adapters(kind: str = "whole", seed: int = 1) -> tuple[Adapters, Adapters]:
    """The trained and the frozen factors of a base, none of them zero."""
    model, _ = tiny_model(layers=2 if kind == "upper" else 1)
    adapters = tiny_adapters(model, seed=seed, targets=("q_proj", "down_proj"))
    if kind == "upper":
        adapters = {path: factors for path, factors in adapters.items() if path.startswith("layers.1.")}
    return lora.split(adapters, "b" if kind == "b" else "both")


@cache
def toy_optimizer(name: str, rate: float) -> optax.GradientTransformation:
    """Cached, since every other transformation compiles anew."""
    return Optimizer(name, rate).make()


@cache
def fedavg(server_lr: float = 1.0) -> Aggregation:
    """Cached likewise."""
    return FedAvg(server_lr).make()


@cache
def private_shapes(layout: str, rows_of_unit: int) -> tuple[Shape, ...]:
    """Those of all examples with at most 13 targets."""
    examples = [example for _, examples in toy_sites() for example in examples] + [toy_example(0, 14, 0)]
    execution = LAYOUTS[layout]
    sizes = {"tokens_per_microbatch": execution.tokens_per_microbatch, "buckets": execution.buckets}
    return choose_shapes(examples, rows_of_unit=rows_of_unit, **sizes)


def private_plan(
    config: MechanismConfig,
    unit: str,
    local: LocalTraining,
    *,
    setting: str = "federated",
    layout: str = "together",
    cohort: int = 3,
    weighting: str = "uniform",
    aggregation: Aggregation | None = None,
    base: str = "whole",
    dropout: float = 0.0,
    sites: Sites | None = None,
) -> RoundPlan:
    """A plan over the private sites that its mechanism has accepted."""
    found, sites = toy_base(base, dropout), sites or private_sites()
    clients = clients_of(setting, sites, unit)
    local, optimizer = local_training_of(setting, local, cohort), local.optimizer
    regime = Regime(
        setting=setting,
        unit=unit,
        rounds=2,
        cohort=cohort,
        weighting=weighting,
        batch_size=local.batch_size,
        local_steps=local.local_steps,
        local_epochs=local.local_epochs,
        normalise=local.normalise,
        optimizer=optimizer.name,
        learning_rate=optimizer.learning_rate,
        constant_rate=True,
        proximal=local.proximal,
        adapter_dtype="float32",
        server_view="Sum",
    )
    config.check(regime)
    each = (2,) * len(clients)
    units = tuple(len(client.units) for client in clients)
    mechanism = config.make(regime, Population(tuple(c.name for c in clients), units, each, each), Budget(None, 1e-5))
    trainer = trainer_of(found.model, SCALING, local, local.proximal, mechanism)
    shapes = private_shapes(layout, ROWS if trainer.grouped else 1)
    return RoundPlan(
        setting=setting,
        trainer=trainer._replace(optimizer=toy_optimizer(optimizer.name, optimizer.learning_rate)),
        aggregation=aggregation or fedavg(),
        federation=Federation(rounds=2, weighting=weighting),
        local=local,
        execution=LAYOUTS[layout],
        shapes=shapes,
        clients=clients,
        cohort=1 if setting == "centralised" else cohort,
        key=KEY,
        frozen=found.frozen,
        mechanism=mechanism,
        secret_key=SECRET,
        trunk=TrunkCache(found.model, found.params, 1, shapes, 2**20) if found.trunk else None,
    )


def play_privately(
    plan: RoundPlan, base: str = "whole", rounds: int = 2, attempt: int = 0
) -> tuple[RoundState, list[RoundReport]]:
    """Plays rounds from the toy adapters."""
    state, reports = initial_state(plan, toy_base(base).adapters), []
    for _ in range(rounds):
        state, report = run_round(plan, toy_base(base).params, state, attempt)
        reports.append(report)
    return state, reports


def length(tree: PyTree) -> float:
    """Euclidean norm in float64."""
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


def clipped(tree: PyTree, clip: Clip, norm: float) -> PyTree:
    """One unit's contribution, bounded in float64."""
    groups = [[path] for path in tree] if clip.scope == "layers" else [list(tree)]
    share = norm / np.sqrt(len(groups))
    factor = {path: min(1.0, share / length([tree[p] for p in paths])) for paths in groups for path in paths}
    return {path: jax.tree.map(lambda leaf, f=factor[path]: f * np.asarray(leaf), part) for path, part in tree.items()}


def unit_gradient(base: Base, adapters: PyTree, examples: Sequence[EncodedExample]) -> PyTree:
    """Of the mean over a unit's examples of the mean over their targets, example by example."""
    whole = {path: {**base.frozen.get(path, {}), **factors} for path, factors in adapters.items()}
    total = jax.tree.map(np.zeros_like, adapters)
    for example in examples:
        share = 1 / ((len(example.tokens) - max(example.prompt_length, 1)) * len(examples))
        _, slope = plain_loss(base.model, base.params, whole, example.tokens, example.prompt_length)
        own = {path: {name: slope[path][name] for name in factors} for path, factors in adapters.items()}
        total = jax.tree.map(lambda t, g, w=share: t + w * np.asarray(g), total, own)
    return total


_gaussian = jax.jit(noise.gaussian)
_update = jax.jit(lambda optimizer, mean, memory, adapters: optimizer.update(mean, memory, adapters), static_argnums=0)


def _plain_client(
    plan: RoundPlan, base: Base, c: int, moment: tuple[int, int], adapters: PyTree, memory: PyTree
) -> tuple[PyTree, PyTree]:
    """A client's local steps of a round and attempt: adapters and optimiser state after them."""
    client, mechanism, local = plan.clients[c], plan.mechanism, plan.local
    sampled = mechanism.clipped == "gradients"
    if sampled:
        key = jax.random.fold_in(secret_round_key(plan.secret_key, *moment, "units"), client.id)
        chances = (float(mechanism.sampling[c]), local.local_steps, mechanism.examples_per_unit)
        batches = sample_units(key, client.units, *chances)
    else:
        key = jax.random.fold_in(round_key(plan.key, moment[0], "order"), client.id)
        batches = sample_steps(key, client.examples, local.batch_size, local.local_steps, None)
        batches = [[(example,) for example in batch] for batch in batches]
    site_key = jax.random.fold_in(secret_round_key(plan.secret_key, *moment, "site noise"), client.id)
    for number, batch in enumerate(batches):
        total = jax.tree.map(np.zeros_like, adapters)
        for unit in batch:
            gradient = unit_gradient(base, adapters, unit)
            if sampled:
                gradient = clipped(gradient, mechanism.clip, mechanism.clip.norm)
            total = jax.tree.map(np.add, total, gradient)
        if mechanism.noised == "steps":
            stddev = float(mechanism.stddev[c]) * mechanism.clip.norm
            drawn = _gaussian(noise.step_key(site_key, number), base.adapters, stddev)
            total = jax.tree.map(np.add, total, drawn)
        divisor = mechanism.denominators[c] if sampled else len(batch)
        mean = jax.tree.map(lambda leaf, d=divisor: np.asarray(leaf / d, np.float32), total)
        updates, memory = _update(plan.trainer.optimizer, mean, memory, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return adapters, memory


def _plain_weight(plan: RoundPlan, c: int) -> float:
    """Of a client in the sum."""
    mechanism, client = plan.mechanism, plan.clients[c]
    if mechanism.noised == "sum":
        return mechanism.site_weights(len(client.examples)) if mechanism.site_weights else 1.0
    if plan.federation.weighting == "uniform":
        return 1.0
    return len(client.units) if mechanism.clipped == "gradients" else len(client.examples)


def _plain_cohort(plan: RoundPlan, number: int, attempt: int) -> Sequence[int]:
    """Who takes part."""
    if plan.mechanism.cohort_probability is None:
        return sample_cohort(round_key(plan.key, number, "cohort"), len(plan.clients), plan.cohort)
    key = secret_round_key(plan.secret_key, number, attempt, "cohort")
    return sample_clients(key, len(plan.clients), plan.mechanism.cohort_probability)


def play_plainly_in_private(
    plan: RoundPlan, base: str = "whole", rounds: int = 2, server_lr: float = 1.0, attempt: int = 0
) -> tuple[Any, float]:
    """The rounds as loops, with FedAvg at the server: adapters (in the setting local [N, ...]) and clip norm after."""
    found, mechanism = toy_base(base), plan.mechanism
    server, norm, memories = found.adapters, mechanism.clip.norm, {}
    own = dict.fromkeys(range(len(plan.clients)), found.adapters)
    for number in range(1, rounds + 1):
        moment, total, weights, below = (number, attempt), jax.tree.map(np.zeros_like, server), 0.0, 0.0
        for c in map(int, _plain_cohort(plan, number, attempt)):
            start = own[c] if plan.setting == "local" else server
            fresh = plan.local.keep_optimizer == "no" or c not in memories
            memory = plan.trainer.optimizer.init(start) if fresh else memories[c]
            own[c], memories[c] = _plain_client(plan, found, c, moment, start, memory)
            delta = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), own[c], start)
            if mechanism.clipped == "deltas":
                below += (length(delta) <= norm) - 0.5
                delta = clipped(delta, mechanism.clip, norm)
            if mechanism.noised == "deltas":
                key = secret_round_key(plan.secret_key, *moment, "site noise")
                stddev = float(mechanism.stddev[c]) * norm
                drawn = _gaussian(jax.random.fold_in(key, plan.clients[c].id), delta, stddev)
                delta = jax.tree.map(np.add, delta, drawn)
            weight = _plain_weight(plan, c)
            total, weights = jax.tree.map(lambda t, d, w=weight: t + w * d, total, delta), weights + weight
        if mechanism.noised == "sum":
            key = secret_round_key(plan.secret_key, *moment, "sum noise")
            total = jax.tree.map(np.add, total, _gaussian(key, total, norm * float(mechanism.stddev[0])))
            weights = mechanism.weight
        if mechanism.adaptive is not None:
            key = secret_round_key(plan.secret_key, *moment, "count noise")
            count = below + mechanism.adaptive.count_noise * float(jax.random.normal(key))
            excess = count / plan.cohort + 0.5 - mechanism.adaptive.quantile
            norm *= float(np.exp(-mechanism.adaptive.learning_rate * excess))
        server = jax.tree.map(lambda s, t, w=weights: np.asarray(s + server_lr * t / w, np.float32), server, total)
    if plan.setting == "local":
        server = jax.tree.map(lambda *leaves: np.stack(leaves), *own.values())
    return server, norm


def distance(one: PyTree, other: PyTree) -> float:
    """The largest difference of two numbers in the same place."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def silent(plan: RoundPlan) -> RoundPlan:
    """The plan without any noise, for what it releases apart from noise."""
    mechanism = plan.mechanism
    return plan._replace(mechanism=mechanism._replace(stddev=np.zeros_like(mechanism.stddev)))


SHOW = {
    view: Aggregation(init=lambda adapters: (), update=lambda shown, state, adapters: (adapters, shown), view=view)
    for view in (Sum, Stack)
}
"""Leaves the adapters as they are; its state is the view that it was shown last."""
