"""Clients that are trained apart and put together are a round that trains one client at a time, bit for bit."""

import numpy as np
import pytest
from tiny import same
from toy_rounds import LAYOUTS, play, toy_model, toy_plan, toy_trainer

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.geometric_median import GeometricMedian
from fedjax_llm.federation.apart import put_together, train_client
from fedjax_llm.federation.hosts import Hosts
from fedjax_llm.federation.joining import told
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.training.client_update import LocalTraining

LOCAL = LocalTraining(batch_size=3, local_steps=2)


def apart(plan, state, cohort, attempt, without=()):
    """A round's clients, each trained as if it were alone; some do not answer."""
    _, params, _ = toy_model()
    asked = [int(place) for place in cohort if int(place) not in without]
    found = [told(plan, train_client(plan, params, state, place, attempt).part) for place in asked]
    return put_together(plan, state, found), None


@pytest.mark.parametrize("aggregation", [FedAvg(), GeometricMedian()], ids=["sum", "stack"])
def test_put_together_they_give_the_bits_of_the_round(aggregation):
    plan = toy_plan(toy_trainer(), LOCAL)._replace(
        aggregation=aggregation.make(), execution=LAYOUTS["one by one"], measure_error=False
    )
    _, params, adapters = toy_model()
    state, reports = initial_state(plan, adapters), []
    for _ in range(2):
        state, report = run_round(plan, params, state, hosts=Hosts(train=apart))
        reports.append(report)
    whole, expected = play(plan)
    assert same(state, whole)
    assert reports == expected


def test_who_does_not_answer_is_not_in_the_mean():
    plan = toy_plan(toy_trainer(), LOCAL, layout="one by one", cohort=5)._replace(measure_error=False)
    _, params, adapters = toy_model()
    before = initial_state(plan, adapters)

    def without(absent):
        hosts = Hosts(train=lambda *parts: apart(*parts, without=absent))
        after, report = run_round(plan, params, before, hosts=hosts)
        path = next(iter(adapters))
        moved = np.asarray(after.adapters[path]["a"]) - np.asarray(adapters[path]["a"])
        return moved, [client.name for client in report.clients], report

    names = [client.name for client in plan.clients]
    both, present, _ = without({0, 2, 4})
    assert present == [names[1], names[3]]
    (one, _, first), (other, _, second) = without({0, 2, 3, 4}), without({0, 1, 2, 4})
    sizes = [len(plan.clients[place].examples) for place in (1, 3)]
    assert [len(first.clients), len(second.clients)] == [1, 1]
    np.testing.assert_allclose(both, (sizes[0] * one + sizes[1] * other) / sum(sizes), atol=1e-6)


def test_nobody_at_all_leaves_everything_as_it_was():
    plan = toy_plan(toy_trainer(), LOCAL)
    _, params, adapters = toy_model()
    before = initial_state(plan, adapters)
    after, report = run_round(plan, params, before, hosts=Hosts(train=lambda *parts: apart(*parts, range(5))))
    assert same(after.adapters, before.adapters)
    assert report.clients == ()
