"""Rounds with privacy against plain loops, in every layout; and what samples of any size do to a step."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tiny import same
from toy_private import (
    CLIP,
    SECRET,
    SHOW,
    distance,
    fedavg,
    length,
    play_plainly_in_private,
    play_privately,
    private_plan,
    private_sites,
    silent,
    toy_base,
    unit_gradient,
)
from toy_rounds import LAYOUTS

from fedjax_llm.federation.sampling import secret_round_key
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import AdaptiveClip
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import Stack, Sum

STEPS = LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer("sgd", 0.1))
ADAM = replace(STEPS, optimizer=Optimizer("adamw", 0.01))
ONE = LocalTraining(batch_size=2, local_steps=1, optimizer=Optimizer("sgd", 1.0))
HALF = {"noise_multiplier": 0.3, "sampling_probability": 0.6}
EVERY = tuple(LAYOUTS)


def of_length(tokens: int):
    """The private sites with examples of one length alone, for which a loop compiles once."""
    sites = [(name, tuple(one for one in held if len(one.tokens) == tokens)) for name, held in private_sites()]
    return tuple((name, held) for name, held in sites if held)


class Case(NamedTuple):
    """A mechanism for a unit, and how it is played."""

    config: Any
    unit: str
    local: LocalTraining
    layouts: tuple[str, ...] = EVERY
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    server_lr: float = 1.0


CASES = {
    "DpSgd, record": Case(DpSgd(CLIP, **HALF), "record", STEPS),
    "DpSgd, record of two examples, by examples": Case(
        DpSgd(CLIP, **HALF, examples_per_unit=2), "record", ADAM, options={"weighting": "examples"}
    ),
    "DpSgd, patient, layers": Case(
        DpSgd(CLIP, **HALF, examples_per_unit=4, scope="layers"), "patient", STEPS, ("in pairs",)
    ),
    "DpSgd, local": Case(DpSgd(CLIP, **HALF), "record", ADAM, ("together",), {"setting": "local"}),
    "DpSgd, centralised": Case(
        DpSgd(CLIP, **HALF, examples_per_unit=4), "patient", ADAM, ("one by one",), {"setting": "centralised"}
    ),
    "DpSgd, one factor": Case(DpSgd(CLIP, **HALF), "record", STEPS, ("in pairs",), {"base": "b"}),
    "DpSgd, kept trunk": Case(
        DpSgd(CLIP, **HALF), "record", STEPS, ("in pairs",), {"base": "upper", "sites": of_length(9)}
    ),
    "DpFedSgd, record": Case(DpFedSgd(CLIP, **HALF), "record", ONE, server_lr=0.3),
    "DpFedSgd, patient": Case(DpFedSgd(CLIP, **HALF, examples_per_unit=4), "patient", ONE, server_lr=0.3),
    "DpFedAvg": Case(DpFedAvg(0.3, 0.2), "site", STEPS),
    "DpFedAvg, adaptive": Case(
        DpFedAvg(0.3, 0.2, adaptive=AdaptiveClip(0.7, 0.5, count_noise=0.15)), "site", STEPS, ("together",)
    ),
    "DpFedAvg, capped weights, layers": Case(
        DpFedAvg(0.3, 0.2, scope="layers", examples_cap=4), "site", STEPS, ("in pairs",), {"weighting": "examples"}
    ),
    "LocalDp": Case(LocalDp(0.3, 0.2), "site", STEPS, options={"weighting": "examples"}),
}


def plan_of(name: str, layout: str | None = None):
    case = CASES[name]
    options = {"aggregation": fedavg(case.server_lr), "layout": layout or case.layouts[0]} | case.options
    return private_plan(case.config, case.unit, case.local, **options)


@cache
def plainly(name: str):
    case = CASES[name]
    return play_plainly_in_private(plan_of(name), case.options.get("base", "whole"), server_lr=case.server_lr)


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in CASES for layout in CASES[name].layouts])
def test_rounds_equal_plain_loops_in_every_layout(name, layout):
    base = CASES[name].options.get("base", "whole")
    plan = plan_of(name, layout)
    state, _ = play_privately(plan, base)
    expected, norm = plainly(name)
    assert distance(state.adapters, expected) < 1e-5
    assert float(state.privacy_state.get("clip_norm", plan.mechanism.clip.norm)) == pytest.approx(norm, rel=1e-5)
    assert (norm == plan.mechanism.clip.norm) == (plan.mechanism.adaptive is None)
    start = toy_base(base).adapters
    if plan.setting == "local":
        start = jax.tree.map(lambda leaf: leaf[None], start)
    assert distance(jax.tree.map(np.broadcast_to, start, jax.tree.map(np.shape, expected)), expected) > 1e-2


def test_clipping_bites_and_spares_in_these_rounds():
    """Else the loops would agree whatever clipping does."""
    base = toy_base()
    units = [unit for client in plan_of("DpSgd, record").clients for unit in client.units]
    norms = [length(unit_gradient(base, base.adapters, unit[:1])) for unit in units]
    assert min(norms) < 0.95 * CLIP
    assert max(norms) > 1.5 * CLIP


def chances(plan, probability: float):
    """The plan with other chances to be sampled, for units or for sites."""
    mechanism = plan.mechanism
    if mechanism.sampling is None:
        return plan._replace(mechanism=mechanism._replace(cohort_probability=probability))
    return plan._replace(mechanism=mechanism._replace(sampling=np.full(len(plan.clients), probability)))


@pytest.mark.parametrize("name", ["DpSgd, record", "DpFedSgd, patient", "DpFedAvg"])
@pytest.mark.parametrize("probability", [1e-9, 1.0])
def test_samples_of_nothing_and_of_everything_take_the_same_kind_of_step(name, probability):
    """Nobody sampled: the step is noise over the public denominator. Far more than expected: all of them count."""
    plan = chances(plan_of(name, "in pairs"), probability)
    state, (report,) = play_privately(plan, rounds=1)
    seen = {client.name: client.examples for client in report.clients}
    expected, _ = play_plainly_in_private(plan, rounds=1, server_lr=CASES[name].server_lr)
    assert distance(state.adapters, expected) < 1e-5
    mechanism = plan.mechanism
    if probability < 1:
        assert sum(seen.values()) == 0
        assert all(client.loss is None for client in report.clients)
        assert distance(state.adapters, toy_base().adapters) > 1e-3
    else:
        sizes = {
            client.name: sum(len(u[: mechanism.examples_per_unit]) for u in client.units) for client in plan.clients
        }
        if mechanism.sampling is None:
            assert len(seen) == len(plan.clients) > plan.cohort
        else:
            assert seen == {site: plan.local.local_steps * sizes[site] for site in seen}


def test_the_step_of_an_empty_sample_is_the_noise_alone():
    plan = chances(plan_of("DpSgd, record", "in pairs"), 1e-9)._replace(aggregation=SHOW[Stack])
    state, (report,) = play_privately(plan, rounds=1)
    shown, mechanism = state.server_state, plan.mechanism
    assert report.clients
    for place, name in enumerate(client.name for client in report.clients):
        (c,) = [c for c, client in enumerate(plan.clients) if client.name == name]
        site_key = jax.random.fold_in(secret_round_key(SECRET, 1, 0, "site noise"), plan.clients[c].id)
        steps = [noise.gaussian(noise.step_key(site_key, s), toy_base().adapters, 1.0) for s in range(2)]
        scale = 0.1 * mechanism.stddev[c] * CLIP / mechanism.denominators[c]
        expected = jax.tree.map(lambda one, two, scale=scale: -scale * (one + two), *steps)
        assert distance(jax.tree.map(lambda leaf, at=place: leaf[at], shown.messages), expected) < 1e-6


def test_no_site_sampled_is_a_noised_sum_over_the_public_weight():
    plan = chances(plan_of("DpFedAvg", "in pairs"), 1e-9)._replace(aggregation=SHOW[Sum])
    state, (report,) = play_privately(plan, rounds=1)
    assert report.clients == ()
    drawn = noise.gaussian(secret_round_key(SECRET, 1, 0, "sum noise"), toy_base().adapters, 0.3 * 0.2)
    assert distance(state.server_state.total, drawn) < 1e-6
    assert float(state.server_state.weight) == plan.mechanism.weight == plan.cohort


@pytest.mark.parametrize("name", ["DpSgd, record", "DpFedAvg"])
def test_another_attempt_at_a_round_is_another_release(name):
    plan = plan_of(name, "in pairs")
    first, again, second = (play_privately(plan, rounds=1, attempt=attempt)[0] for attempt in (0, 0, 1))
    assert same(first.adapters, again.adapters)
    assert distance(first.adapters, second.adapters) > 1e-3
    expected, _ = play_plainly_in_private(plan, rounds=1, attempt=1, server_lr=CASES[name].server_lr)
    assert distance(second.adapters, expected) < 1e-5


def test_dropout_under_privacy_follows_the_secret_key_alone():
    """Its masks go by the place in a batch, which the units before decide: who knew them would see those units."""
    # One example a record and all of them in every step, so that the secret key decides nothing else.
    plan = private_plan(
        DpSgd(CLIP, 1.0, sampling_probability=1.0),
        "record",
        STEPS,
        layout="in pairs",
        dropout=0.4,
        sites=private_sites(1)[:2],
    )
    plan = silent(plan)
    first = play_privately(plan, rounds=1)[0].adapters
    public, secret = plan._replace(key=jax.random.key(99)), plan._replace(secret_key=noise.run_key("reproducible", 6))
    assert same(first, play_privately(public, rounds=1)[0].adapters)
    assert distance(first, play_privately(secret, rounds=1)[0].adapters) > 1e-4
