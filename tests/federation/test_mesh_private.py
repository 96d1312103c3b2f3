"""Private and secure rounds on eight virtual devices: the same bounds, and the same noise, drawn once."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import PartitionSpec
from toy_mesh import (
    CUBE,
    ROUNDING,
    Played,
    apart,
    assert_told_alike,
    everywhere_the_same,
    on_mesh,
    play_from,
    states_apart,
)
from toy_private import CLIP, fedavg, private_plan, toy_base
from toy_rounds import toy_model, toy_plan, toy_trainer

from fedjax_llm import mesh as meshes
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.federation import release
from fedjax_llm.federation.availability import Availability
from fedjax_llm.federation.local_work import weights
from fedjax_llm.federation.plan import Federation, RoundPlan, Secure
from fedjax_llm.mesh import MeshShape
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import AdaptiveClip
from fedjax_llm.secure import ring
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.secure.simulation import identities
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

STEPS = LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer("sgd", 0.1))
ADAM = replace(STEPS, optimizer=Optimizer("adamw", 0.01))
ONE = LocalTraining(batch_size=2, local_steps=1, optimizer=Optimizer("sgd", 1.0))
HALF = {"noise_multiplier": 0.3, "sampling_probability": 0.6}
GROUPED = HALF | {"examples_per_unit": 4}


class Case(NamedTuple):
    """A mechanism for a unit, and how it is played."""

    config: Any
    unit: str
    local: LocalTraining
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)


CASES = {
    "DpSgd, record": Case(DpSgd(CLIP, **HALF), "record", STEPS),
    "DpSgd, correlated": Case(DpSgd(CLIP, 0.3, sampling_probability=0.5, noise=BandedToeplitz(2)), "record", STEPS),
    "DpSgd, patients of several rows, layers": Case(DpSgd(CLIP, **GROUPED, scope="layers"), "patient", STEPS),
    "DpSgd, local": Case(DpSgd(CLIP, **HALF), "record", ADAM, {"setting": "local"}),
    "DpSgd, centralised": Case(DpSgd(CLIP, **GROUPED), "patient", ADAM, {"setting": "centralised"}),
    "DpSgd, one factor": Case(DpSgd(CLIP, **HALF), "record", STEPS, {"base": "b"}),
    "DpFedSgd, record": Case(DpFedSgd(CLIP, **HALF), "record", ONE),
    "DpFedSgd, patients of several rows": Case(DpFedSgd(CLIP, **GROUPED), "patient", ONE),
    "DpFedAvg": Case(DpFedAvg(0.3, 0.2), "site", STEPS),
    "DpFedAvg, adaptive": Case(DpFedAvg(0.3, 0.2, adaptive=AdaptiveClip(0.7, 0.5, count_noise=0.15)), "site", STEPS),
    "DpFedAvg, capped weights, layers": Case(
        DpFedAvg(0.3, 0.2, scope="layers", examples_cap=4), "site", STEPS, {"weighting": "examples"}
    ),
    "DpFedAvg, correlated": Case(DpFedAvg(0.3, 0.2, noise=BandedToeplitz(2, amplified=False)), "site", STEPS),
    "LocalDp": Case(LocalDp(0.3, 0.2), "site", STEPS, {"weighting": "examples"}),
}


@cache
def plan_of(name: str) -> RoundPlan:
    case = CASES[name]
    options = {"layout": "in pairs", "aggregation": fedavg(0.3)} | case.options
    return private_plan(case.config, case.unit, case.local, **options)


def played(name: str, shape: MeshShape | None = None, number: int = 2) -> Played:
    """On one device, or on a mesh."""
    base = toy_base(CASES[name].options.get("base", "whole"))
    plan = plan_of(name) if shape is None else on_mesh(plan_of(name), shape)
    return play_from(plan, base.params, base.adapters, number)


@pytest.mark.parametrize("name", CASES)
def test_every_mechanism_releases_what_it_does_on_one_device(name):
    (one, told), (other, again) = played(name), played(name, CUBE)
    assert states_apart(one, other) < ROUNDING
    assert_told_alike(told, again)
    assert everywhere_the_same(other)
    noise_state = [state for state in (one.privacy_state, one.client_state) if "noise" in state]
    assert bool(noise_state) == (plan_of(name).mechanism.correlated is not None)
    assert apart(one.adapters, played(name, None, 1)[0].adapters) > 1e-3


def test_a_round_that_is_released_again_has_the_noise_of_that_attempt():
    plan, base = plan_of("DpFedAvg"), toy_base()
    released = {}
    for shape in (MeshShape(), CUBE):
        for attempt in (0, 1):
            on = on_mesh(plan, shape)
            released[shape, attempt] = play_from(on, base.params, base.adapters, 1, attempt)[0].adapters
    assert apart(released[MeshShape(), 1], released[CUBE, 1]) < ROUNDING
    assert apart(released[CUBE, 0], released[CUBE, 1]) > 1e-3


# Noise that is drawn by each device for itself must not go unnoticed.


def all_differ(key: jax.Array, device: jax.Array) -> jax.Array:
    """Each device adds noise of its own."""
    return jax.random.fold_in(key, device)


def the_first_is_right(key: jax.Array, device: jax.Array) -> jax.Array:
    """So that what is read on the first device looks right."""
    return jax.lax.cond(device == 0, lambda: key, lambda: jax.random.fold_in(key, device))


def drawn_by_each(choose: Callable[[jax.Array, jax.Array], jax.Array], axis: str) -> Callable[..., Any]:
    """``noise.gaussian`` with a key that depends on the device's place along an axis."""
    mesh, right, everywhere = meshes.make(CUBE), noise.gaussian, PartitionSpec()
    assert mesh is not None

    def here(key: jax.Array, template: Any, stddev: Any) -> Any:
        return right(choose(key, jax.lax.axis_index(axis)), template, stddev)

    return jax.shard_map(here, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)


