"""Errors that were made elsewhere with noise, made here on purpose.

For each there is the check that finds it, which right code passes. Statistical checks refuse right code with
probability 1e-6 each (``mutants.ALPHA``); the seeds are fixed.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import (
    CLIP,
    MODEST,
    ODD,
    UP,
    UPLOADS,
    claimed_noise,
    noise_of,
    noise_problems,
    plan_of,
    play,
    sites_of,
    wrong,
)

from fedjax_llm.federation import cohorts, local_work, release, rounds, sampling
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.training import client_update

SITES = sites_of(a=[UP, ODD, MODEST], b=[ODD, MODEST], c=[MODEST, UP])
PLACES: dict[str, Callable[..., RoundPlan]] = {
    "steps": lambda **options: plan_of(DpSgd(CLIP, 1.5), SITES, setting="local", steps=2, **options),
    "sum of gradients": lambda **options: plan_of(DpFedSgd(CLIP, 1.5), SITES, **options),
    "sum of updates": lambda **options: plan_of(DpFedAvg(CLIP, 1.5), SITES, unit="site", **options),
    "updates": lambda **options: plan_of(LocalDp(CLIP, 1.5), SITES, unit="site", aggregation=UPLOADS, **options),
}
"""One plan for each place where noise comes in."""
RIGHT: dict[str, Any] = {
    "gaussian": noise.gaussian,
    "round key": sampling.secret_round_key,
    "secrets": rounds._secrets,
    "work": local_work.work_of,
    "run": rounds.run_round,
}


def found_in_noise(plan: RoundPlan, number: int = 2) -> set[str]:
    """What is wrong with the noise of two rounds and of a second attempt at the first."""
    drawn = np.concatenate([noise_of(plan, number), noise_of(plan, attempt=1)])
    stddev = claimed_noise(plan)
    return noise_problems(drawn, stddev[:, None, None] if stddev.ndim else stddev)


def with_stddev(plan: RoundPlan, factor: float) -> RoundPlan:
    """The plan with more or less noise than its events claim."""
    assert plan.mechanism is not None
    return plan._replace(mechanism=plan.mechanism._replace(stddev=factor * plan.mechanism.stddev))


@pytest.mark.parametrize("place", PLACES)
def test_right_noise_passes(place: str):
    assert found_in_noise(PLACES[place]()) == set()


@pytest.mark.parametrize(
    ("place", "factor"),
    [
        ("sum of gradients", 1 / 7),  # for the mean over the seven units, added to their sum
        ("sum of gradients", 7),  # for the sum, added to the mean
        ("sum of updates", 1 / 3),
        ("steps", 1 / 3),
        ("updates", 1 / 2),  # for adding or removing, claimed for replacing
        ("sum of gradients", 1 / np.sqrt(3)),  # a share from each site, one of which is not enough
    ],
)
def test_noise_of_another_scale_is_found(place: str, factor: float):
    assert found_in_noise(with_stddev(PLACES[place](), factor)) == {"variance", "normality"}


def one_key_for_all_leaves(key, template, stddev):
    return jax.tree.map(lambda leaf: stddev * jax.random.normal(key, (leaf.size,)).reshape(leaf.shape), template)


def mean_over_devices(key, template, stddev):
    drawn = [RIGHT["gaussian"](own, template, stddev) for own in jax.random.split(key, 2)]
    return jax.tree.map(lambda one, other: (one + other) / 2, *drawn)


def in_bfloat16(key, template, stddev):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), RIGHT["gaussian"](key, template, 1.0))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * stddev, narrow)


def with_the_seed_of_a_library(key, template, stddev):
    return RIGHT["gaussian"](jax.random.key(0), template, stddev)


@pytest.mark.parametrize(
    ("place", "mutant", "problem"),
    [
        ("steps", one_key_for_all_leaves, "dependence"),
        ("sum of gradients", one_key_for_all_leaves, "dependence"),
        ("sum of gradients", mean_over_devices, "variance"),
        ("updates", in_bfloat16, "values"),
        ("sum of updates", with_the_seed_of_a_library, "dependence"),
    ],
)
def test_noise_drawn_wrongly_is_found(place: str, mutant: Callable, problem: str):
    with wrong(noise, "gaussian", mutant):
        assert problem in found_in_noise(PLACES[place]())


def same_every_round(key, number, attempt, purpose):
    return RIGHT["round key"](key, 1, attempt, purpose)


def same_every_attempt(key, number, attempt, purpose):
    return RIGHT["round key"](key, number, 0, purpose)


@pytest.mark.parametrize("place", ["steps", "sum of gradients", "updates"])
@pytest.mark.parametrize("mutant", [same_every_round, same_every_attempt])
def test_a_key_used_in_two_rounds_or_attempts_is_found(place: str, mutant: Callable):
    with wrong(release, "secret_round_key", mutant):
        assert found_in_noise(PLACES[place]()) == {"dependence"}


def one_key_for_all_clients(*args):
    secrets = RIGHT["secrets"](*args)
    return None if secrets is None else secrets._replace(keys=secrets.keys[jnp.zeros(len(secrets.keys), int)])


def test_a_key_used_at_two_sites_is_found():
    with wrong(rounds, "_secrets", one_key_for_all_clients):
        assert found_in_noise(PLACES["steps"]()) == {"dependence"}


def test_a_key_used_in_two_steps_is_found():
    """Twice the same noise has twice the variance of the sum of two."""
    with wrong(noise, "step_key", lambda key, step: key):
        assert "variance" in found_in_noise(PLACES["steps"]())


def test_a_run_without_a_key_of_its_own_does_not_start():
    with pytest.raises(AssertionError, match="secret key"):
        play(PLACES["steps"]()._replace(secret_key=None))


def keys_by_default(*functions: Callable) -> list[str]:
    """The functions that draw with a key of their own where none is given."""
    parameters = [(function.__name__, inspect.signature(function).parameters) for function in functions]
    return [
        name for name, own in parameters if any("key" in one and own[one].default is not own[one].empty for one in own)
    ]


def test_a_key_by_default_is_found():
    def private(gradients, stddev, key=jax.random.key(0)):  # noqa: B008
        return noise.gaussian(key, gradients, stddev)

    drawing = [
        function
        for module in (noise, sampling, release, client_update)
        for _, function in inspect.getmembers(module, inspect.isfunction)
    ]
    assert {noise.gaussian, sampling.sample_units, client_update.run} <= set(drawing)
    assert keys_by_default(*drawing) == []
    assert keys_by_default(private) == ["private"]


def only_steps_with_examples(*args):
    return [step for step in RIGHT["work"](*args) if step]


def only_rounds_with_clients(plan, params, state, attempt=0):
    number = int(state.round) + 1
    if len(cohorts.cohort_of(plan, number, attempt)):
        return RIGHT["run"](plan, params, state, attempt)
    return replace(state, round=jnp.int32(number)), None


def test_batches_of_nobody_without_noise_are_found():
    plan = plan_of(DpSgd(CLIP, 1.5, sampling_probability=0.01), SITES, setting="local", steps=2)
    assert found_in_noise(plan) == set()
    with wrong(rounds, "work_of", only_steps_with_examples):
        assert "variance" in found_in_noise(plan)


def test_rounds_of_nobody_without_noise_are_found():
    plan = plan_of(DpFedAvg(CLIP, 1.5), SITES, unit="site", cohort=1)
    skipped = next(number for number in range(1, 20) if not len(cohorts.cohort_of(plan, number)))
    assert found_in_noise(plan, skipped) == set()
    with wrong(rounds, "run_round", only_rounds_with_clients):
        assert "variance" in found_in_noise(plan, skipped)
