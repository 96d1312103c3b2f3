"""Rounds whose every gradient is known, and checks that right mechanisms pass and broken ones do not.

The model's loss is linear in the adapters, so an example's gradient is what a table says, in every round and step: what
the adapters move by is the release itself, and everything between gradient and adapters is the code that trains.

Each name that a statistical check can return comes up for right code with probability ``ALPHA`` at most.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import exp, sqrt
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy import stats

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.data.packing import Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.experiment.planning import trainer_of
from fedjax_llm.federation import release, rounds
from fedjax_llm.federation.clients import clients_of, local_training_of
from fedjax_llm.federation.plan import Execution, Federation, RoundPlan, RoundReport
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.mechanism import EVERY_SITE, Budget, MechanismConfig, Population, Regime
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import Adapters, Aggregation, PyTree, RoundState, Stack

ALPHA = 1e-6
CLIP = 0.5
SHAPES = {name: {"a": (60, 40), "b": (40, 60)} for name in ("one", "two")}
ZERO, UP, DOWN, MODEST, ODD = range(5)
"""Gradients: none; above the clip norm; ten times as far in the opposite direction; below it; above it elsewhere."""
Sites = Mapping[str, Sequence[EncodedExample]]
_COMPILED_WITH = {
    "gaussian": (client_update.step, release._noised_messages, release._noised_sum),
    "step_key": (client_update.step,),
    "clip_units": (client_update._accumulate, release._updates),
    "example_gradients": (client_update._accumulate,),
}


@dataclass(frozen=True)
class Linear:
    """In place of a ``CausalLM``: an example's loss is the product of the adapters and the row of its first token."""

    dropout: float = 0.0

    def hidden(
        self, params: PyTree, adapters: Adapters, tokens: Array, dropout_keys: None = None, below: None = None
    ) -> Array:
        """[M, L, 1]: the loss of each row, at all of its positions."""
        slopes = jax.tree.map(lambda leaf, table: jnp.sum(leaf * table[tokens[:, 0]], (1, 2)), adapters, params)
        return jnp.broadcast_to(sum(jax.tree.leaves(slopes))[:, None, None], (*tokens.shape, 1))

    def logits(self, params: PyTree, hidden: Array) -> Array:
        """[K, 2], of which the second is so unlikely that its negative logarithm is the difference of both."""
        return jnp.concatenate([hidden + 1e4, jnp.zeros_like(hidden)], -1)


@cache
def gradients() -> PyTree:
    """The table of ZERO to ODD: module -> factor -> [5, ...]; every factor holds a part of each gradient."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    one, other = np.random.default_rng(0).normal(size=(2, sum(map(np.prod, leaves))))
    rows = np.stack([0 * one, 5 * one, -50 * one, 0.9 * one, 1.7 * other * np.linalg.norm(one) / np.linalg.norm(other)])
    rows *= CLIP / np.linalg.norm(one)
    parts = np.split(rows, np.cumsum([np.prod(shape) for shape in leaves])[:-1], axis=1)
    tables = [jnp.asarray(part.reshape(-1, *shape), jnp.float32) for part, shape in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, tables)


def example(name: str, kind: int, length: int = 2, owner: str | None = None) -> EncodedExample:
    """An example of ``length - 1`` targets whose gradient is row ``kind`` of the table."""
    return EncodedExample(name, np.array([kind] + [1] * (length - 1), np.int32), 1, owner)


def sites_of(**kinds: Sequence[int]) -> Sites:
    """Sites with an example of each of these kinds."""
    return {site: [example(f"{site}-{i}", kind) for i, kind in enumerate(own)] for site, own in kinds.items()}


@cache
def _sgd(rate: float) -> optax.GradientTransformation:
    """Cached, since every other transformation compiles anew."""
    return Optimizer("sgd", rate).make()


def plan_of(
    config: MechanismConfig,
    sites: Sites,
    *,
    unit: str = "record",
    setting: str = "federated",
    number: int = 4,
    steps: int = 1,
    rate: float = 1.0,
    cohort: int | None = None,
    batch_size: int = 10**6,
    weighting: str = "uniform",
    aggregation: Aggregation | None = None,
    rows: int = 8,
    seed: int = 0,
    epsilon: float | None = None,
    turns: tuple[int, int] | None = None,
) -> RoundPlan:
    """A plan over the sites, whose mechanism is made for them as an experiment makes it.

    Args:
      config: the mechanism's parameters.
      sites: name -> examples.
      unit: of privacy.
      setting: of the run.
      number: of rounds.
      steps: local ones a round.
      rate: of the clients' plain gradient descent.
      cohort: sites a round.
      batch_size: units a step on average, where they are sampled; all of them unless given.
      weighting: of the sites.
      aggregation: FedAvg unless given.
      rows: of a microbatch.
      seed: of cohorts, samples and noise.
      epsilon: that noise is calibrated to (by RDP, which is quick), at delta 1e-3.
      turns: in how many rounds a site takes part, and how far apart; in every one unless given.
    """
    optimizer = ("sgd", rate, True, 0.0, "float32", "Sum")
    regime = Regime(setting, unit, number, cohort, weighting, batch_size, steps, None, "example", *optimizer)
    clients = clients_of(setting, [(name, tuple(own)) for name, own in sites.items()], unit)
    units = tuple(len(client.units) for client in clients)
    attending = ((count,) * len(clients) for count in turns or (number, 1))
    config.check(regime)
    names = tuple(client.name for client in clients)
    mechanism = config.make(regime, Population(names, units, *attending), Budget(epsilon, 1e-3, "rdp"))
    local = local_training_of(setting, LocalTraining(4, steps, optimizer=Optimizer("sgd", rate)), len(sites))
    return RoundPlan(
        setting=setting,
        trainer=trainer_of(Linear(), 1.0, local, 0.0, mechanism)._replace(optimizer=_sgd(rate)),
        aggregation=aggregation or _FEDAVG,
        federation=Federation(number, cohort, weighting),
        local=local,
        execution=Execution(clients_per_chunk=3),
        shapes=(Shape(rows, 8, max(64, rows)),),
        clients=clients,
        cohort=cohort or len(clients),
        key=jax.random.key(seed),
        mechanism=mechanism,
        secret_key=noise.run_key("reproducible", seed),
    )


_FEDAVG = FedAvg().make()
UPLOADS = Aggregation(lambda adapters: (), lambda view, state, adapters: (adapters, view), Stack)
"""Keeps the server's adapters, and the last uploads as its state."""


