"""An audit in one run (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846) of whole rounds, with gradient canaries.

Each of ``CANARIES`` units is in the data or not by a coin of its own, and its gradient is a direction of its own, so
the auditor guesses by what the released adapters hold along it. In each run the bound on epsilon that the guesses show
exceeds the true epsilon with probability ``SIGNIFICANCE`` at most; a test of a right mechanism fails only where so many
of its runs do that the probability is 1e-6 at most. AUDIT_SEEDS in the environment asks for more runs.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import CLIP, example, plan_of, play, wrong
from scipy import stats

from fedjax_llm.federation import release, sampling
from fedjax_llm.federation.plan import Execution, RoundPlan
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import spent
from fedjax_llm.privacy.mechanism import releases
from fedjax_llm.training import client_update
from fedjax_llm.types import PyTree

CANARIES, DELTA, SIGNIFICANCE = 1000, 1e-5, 0.01
SEEDS = int(os.environ.get("AUDIT_SEEDS", "20"))
ROUNDS = 4


@cache
def directions() -> PyTree:
    """The gradients of the canaries, far above the clip norm and orthogonal to each other."""
    one, other = np.split(30 * CLIP * np.eye(CANARIES, dtype=np.float32), 2, axis=1)
    return {"one": {"a": jnp.asarray(one.reshape(-1, 25, 20)), "b": jnp.asarray(other.reshape(-1, 20, 25))}}


def sampled_sums(seed: int) -> tuple[RoundPlan, np.ndarray]:
    """Noise on the sum of the gradients of half of the canaries that are in, anew in each round."""
    coins = np.random.default_rng(seed).random(CANARIES) < 0.5
    members = {"a": [example(str(k), int(k)) for k in np.flatnonzero(coins)]}
    config = DpFedSgd(CLIP, 2.0, sampling_probability=0.5)
    return plan_of(config, members, number=ROUNDS, rows=256, seed=seed), coins


def steps_at_a_site(seed: int) -> tuple[RoundPlan, np.ndarray]:
    """Noise in each of two steps a round, with all canaries that are in."""
    coins = np.random.default_rng(seed).random(CANARIES) < 0.5
    members = {"a": [example(str(k), int(k)) for k in np.flatnonzero(coins)]}
    config = DpSgd(CLIP, 5.0, sampling_probability=1.0)
    return plan_of(config, members, setting="local", number=ROUNDS, steps=2, rows=256, seed=seed), coins


def canary_sites(seed: int) -> tuple[RoundPlan, np.ndarray]:
    """Noise on the sum of the updates of whole sites, each of which is a canary; one round."""
    coins = np.random.default_rng(seed).random(CANARIES) < 0.5
    members = {f"s{k}": [example(str(k), int(k))] for k in np.flatnonzero(coins)}
    plan = plan_of(DpFedAvg(CLIP, 2.0), members, unit="site", number=1, rows=256, seed=seed)
    return plan._replace(execution=Execution(clients_per_chunk=200)), coins


def mean(released: np.ndarray) -> np.ndarray:
    """A canary's score: what all rounds hold along it."""
    return released.mean(0)


def spread(released: np.ndarray) -> np.ndarray:
    """What differs from round to round: nothing along a canary that is out, where all rounds have the same noise."""
    return released.std(0)


def audited(plan: RoundPlan, coins: np.ndarray, score: Callable[[np.ndarray], np.ndarray] = mean) -> float:
    """The lower bound on epsilon that the adapters after every round show."""
    from jax_privacy.auditing import CanaryScoreAuditor

    states, _ = play(plan, plan.federation.rounds, directions())
    leaves = [jax.tree.leaves(state.adapters) for state in states]
    adapters = np.array([np.concatenate([np.ravel(leaf) for leaf in own]) for own in leaves])
    scores = score(-np.diff(adapters, axis=0, prepend=0))
    return CanaryScoreAuditor(scores[coins], scores[~coins]).epsilon_one_run(SIGNIFICANCE, DELTA)


def claimed(plan: RoundPlan) -> float:
    """The run's own claim."""
    mechanism = plan.mechanism
    assert mechanism is not None
    event = releases(mechanism, [plan.clients[0].name])
    return max(spent(mechanism, {name: [one] * plan.federation.rounds for name, one in event.items()}, DELTA).values())


@pytest.mark.parametrize(
    ("make", "score"),
    [(sampled_sums, mean), (sampled_sums, spread), (steps_at_a_site, mean), (canary_sites, mean)],
)
def test_right_mechanisms_show_no_more_than_they_claim(make: Callable, score: Callable):
    seeds = SEEDS if make is not canary_sites else SEEDS // 4
    runs = [make(seed) for seed in range(seeds)]
    above = [audited(*run, score) > claimed(run[0]) for run in runs]
    assert sum(above) <= stats.binom.isf(1e-6, seeds, SIGNIFICANCE)


@pytest.mark.parametrize("make", [sampled_sums, steps_at_a_site, canary_sites])
@pytest.mark.parametrize("units", [float("inf"), CANARIES / 2])
def test_no_noise_and_noise_for_the_mean_on_the_sum_show_more_than_is_claimed(make: Callable, units: float):
    plan, coins = make(0)
    claim = claimed(plan)
    plan = plan._replace(mechanism=plan.mechanism._replace(stddev=plan.mechanism.stddev / units))
    assert audited(plan, coins) > 1.3 * claim


def unclipped(tree: PyTree, *others: Any) -> PyTree:
    return tree


def test_gradients_that_nothing_clips_show_more_than_is_claimed():
    plan, coins = steps_at_a_site(0)
    with wrong(client_update, "clip_units", unclipped):
        assert audited(plan, coins) > 1.3 * claimed(plan)


def same_every_round(key: jax.Array, number: int, attempt: int, purpose: str) -> jax.Array:
    return sampling.secret_round_key(key, 1, attempt, purpose)


def test_noise_that_cancels_between_rounds_shows_more_than_is_claimed():
    plan, coins = sampled_sums(0)
    with wrong(release, "secret_round_key", same_every_round):
        assert audited(plan, coins, spread) > 1.3 * claimed(plan)
