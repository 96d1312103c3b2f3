"""Bytes on the wire: what really travels, and the course's formula 2 x rounds x clients x parameters x bytes."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_rounds import play, toy_model, toy_plan, toy_trainer

from fedjax_llm import lora
from fedjax_llm.federation.communication import Traffic, seconds, totals, traffic_of, travelling, tree_bytes
from fedjax_llm.training.client_update import LocalTraining

counts = st.integers(1, 10**9)
STEPS = LocalTraining(batch_size=3, local_steps=1)


@given(counts, counts, st.integers(1, 100), st.integers(1, 50), st.floats(0.1, 1e4))
def test_the_courses_formula(adapter, model, rounds, clients, bandwidth):
    each = 4 * adapter * rounds * clients
    found = totals(each, each, 2 * 4 * adapter * rounds, 4 * model, rounds * clients, rounds, bandwidth)
    assert found["upload_bytes"] + found["download_bytes"] == 2 * rounds * clients * adapter * 4
    assert found["full_model_bytes"] == 2 * rounds * clients * model * 4
    assert found["communication_ratio"] == pytest.approx(model / adapter)
    # Clients send side by side, so their number does not lengthen a round.
    assert found["communication_seconds"] == pytest.approx(2 * rounds * adapter * 32 / (bandwidth * 1e6))
    assert found["full_model_seconds"] == pytest.approx(2 * rounds * model * 32 / (bandwidth * 1e6))


def test_nothing_exchanged_has_no_ratio():
    found = totals(0, 0, 0, 0, 6, 3, 20.0)
    assert (found["upload_bytes"], found["download_bytes"], found["communication_seconds"]) == (0, 0, 0)
    assert (found["full_model_bytes"], found["communication_ratio"]) == (0, None)


@pytest.mark.parametrize(("setting", "layout"), [("centralised", "one by one"), ("local", "together")])
def test_other_settings_exchange_nothing(setting, layout):
    _, (report,) = play(toy_plan(toy_trainer(), STEPS, setting=setting, layout=layout), rounds=1)
    assert {(client.download_bytes, client.upload_bytes) for client in report.clients} == {(0, 0)}


def test_adapters_travel_both_ways():
    _, (report,) = play(toy_plan(toy_trainer(), STEPS), rounds=1)
    size = lora.nbytes(toy_model()[2])
    assert {(client.download_bytes, client.upload_bytes) for client in report.clients} == {(size, size)}


def test_what_is_not_trained_or_beyond_the_rank_does_not_travel():
    tree = {"m": {"a": jnp.zeros((10, 4)), "b": jnp.zeros((4, 6))}}
    assert tree_bytes(travelling(tree)) == 4 * (40 + 24)
    assert tree_bytes(travelling(tree, {"a": 0.0, "b": 1.0})) == 4 * 24
    plan = toy_plan(toy_trainer(), STEPS)._replace(ranks=(3, 1, 3, 1, 3))
    stacked = jax.tree.map(lambda leaf: leaf[None], tree)
    assert traffic_of(plan, tree, (), stacked, None, 1) == Traffic(4 * (10 + 6), 4 * (10 + 6))
    assert traffic_of(plan, tree, jnp.zeros(5), stacked, {"a": 1.0, "b": 0.0}, 4) == Traffic(4 * 69, 4 * 40)


def test_more_that_is_sent_or_received_counts():
    def report(trained, local):
        return {"delta": trained.delta, "loss": jnp.float32(0)}, ()

    plan = toy_plan(toy_trainer(), STEPS)
    algorithm = plan.aggregation._replace(
        client=plan.aggregation.client._replace(report=report),
        update=lambda view, state, adapters: (adapters, state),
        broadcast=lambda state: jnp.zeros(3),
        download=lambda cohort, adapters: 100 * cohort,
    )
    _, (seen,) = play(plan._replace(aggregation=algorithm), rounds=1)
    size = lora.nbytes(toy_model()[2])
    found = {(client.download_bytes, client.upload_bytes) for client in seen.clients}
    assert found == {(size + 12 + 300, size + 4)}


def test_a_megabyte_at_eight_megabits_takes_a_second():
    assert seconds(1e6, 8.0) == 1.0