def play(
    plan: RoundPlan, number: int = 1, table: PyTree | None = None, attempt: int = 0
) -> tuple[list[RoundState], list[RoundReport]]:
    """Rounds from adapters of zeros: the states after each, and the reports."""
    table = gradients() if table is None else table
    state = rounds.initial_state(plan, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), table))
    states, reports = [], []
    for _ in range(number):
        state, report = rounds.run_round(plan, table, state, attempt)
        states.append(state)
        reports.append(report)
    return states, reports


def silent(plan: RoundPlan) -> RoundPlan:
    """The plan with all noise of standard deviation zero, and the same samples."""
    assert plan.mechanism is not None
    return plan._replace(mechanism=plan.mechanism._replace(stddev=0 * plan.mechanism.stddev))


def moves(plan: RoundPlan, number: int = 1, attempt: int = 0) -> np.ndarray:
    """f64 [rounds, (clients,) leaves, N]: what each round adds to the adapters (or uploads, for :data:`UPLOADS`)."""
    states, _ = play(plan, number, attempt=attempt)
    if plan.aggregation is UPLOADS:
        return np.stack([_flat(state.server_state.messages, 1) for state in states])
    flat = np.stack([_flat(state.adapters, int(plan.setting == "local")) for state in states])
    return np.diff(flat, axis=0, prepend=0)


def noise_of(plan: RoundPlan, number: int = 1, attempt: int = 0) -> np.ndarray:
    """f64 [rounds, (clients,) leaves, N]: what noise adds to the adapters in each round."""
    return moves(plan, number, attempt) - moves(silent(plan), number, attempt)


def claimed_noise(plan: RoundPlan, rate: float = 1.0) -> np.ndarray:
    """Standard deviation of a round's noise in the adapters, by what the events claim: [C], or a scalar for a sum."""
    mechanism = plan.mechanism
    assert mechanism is not None
    if EVERY_SITE in mechanism.events:
        return np.array(mechanism.events[EVERY_SITE].noise_multiplier * CLIP / plan.cohort)
    multipliers = np.array([mechanism.events[client.name].noise_multiplier for client in plan.clients])
    if mechanism.clipped == "deltas":  # any data of a site in place of any other: two clip norms
        return 2 * multipliers * CLIP
    batches = [mechanism.events[client.name].sampling_probability * len(client.units) for client in plan.clients]
    if mechanism.noised == "sum":
        return multipliers[0] * CLIP * rate / np.sum(batches)
    return sqrt(plan.local.local_steps) * multipliers * CLIP * rate / np.array(batches)


def noise_problems(streams: np.ndarray, stddev: np.ndarray | float) -> set[str]:
    """What is wrong with streams [..., S, N] that should be independent normals.

    ``variance``: chi-square, each stream by itself and all together; ``normality``: Kolmogorov-Smirnov;
    ``dependence``: correlation of each pair of streams, by Fisher's transformation; all with Bonferroni's correction.
    ``values``: of some thousand float32 normals hardly two coincide, and 5 % never do.

    Args:
      streams: what is checked.
      stddev: broadcast against [..., S, 1].
    """
    size, found = streams.shape[-1], set()
    draws = (streams / stddev).reshape(-1, size)
    squares = np.append(np.square(draws).sum(-1), np.square(draws).sum())
    chi = stats.chi2(np.append(np.full(len(draws), size), draws.size))
    if (2 * np.minimum(chi.cdf(squares), chi.sf(squares))).min() * len(squares) < ALPHA:
        found.add("variance")
    if stats.kstest(np.unique(draws, axis=0).ravel(), "norm").pvalue < ALPHA:
        found.add("normality")
    if len(draws) > 1:
        with np.errstate(invalid="ignore"):  # a stream of zeros, which has no variance
            pairs = np.nan_to_num(np.corrcoef(draws))[np.triu_indices(len(draws), 1)]
        scores = np.abs(np.arctanh(np.clip(pairs, -1 + 1e-12, 1 - 1e-12))) * sqrt(size - 3)
        if 2 * stats.norm.sf(scores.max()) * len(pairs) < ALPHA:
            found.add("dependence")
    if min(len(np.unique(draw.astype(np.float32))) for draw in draws) < 0.95 * size:
        found.add("values")
    return found


