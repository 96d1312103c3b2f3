"""Rounds on several hosts, as threads, against one host that does all; and what hosts exchange."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from threaded_hosts import as_threads
from tiny import same
from toy_private import play_privately, private_plan, toy_base
from toy_rounds import play, toy_model, toy_plan, toy_trainer

from fedjax_llm.aggregation.coordinate_median import CoordinateMedian
from fedjax_llm.aggregation.ditto import Ditto
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fedper import FedPer
from fedjax_llm.aggregation.flora import FLora
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.errors import UserError
from fedjax_llm.federation.availability import Asynchronous
from fedjax_llm.federation.hosts import ALONE, Cluster, Elsewhere, Hosts, here
from fedjax_llm.federation.plan import Federation, RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.privacy.dp_fedavg import AdaptiveClip, DpFedAvg
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.training.client_update import LocalTraining

STEPS = LocalTraining(batch_size=3, local_steps=2)
KEPT = LocalTraining(batch_size=3, local_steps=2, keep_optimizer="yes")


def plain(aggregator=None, trainer=None, local=STEPS, **options) -> RoundPlan:
    return toy_plan(trainer or toy_trainer(), local, aggregation=(aggregator or FedAvg()).make(), **options)


def asynchronous() -> RoundPlan:
    return plain(cohort=2, federation=Federation(cohort=2, asynchronous=Asynchronous(concurrency=4)))


PLANS = {
    "a sum": plain,
    "a sum and the server's memory": lambda: plain(FedAdam(1e-2)),
    "a sum and clients' memory": lambda: plain(Scaffold()),
    "clients' optimisers": lambda: plain(trainer=toy_trainer("adamw", 1e-2), local=KEPT),
    "a stack": lambda: plain(CoordinateMedian(), cohort=4),
    "a stack that is chosen from": lambda: plain(Krum(byzantine=1), cohort=5),
    "a stack of factors": lambda: plain(FLora()),
    "factors that stay": lambda: plain(FedPer()),
    "adapters of one's own": lambda: plain(Ditto()),
    "compressed": lambda: plain()._replace(codec=TopK(0.1).make()),
    "asynchronous": asynchronous,
    "local": lambda: plain(setting="local", cohort=5),
}


def on_host(plan: RoundPlan, hosts: Hosts) -> RoundPlan:
    """The plan as a host has it: of other hosts' clients, only numbers."""
    clients = [
        client
        if hosts.owns(place)
        else type(client)(client.name, client.id, Elsewhere(len(client.examples)), Elsewhere(len(client.units)))
        for place, client in enumerate(plan.clients)
    ]
    return plan._replace(clients=tuple(clients))


def play_on(count: int, plan: RoundPlan, params, adapters, rounds: int = 2):
    """The state and the reports on each of several hosts."""

    def act(hosts: Hosts):
        own = on_host(plan, hosts)
        state, reports = initial_state(own, adapters), []
        for _ in range(rounds):
            state, report = run_round(own, params, state, hosts=hosts)
            reports.append(report)
        return state, reports

    return as_threads(count, act)


def near(one, other, tolerance: float = 5e-5) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)


def check(found, alone) -> None:
    """All hosts hold the same bits; they are those of one host but for the order of sums."""
    (state, reports), (expected, told) = found[0], alone
    assert all(same(other, state) for other, _ in found)
    assert all(repr(other) == repr(reports) for _, other in found)
    near(state, expected)
    for report, wanted in zip(reports, told, strict=True):
        assert [one.name for one in report.clients] == [one.name for one in wanted.clients]
        for one, same_one in zip(report.clients, wanted.clients, strict=True):
            assert (one.examples, one.tokens, one.included) == (same_one.examples, same_one.tokens, same_one.included)
            assert (one.upload_bytes, one.staleness) == (same_one.upload_bytes, same_one.staleness)
            assert one.loss == pytest.approx(same_one.loss, rel=1e-4)
        assert report.tokens == wanted.tokens
        assert report.update_norm == pytest.approx(wanted.update_norm, rel=1e-4)
        assert (report.aggregation_error is None) == (wanted.aggregation_error is None)
        if wanted.aggregation_error is not None:
            assert report.aggregation_error == pytest.approx(wanted.aggregation_error, rel=1e-3, abs=1e-6)


@cache
def alone(name: str):
    plan = PLANS[name]()
    return plan, play(plan)


@pytest.mark.parametrize("name", PLANS)
def test_two_hosts_do_what_one_does(name):
    plan, expected = alone(name)
    check(play_on(2, plan, *toy_model()[1:]), expected)