@pytest.mark.parametrize(
    ("name", "axis", "choose"),
    [
        ("DpFedAvg", "clients", all_differ),
        ("DpFedAvg", "fsdp", the_first_is_right),
        ("DpFedAvg", "tensor", the_first_is_right),
        ("DpSgd, record", "fsdp", all_differ),
    ],
)
def test_noise_that_is_drawn_by_each_device_is_noticed(monkeypatch, name, axis, choose):
    one, _ = played(name, None, 1)
    drawers = (release._noised_sum, client_update.step)
    with monkeypatch.context() as patch:
        patch.setattr(noise, "gaussian", drawn_by_each(choose, axis))
        for function in drawers:
            function.clear_cache()
        other, _ = played(name, CUBE, 1)
    for function in drawers:
        function.clear_cache()
    assert not everywhere_the_same(other.adapters)
    if choose is all_differ:
        assert apart(one.adapters, other.adapters) > 100 * ROUNDING


# Secure aggregation.


def secured(plan: RoundPlan, bound: float = 64.0) -> RoundPlan:
    """The plan under secure aggregation."""
    sites = len(plan.clients)
    grid = ring.grid(bound, sites, float(weights(plan, plan.clients, sites).sum()))
    own = Secure(SecAgg(threshold=3).make, identities([client.name for client in plan.clients]), grid, fresh=False)
    return plan._replace(secure=own, measure_error=False)


def test_secure_rounds_open_the_sums_of_one_device():
    local, availability = LocalTraining(batch_size=2, local_steps=2), Availability(dropout=0.2)
    aggregation = Scaffold().make()
    trainer = toy_trainer("sgd", 0.03)._replace(correct=aggregation.client.gradient)
    options = {"federation": Federation(availability=availability), "aggregation": aggregation, "cohort": 5}
    plan = secured(toy_plan(trainer, local, layout="in pairs", **options))
    (one, told), (other, again) = (play_from(on, *toy_model()[1:], 2) for on in (plan, on_mesh(plan)))
    assert_told_alike(told, again)
    assert [report.secure for report in told] == [report.secure for report in again]
    assert {report.secure.abandoned for report in again} == {None}
    assert any(report.secure.dropped for report in again)
    grid = plan.secure.grid
    # Rounding on the grid may go the other way where the sums differ in the last bit.
    limit = ROUNDING + 4 * ring.error_bound(grid, 5, grid.weight)
    assert states_apart(one, other) < limit < 1e-3