def joined(plan: RoundPlan, newcomers: Sequence[EncodedExample]) -> RoundPlan:
    """The plan on the neighbouring data: a unit more at the first site, or a site more under the unit ``site``."""
    assert plan.mechanism is not None
    first, *others = plan.clients
    if plan.mechanism.unit == "site":
        (more,) = clients_of("federated", [("newcomer", tuple(newcomers))], "site")
        return plan._replace(clients=(*plan.clients, more), cohort=plan.cohort)
    larger = replace(first, examples=(*first.examples, *newcomers), units=(*first.units, tuple(newcomers)))
    return plan._replace(clients=(larger, *others))


def sensitivity_of(plan: RoundPlan, newcomers: Sequence[EncodedExample], rate: float = 1.0) -> float:
    """How far a unit more moves a noiseless round, over the standard deviation per noise multiplier: at most 1."""
    quiet, mechanism = silent(plan), plan.mechanism
    assert mechanism is not None
    distance = np.linalg.norm(moves(joined(quiet, newcomers)) - moves(quiet))
    event = next(iter(mechanism.events.values()))
    unit_noise = claimed_noise(plan, rate).flat[0] / event.noise_multiplier / sqrt(plan.local.local_steps)
    return float(distance / unit_noise)


def sampling_problems(taken: np.ndarray, probability: float) -> set[str]:
    """What is wrong with samples [S, U] that should hold every unit in every step with this probability by itself.

    ``rate``: how many were sampled in all, binomial; ``size``: the spread of the batch sizes, chi-square;
    ``again``: how many units of one step are in the next, binomial.
    """
    steps, units = taken.shape
    found = set()
    if stats.binomtest(int(taken.sum()), taken.size, probability).pvalue < ALPHA:
        found.add("rate")
    variance = units * probability * (1 - probability)
    # As many degrees of freedom as give the mean and the variance that squared binomials have.
    freedom = 2 / (2 + (1 - 6 * variance / units) / variance)
    spread, chi = freedom * np.square(taken.sum(1) - units * probability).sum() / variance, stats.chi2(freedom * steps)
    if 2 * min(chi.cdf(spread), chi.sf(spread)) < ALPHA:
        found.add("size")
    both = taken[0 : steps - 1 : 2] & taken[1::2]
    if stats.binomtest(int(both.sum()), both.size, probability**2).pvalue < ALPHA:
        found.add("again")
    return found


def gaussian_delta(epsilon: float, multiplier: float) -> float:
    """The exact delta of one Gaussian release (Balle & Wang 2018, arXiv 1805.06530, theorem 8)."""
    normal, shift = NormalDist(), 0.5 / multiplier
    return normal.cdf(shift - epsilon * multiplier) - exp(epsilon) * normal.cdf(-shift - epsilon * multiplier)


def is_understated(claim: float, delta: float, noise_multiplier: float, releases: int, probability: float) -> bool:
    """Whether less is claimed than any honest accountant can: exact without sampling, else by jax_privacy (0.2 %)."""
    if probability == 1:
        return gaussian_delta(claim, noise_multiplier / sqrt(releases)) > delta * (1 + 1e-6)
    from jax_privacy.accounting import DpParams, DpsgdTrainingAccountant, PldAccountantConfig

    units = 10**6
    params = DpParams(
        noise_multipliers=noise_multiplier, num_samples=units, delta=delta, batch_size=round(probability * units)
    )
    accountant = DpsgdTrainingAccountant(PldAccountantConfig(value_discretization_interval=1e-3))
    return claim < accountant.compute_epsilon(releases, params) * (1 - 2e-3)


@contextmanager
def wrong(module: Any, name: str, value: Any) -> Iterator[None]:
    """The package with a function replaced, also where it was compiled before."""
    right = getattr(module, name)
    setattr(module, name, value)
    _forget(name)
    try:
        yield
    finally:
        setattr(module, name, right)
        _forget(name)


def _forget(name: str) -> None:
    """Drops the compiled functions that call this one, if any does."""
    for function in _COMPILED_WITH.get(name, ()):
        function.clear_cache()


def _flat(tree: PyTree, leading: int) -> np.ndarray:
    """Leaves [(C,) ...] of one size -> f64 [(C,) leaves, N]."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.stack([leaf.reshape(*leaf.shape[:leading], -1) for leaf in leaves], leading)