@pytest.mark.parametrize("name", ["a sum", "a stack"])
def test_a_host_without_a_client_in_the_round(name):
    plan, expected = alone(name)
    found = play_on(5, plan, *toy_model()[1:])
    assert any(len(report.clients) < 5 for report in found[0][1])
    check(found, expected)


PRIVATE = {
    "sites that are sampled": (DpFedAvg(0.5, 1.0), "site"),
    "a clip norm that follows": (DpFedAvg(0.5, 0.2, adaptive=AdaptiveClip()), "site"),
    "records": (DpSgd(2.0, 1.0), "record"),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_noise_is_drawn_once_in_effect(name):
    """Noise drawn twice, or otherwise on one host, would be far above the tolerance."""
    mechanism, unit = PRIVATE[name]
    plan = private_plan(mechanism, unit, LocalTraining(batch_size=2, local_steps=1))
    base = toy_base()
    expected = play_privately(plan)
    found = play_on(2, plan, base.params, base.adapters)
    assert all(same(other, found[0][0]) for other, _ in found)
    near(found[0][0], expected[0])
    quiet = plan._replace(mechanism=plan.mechanism._replace(stddev=0 * plan.mechanism.stddev))
    still, _ = play_privately(quiet)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (still, expected[0])), strict=True)]
    assert max(moved) > 1e-3


def test_no_finite_update_ends_every_host():
    plan = plain(cohort=5)
    _, params, adapters = toy_model()
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, adapters)

    def act(hosts: Hosts) -> str:
        own = on_host(plan, hosts)
        with pytest.raises(UserError) as caught:
            run_round(own, params, initial_state(own, poisoned), hosts=hosts)
        return str(caught.value)

    one, other = as_threads(2, act)
    assert one == other
    assert "site-0" in one
    assert "site-1" in one


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_every_host_gets_what_all_have(values):
    found = as_threads(len(values), lambda hosts: hosts.gather(values[hosts.index]))
    assert found == [values] * len(values)


@given(st.data(), st.sampled_from(["float32", "int32", "uint8", "bool", "float64"]))
def test_arrays_arrive_as_they_were(data, dtype):
    shape = st.tuples() | arrays.array_shapes(min_side=0, max_dims=3, max_side=4)
    array = data.draw(arrays.arrays(dtype, shape))
    for found in as_threads(2, lambda hosts: hosts.from_first({"a": array} if hosts.first else None)):
        assert found["a"].dtype == array.dtype
        assert found["a"].shape == array.shape
        np.testing.assert_array_equal(found["a"], array)


def test_trees_of_the_first_host():
    tree = {
        "key": jax.random.key(3),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "more": (jnp.int32(4), jnp.ones((2, 2))),
    }
    blank = {"key": jax.random.key(0), "half": jnp.zeros(3, jnp.bfloat16), "more": (jnp.int32(0), jnp.zeros((2, 2)))}
    for found in as_threads(2, lambda hosts: hosts.tree_from_first(tree if hosts.first else blank)):
        assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
        assert same({k: v for k, v in found.items() if k != "key"}, {k: v for k, v in tree.items() if k != "key"})
        assert found["half"].dtype == jnp.bfloat16


def test_what_hosts_know_is_merged_in_the_order_of_all():
    order = ["b", "a", "d", "c"]
    own = lambda hosts: {name: place for place, name in enumerate(order) if hosts.owns(place) and name != "d"}  # noqa: E731
    for found in as_threads(3, lambda hosts: hosts.merge(own(hosts), order)):
        assert list(found.items()) == [("b", 0), ("a", 1), ("c", 3)]


@given(st.integers(1, 9), st.integers(0, 100))
def test_every_client_has_one_owner(count, place):
    assert sum(Hosts(index, count).owns(place) for index in range(count)) == 1
    assert ALONE.owns(place)


def test_another_hosts_items_are_counted_and_never_seen():
    items = Elsewhere(3)
    assert len(items) == 3
    assert here(items) == ()
    assert here([1, 2]) == [1, 2]
    for look in (list, lambda one: one[0], lambda one: 4 in one):
        with pytest.raises(LookupError, match="another host's"):
            look(items)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 2, "index": 2, "coordinator": "a:1"}, "hosts.index is 2 of hosts.count=2"),
        ({"count": 0}, "hosts.count=0"),
        ({"count": 2}, "hosts.coordinator is None"),
        ({"count": 2, "coordinator": "10.0.0.1"}, "e.g. 10.0.0.1:8476"),
        ({"patience": 0}, "hosts.patience is 0"),
    ],
)
def test_impossible_clusters_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Cluster(**fields)
