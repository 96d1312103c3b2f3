"""Rounds under secure aggregation: the sums of plain rounds, recovered where clients drop out, or nothing at all."""

from typing import Any

import jax
import numpy as np
import pytest
from toy_rounds import KEY, play, toy_plan, toy_trainer

from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fednova import FedNova
from fedjax_llm.aggregation.rolora import RoLora
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.federation.availability import Availability, answers
from fedjax_llm.federation.local_work import weights
from fedjax_llm.federation.plan import Federation, RoundPlan, Secure
from fedjax_llm.secure import ring
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.secure.simulation import identities
from fedjax_llm.training.client_update import LocalTraining

LOCAL = LocalTraining(batch_size=2, local_steps=2)
BOUND = 1024.0


def secured(plan: RoundPlan, bound: float = BOUND, **options: Any) -> RoundPlan:
    """The plan under secure aggregation."""
    sites = len(plan.clients)
    total = float(np.sort(weights(plan, plan.clients, sites))[-plan.cohort :].sum())
    names = [client.name for client in plan.clients]
    grid = ring.grid(bound, sites, total * sites / plan.cohort)
    own = Secure(SecAgg(**options).make, identities(names), grid, fresh=False)
    return plan._replace(secure=own, measure_error=False)


def plan_of(aggregator: Any = None, weighting: str = "examples", **options: Any) -> RoundPlan:
    """A plan over all toy sites."""
    federation = Federation(weighting=weighting, availability=options.pop("availability", None))
    algorithm = (aggregator or FedAvg()).make()
    options = {"cohort": 5, "federation": federation, "aggregation": algorithm} | options
    return toy_plan(toy_trainer(), LOCAL, **options)


def distance(one: Any, other: Any) -> float:
    """The largest difference of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("aggregator", [FedAvg(), FedNova(), Scaffold(), RoLora()], ids=lambda a: type(a).__name__)
def test_rounds_are_those_of_plain_sums_within_the_grid(aggregator: Any, weighting: str):
    plan = plan_of(aggregator, weighting)
    safe = secured(plan)
    plain, (state, reports) = play(plan, 2)[0], play(safe, 2)
    grid = safe.secure.grid
    # A round's rounding goes through the next one's training once; the toy's gradients change slower than that.
    limit = 4 * ring.error_bound(grid, 5, grid.weight)
    assert 0 < distance(plain.adapters, state.adapters) < limit
    assert [(r.secure.clients, r.secure.survivors, r.secure.cut, r.secure.abandoned) for r in reports] == [
        (5, 5, 0, None)
    ] * 2


def test_a_finer_grid_comes_closer():
    plain = play(plan_of(), 1)[0].adapters
    near, far = (distance(plain, play(secured(plan_of(), bound), 1)[0].adapters) for bound in (2.0, 2.0**16))
    assert near < far / 100


@pytest.mark.parametrize("neighbours", [None, 4])
@pytest.mark.parametrize("layout", ["one by one", "in pairs"])
def test_chunks_masks_and_graphs_change_no_bit(layout: str, neighbours: int | None):
    first, _ = play(secured(plan_of(FedAdam(1e-2), layout="one by one")), 2)
    again, _ = play(secured(plan_of(FedAdam(1e-2), layout=layout), neighbours=neighbours), 2)
    # Training itself may differ in the last bit with the layout; the same layout must not.
    if layout == "one by one":
        jax.tree.map(np.testing.assert_array_equal, first.adapters, again.adapters)
    else:
        assert distance(first.adapters, again.adapters) < 1e-5


def dropping(count: int) -> tuple[Availability, np.ndarray]:
    """Clients of which exactly so many drop out of the first round, and those who stay."""
    ids = [client.id for client in plan_of().clients]
    for dropout in np.linspace(0.05, 0.95, 400):
        availability = Availability(dropout=float(dropout))
        stay = answers(KEY, 1, ids, 5, availability).cohort
        if len(stay) == 5 - count:
            return availability, stay
    raise AssertionError("no such dropout")


def test_the_sum_of_those_who_stay_is_recovered():
    availability, stay = dropping(1)
    plan = plan_of(availability=availability)
    plain, (state, (report,)) = play(plan, 1)[0], play(secured(plan), 1)
    grid = secured(plan).secure.grid
    assert report.secure.survivors == len(stay) == 4
    assert (
        set(report.secure.dropped)
        == set(report.silent)
        == {c.name for c in plan.clients} - {plan.clients[i].name for i in stay}
    )
    assert min(report.wasted) > min(play(plan, 1)[1][0].wasted)  # keys and shares were exchanged before it left
    weight = float(weights(plan, [plan.clients[i] for i in stay], 4).sum())
    assert distance(plain.adapters, state.adapters) < 2 * ring.error_bound(grid, 4, weight)


def test_a_round_that_too_few_are_left_of_leaves_everything_as_it_was():
    availability, _ = dropping(2)
    plan = secured(plan_of(Scaffold(), availability=availability), threshold=4)
    before, (after, (report,)) = play(plan, 0)[0], play(plan, 1)
    assert report.secure.abandoned is not None
    assert report.secure.survivors == 0
    assert int(after.round) == 1
    for part in ("adapters", "server_state", "client_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(after, part))
    assert report.update_norm == 0


def test_numbers_beyond_the_bound_are_cut_and_counted():
    state, (report,) = play(secured(plan_of(), bound=1e-4), 1)
    before = play(plan_of(), 0)[0]
    assert report.secure.cut > 0
    assert distance(before.adapters, state.adapters) < 1.001e-4


def test_bytes_are_those_of_the_protocol():
    plain, safe = (play(plan, 1)[1][0].clients for plan in (plan_of(), secured(plan_of())))
    for own, masked in zip(plain, safe, strict=True):
        vector = own.upload_bytes + 4 * ring.EXTRA  # f32 and uint32 take the same room
        assert vector < masked.upload_bytes < vector + 5_000
        assert own.download_bytes < masked.download_bytes < own.download_bytes + 10_000
