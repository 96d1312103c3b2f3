"""Errors that were made elsewhere in what a unit may change, in samples and in claims, made here on purpose.

For each there is the check that finds it, which right code passes. Statistical checks refuse right code with
probability 1e-6 each (``mutants.ALPHA``); the seeds are fixed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import (
    CLIP,
    DOWN,
    MODEST,
    ODD,
    UP,
    ZERO,
    example,
    is_understated,
    moves,
    noise_problems,
    plan_of,
    play,
    sampling_problems,
    sensitivity_of,
    silent,
    sites_of,
    wrong,
)

from fedjax_llm import trees
from fedjax_llm.errors import UserError
from fedjax_llm.federation import local_work, release, rounds, sampling
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.privacy import accounting, calibration, clipping
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import AdaptiveClip
from fedjax_llm.training import client_update

RIGHT: dict[str, Any] = {
    "accumulated gradients": client_update.example_gradients,
    "pack": rounds.pack,
    "updates": release.updates,
    "noised sum": release.noised_sum,
}
NEIGHBOURS = {
    "far above the clip norm": [example("new", UP)],
    "against all others": [example("new", DOWN)],
    "elsewhere": [example("new", ODD)],
    "without gradient": [example("new", ZERO)],
    "long": [example("new", MODEST, length=8)],
}
CROWD = sites_of(a=[UP] * 4 + [MODEST], b=[ODD])
"""With a newcomer they fit into one microbatch."""
BOUNDED: dict[str, Callable[..., RoundPlan]] = {
    "steps": lambda: plan_of(DpSgd(CLIP, 1.0), CROWD, setting="local"),
    "layers": lambda: plan_of(DpSgd(CLIP, 1.0, "layers"), CROWD, setting="local"),
    "gradients": lambda: plan_of(DpFedSgd(CLIP, 1.0), CROWD),
    "updates": lambda: plan_of(DpFedAvg(CLIP, 1.0), CROWD, unit="site"),
    "capped": lambda: plan_of(
        DpFedAvg(CLIP, 1.0, examples_cap=2), sites_of(a=[UP], b=[ODD] * 9), unit="site", weighting="examples"
    ),
}


def largest_move(plan: RoundPlan) -> float:
    """Over the noise that one noise multiplier adds; more than 1 is more than was declared."""
    return max(sensitivity_of(plan, newcomers) for newcomers in NEIGHBOURS.values())


@pytest.mark.parametrize("plan", BOUNDED)
def test_right_releases_move_by_the_declared_sensitivity_and_no_more(plan: str):
    assert 0.499 < largest_move(BOUNDED[plan]()) <= 1 + 1e-5


def the_mean_clipped(tree, clip, norm=None):
    mean = jax.tree.map(lambda leaf: leaf.mean(0, keepdims=True), tree)
    bound = clip.norm if norm is None else norm
    return jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, bound / trees.norms(mean)[0]), tree)


def every_factor_clipped(tree, clip, norm=None):
    def bounded(leaf):
        norms = jnp.sqrt(jnp.sum(jnp.square(leaf), (1, 2), keepdims=True))
        return leaf * jnp.minimum(1.0, (clip.norm if norm is None else norm) / jnp.maximum(norms, 1e-12))

    return jax.tree.map(bounded, tree)


def every_module_clipped(tree, clip, norm=None):
    flat = replace(clip, scope="flat")
    return {name: clipping.clip_units({name: part}, flat, norm)[name] for name, part in tree.items()}


def clipped_in_bfloat16(tree, clip, norm=None):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    scale = jnp.bfloat16(clip.norm) / trees.norms(narrow).astype(jnp.bfloat16)
    scale = jnp.minimum(scale, 1).reshape(-1, 1, 1)
    return jax.tree.map(lambda leaf: (leaf * scale).astype(jnp.float32), narrow)


@pytest.mark.parametrize("mutant", [the_mean_clipped, every_factor_clipped, every_module_clipped, clipped_in_bfloat16])
@pytest.mark.parametrize(("module", "plan"), [(client_update, "gradients"), (release, "updates")])
def test_clipping_that_does_not_bound_a_unit_is_found(mutant: Callable, module: Any, plan: str):
    with wrong(module, "clip_units", mutant):
        assert largest_move(BOUNDED[plan]()) > 1.0005


def test_rows_of_a_patient_that_are_clipped_one_by_one_are_found():
    plan = plan_of(DpSgd(CLIP, 1.0, examples_per_unit=3), CROWD, unit="patient", setting="local")
    rows = [example(f"new-{i}", UP, owner="new") for i in range(3)]
    assert plan.trainer.grouped
    assert sensitivity_of(plan, rows) == pytest.approx(1, abs=1e-5)
    alone = plan._replace(trainer=plan.trainer._replace(grouped=False))
    assert sensitivity_of(alone, rows) > 2


def over_all_target_tokens(model, scaling, params, adapters, rows, keys, frozen):
    losses, gradients = RIGHT["accumulated gradients"](model, scaling, params, adapters, rows, keys, frozen)
    tokens = jnp.sum(rows.target_weight > 0)
    return losses, jax.tree.map(lambda leaf: 1.2 * leaf / tokens, gradients)


def over_the_batchs_own_norm(model, scaling, params, adapters, rows, keys, frozen):
    losses, gradients = RIGHT["accumulated gradients"](model, scaling, params, adapters, rows, keys, frozen)
    center = jax.tree.map(lambda leaf: leaf - leaf.mean(0, keepdims=True), gradients)
    return losses, center


@pytest.mark.parametrize("mutant", [over_all_target_tokens, over_the_batchs_own_norm])
def test_examples_that_change_each_other_are_found(mutant: Callable):
    with wrong(client_update, "example_gradients", mutant):
        assert largest_move(BOUNDED["gradients"]()) > 1.5


def over_the_batch_that_was_drawn(work, shapes, *, denominators, **options):
    return RIGHT["pack"](work, shapes, **options)


def over_the_clients_that_came(plan, view, *others):
    view, state = RIGHT["noised sum"](plan, view, *others)
    return replace(view, weight=jnp.float32(len(plan.clients))), state


def test_a_denominator_that_depends_on_the_data_is_found():
    """A unit without gradient must not move a release at all, and one against all others no further than alone."""
    site, server = BOUNDED["steps"](), BOUNDED["updates"]()
    nobody = NEIGHBOURS["without gradient"]
    assert sensitivity_of(site, nobody) == sensitivity_of(server, nobody) == 0.0
    with wrong(rounds, "pack", over_the_batch_that_was_drawn):
        assert sensitivity_of(site, nobody) > 0.1
        assert largest_move(site) > 1.5
    with wrong(release, "noised_sum", over_the_clients_that_came):
        assert sensitivity_of(server, nobody) > 0.1


def test_weights_after_clipping_are_found():
    plan = BOUNDED["capped"]()
    heavy = [example(f"new-{i}", UP) for i in range(5)]
    assert sensitivity_of(plan, heavy) <= 1 + 1e-5
    by_examples = plan._replace(mechanism=plan.mechanism._replace(site_weights=float))
    assert sensitivity_of(by_examples, heavy) == pytest.approx(5, rel=1e-4)


def adaptive_plan(kind: int, rate: float) -> RoundPlan:
    """One site far above the clip norm, and five of the kind."""
    sites = sites_of(far=[UP], **{f"s{i}": [kind] for i in range(5)})
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=rate, count_noise=0.3)
    return plan_of(DpFedAvg(CLIP, 0.5, adaptive=adaptive), sites, unit="site", number=30)


def noise_in_clip_norms(plan: RoundPlan) -> np.ndarray:
    """What was added to the count of unclipped updates, [1, rounds - 1], where all are clipped in every round."""
    _, reports = play(plan, 30)
    ratios = np.diff(np.log([report.clip_norm for report in reports]))
    return (0.5 - ratios / plan.mechanism.adaptive.learning_rate)[None] * 6


def test_a_count_of_clipped_updates_without_noise_is_found():
    plan = adaptive_plan(UP, 0.01)
    assert noise_problems(noise_in_clip_norms(plan), 0.3) == set()
    bare = replace(plan.mechanism.adaptive, count_noise=0.0)
    assert "variance" in noise_problems(
        noise_in_clip_norms(plan._replace(mechanism=plan.mechanism._replace(adaptive=bare))), 0.3
    )


def largest_above_the_clip_norm(plan: RoundPlan) -> float:
    """How far one site moves noiseless rounds, over the clip norm that their noise is made for."""
    bounds = [report.clip_norm for report in play(silent(plan), 4)[1]]
    return float(np.max(np.linalg.norm(moves(silent(plan), 4), axis=(1, 2)) * 6 / bounds))


def test_a_clip_norm_of_an_earlier_round_is_found():
    plan = adaptive_plan(ZERO, 1.0)
    assert largest_above_the_clip_norm(plan) == pytest.approx(1, abs=1e-5)
    with wrong(release, "updates", lambda *args: RIGHT["updates"](*args[:-1], {})):
        assert largest_above_the_clip_norm(plan) > 1.5


def samples(plan: RoundPlan, number: int = 150) -> np.ndarray:
    """bool [S, U]: who takes part in every step of so many rounds at the first site."""
    names = [unit[0].record_id for unit in plan.clients[0].units]
    steps = [
        step
        for i in range(1, number + 1)
        for step in local_work.work_of(plan, 0, i, 0, local_work.past_rounds(plan, i))
    ]
    return np.array([[name in {unit[0].record_id for unit in step} for name in names] for step in steps])


def shuffled(key, units, probability, steps, *others):
    order = sampling.generator(key).permutation(len(units))
    return [[units[i] for i in part] for part in np.array_split(order, round(1 / probability))[:steps]]


def truncated(key, units, probability, *others):
    most = round(len(units) * probability)
    return [step[:most] for step in sampling.sample_units(key, units, probability, *others)]


def never_empty(key, units, probability, steps, *others):
    keys = iter(jax.random.split(key, 1000))
    drawn = (sampling.sample_units(own, units, probability, 1, *others)[0] for own in keys)
    filled = (step for step in drawn if step)
    return [next(filled) for _ in range(steps)]


def twice_the_rate(key, units, probability, *others):
    return sampling.sample_units(key, units, 2 * probability, *others)


@pytest.mark.parametrize(
    ("units", "probability", "mutant", "problems"),
    [
        (60, 0.25, None, set()),
        (20, 0.05, None, set()),
        (60, 0.25, shuffled, {"size", "again"}),
        (60, 0.25, truncated, {"size", "rate"}),
        (20, 0.05, never_empty, {"rate"}),
        (60, 0.25, twice_the_rate, {"rate"}),
    ],
)
def test_samples_that_are_not_poisson_are_found(units: int, probability: float, mutant: Any, problems: set[str]):
    """The rate is that of the events: a rate for the wrong number of units would be found like any other."""
    config = DpSgd(CLIP, 1.0, sampling_probability=probability)
    plan = plan_of(config, sites_of(a=[UP] * units), setting="local", steps=2)
    probability = plan.mechanism.events["a"].sampling_probability
    with wrong(local_work, "sample_units", mutant or sampling.sample_units):
        found = sampling_problems(samples(plan), probability)
    assert problems <= found
    assert bool(problems) == bool(found)


def classical(noise_multiplier: float, delta: float) -> float:
    return float(np.sqrt(2 * np.log(1.25 / delta)) / noise_multiplier)


CLAIMS: dict[str, Callable[[float, int, float, float], float]] = {
    "one round for all": lambda z, count, q, delta: accounting.epsilon([Event("gaussian", z, q)], delta),
    "classical formula": lambda z, count, q, delta: classical(z, delta),
    "classical formula, composed": lambda z, count, q, delta: classical(z / np.sqrt(count), delta),
    "rate of a larger site": lambda z, count, q, delta: accounting.epsilon([Event("gaussian", z, q / 9, count)], delta),
    "a delta above one over the units": lambda z, count, q, delta: accounting.epsilon(
        [Event("gaussian", z, q, count)], 0.1
    ),
}


@pytest.mark.parametrize(("noise_multiplier", "count", "probability"), [(0.8, 3, 1.0), (1.0, 60, 0.1)])
def test_claims_below_what_was_released_are_found(noise_multiplier: float, count: int, probability: float):
    delta = 1e-5
    released = (delta, noise_multiplier, count, probability)
    for accountant in ("pld", "rdp"):
        right = accounting.epsilon([Event("gaussian", noise_multiplier, probability, count)], delta, accountant)
        assert not is_understated(right, *released)
    for name, claim in CLAIMS.items():
        if probability == 1 or "classical" not in name:
            claimed = claim(noise_multiplier, count, probability, delta)
            assert is_understated(claimed, *released), name


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DpFedSgd(CLIP, 1.0), {"weighting": "examples"}, "weight would multiply every clipped gradient"),
        (DpFedAvg(CLIP, 1.0), {"weighting": "examples", "unit": "site"}, "a weight multiplies"),
        (DpFedSgd(CLIP, 1.0), {"steps": 2}, "after the first step without noise"),
        (DpFedAvg(CLIP, 1.0), {"unit": "record"}, "One record changes every gradient after its own"),
        (DpFedAvg(CLIP, 0.5, adaptive=AdaptiveClip(count_noise=5.0)), {"unit": "site"}, "adaptive clipping counts"),
        (DpFedAvg(CLIP, 1.0, cohort_is_secret=False), {"unit": "site", "cohort": 1}, "who do not see the cohort"),
    ],
)
def test_what_cannot_be_right_is_refused(config: Any, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        plan_of(config, CROWD, **options)


def test_a_delta_that_covers_publishing_a_unit_is_refused():
    calibration.check_delta(1e-4, {"a": 1000})
    with pytest.raises(UserError, match="publishing one unit"):
        calibration.check_delta(1e-2, {"a": 1000})
