"""Whole rounds with compressed messages: the same in every layout, counted, and with a memory that stays by client."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import same
from toy_private import play_privately, private_plan
from toy_rounds import LAYOUTS, play, toy_model, toy_plan, toy_sites, toy_trainer

from fedjax_llm import trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.rotated import Rotated
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.federation import release
from fedjax_llm.federation.cohorts import cohort_of
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

STEPS = LocalTraining(batch_size=3, local_steps=2)
CONFIGS = {"rotated": Rotated(Quantise(8)), "largest": TopK(0.1, values=Quantise(8))}
HALF = FedAvg().make()._replace(live=lambda number: {"a": float(number % 2 == 0), "b": 1.0})
"""The factors a travel in every other round."""


@cache
def codec(name: str):
    return CONFIGS[name].make()


def plan_of(name: str, layout: str = "together", **options) -> RoundPlan:
    return toy_plan(toy_trainer(), STEPS, layout=layout, **options)._replace(codec=codec(name))


def messages(count: int):
    """Of clients [C, ...]."""
    rng, adapters = np.random.default_rng(count), toy_model()[2]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(count, *leaf.shape)), jnp.float32), adapters)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_client_sends_does_not_depend_on_who_is_beside_it(name):
    plan, ids = plan_of(name), jnp.arange(3) + 100
    given = messages(3)
    memory = trees.repeat(plan.codec.init(release.template(plan, toy_model()[2])), 3)
    together = release.compressed(plan, given, memory, ids, 1)
    for c in range(3):
        one = jnp.array([c])
        alone = release.compressed(plan, trees.take(given, one), trees.take(memory, one), ids[one], 1)
        for a, b in zip(*map(jax.tree.leaves, (trees.take(together, one), alone)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert not same(together[0], given)
    assert not same(together[0], release.compressed(plan, given, memory, ids, 2)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_rounds_are_the_same_in_every_layout_and_count_the_bytes(name):
    played = {layout: play(plan_of(name, layout)) for layout in LAYOUTS}
    first = jax.tree.leaves(played["together"][0].adapters)
    start = jax.tree.leaves(toy_model()[2])
    for state, reports in played.values():
        moved, apart, values = 0.0, 0, 0
        for mine, other, before in zip(jax.tree.leaves(state.adapters), first, start, strict=True):
            moved = max(moved, float(jnp.abs(mine - before).max()))
            apart += int((jnp.abs(mine - other) > 1e-5).sum())
            values += mine.size
        # Sums of another order may put single values on the other side of a rounding.
        assert apart <= 0.01 * values
        assert moved > 1e-3
        sent = codec(name).nbytes(toy_model()[2])
        whole = sum(leaf.size * 4 for leaf in start)
        assert {client.upload_bytes for report in reports for client in report.clients} == {sent}
        assert {client.download_bytes for report in reports for client in report.clients} == {whole}
        assert sent < 0.4 * whole


def test_the_memory_stays_with_each_client_and_through_a_break():
    plan = plan_of("largest")
    _, params, adapters = toy_model()
    state = initial_state(plan, adapters)
    cohorts = [set(cohort_of(plan, number).tolist()) for number in (1, 2)]
    assert cohorts[0] != cohorts[1]
    history = [state]
    for _ in range(2):
        leaves, structure = jax.tree.flatten(state)
        state = structure.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
        state, _ = run_round(plan, params, state)
        history.append(state)
    assert same(state, play(plan)[0])
    for cohort, before, after in zip(cohorts, history[:-1], history[1:], strict=True):
        for client in range(len(plan.clients)):
            one = jnp.array(client)
            kept = [trees.take(each.client_state["compression"], one) for each in (before, after)]
            assert same(*kept) is (client not in cohort)


def test_what_does_not_travel_in_a_round_is_neither_coded_nor_counted_nor_forgotten():
    plan = plan_of("largest", aggregation=HALF)
    _, params, adapters = toy_model()
    state, report = run_round(plan, params, initial_state(plan, adapters))
    moved = state.adapters
    assert all(same(moved[path]["a"], adapters[path]["a"]) for path in adapters)
    assert not any(same(moved[path]["b"], adapters[path]["b"]) for path in adapters)
    only_b = codec("largest").nbytes([factors["b"] for factors in adapters.values()])
    assert {client.upload_bytes for client in report.clients} == {only_b}
    memory = state.client_state["compression"]
    assert not any(np.any(memory[path]["a"]) for path in memory)
    state, report = run_round(plan, params, state)
    assert {client.upload_bytes for client in report.clients} == {codec("largest").nbytes(adapters)}
    frozen = state.client_state["compression"]
    state, _ = run_round(plan, params, state)
    for path in memory:
        assert np.any(frozen[path]["a"])
        assert same(frozen[path]["a"], state.client_state["compression"][path]["a"])


def test_under_a_mechanism_the_memory_moves_on_even_where_an_update_is_not_finite():
    """The message is sent all the same, and no later one may tell that the update was not finite."""
    local = LocalTraining(batch_size=3, local_steps=2, optimizer=Optimizer("sgd", 1e38))
    plan = private_plan(LocalDp(0.3, 0.7), "site", local)._replace(codec=codec("largest"))
    state, (report,) = play_privately(plan, rounds=1)
    assert not any(client.included for client in report.clients)
    names = {client.name for client in report.clients}
    for place, client in enumerate(plan.clients):
        memory = trees.take(state.client_state["compression"], jnp.array(place))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(memory)) is (client.name in names)


def test_without_a_mechanism_a_client_that_is_left_out_keeps_its_memory_as_it_was():
    local = LocalTraining(batch_size=3, local_steps=1, keep_optimizer="yes")
    plan = toy_plan(toy_trainer("adamw", 0.01), local, cohort=2, sites=toy_sites()[:2])._replace(codec=codec("largest"))
    _, params, adapters = toy_model()
    state, _ = run_round(plan, params, initial_state(plan, adapters))
    adam, *others = state.client_state["optimizer"]
    spoilt = adam._replace(mu=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), adam.mu))
    state = replace(state, client_state=state.client_state | {"optimizer": (spoilt, *others)})
    after, report = run_round(plan, params, state)
    assert [client.included for client in report.clients] == [True, False]
    for client, moved in ((0, True), (1, False)):
        one = [trees.take(each.client_state["compression"], jnp.array(client)) for each in (state, after)]
        assert same(*one) is not moved
