"""The error of averaging two factors apart, against NumPy on what every client ended with."""

import jax
import numpy as np
import pytest
from toy_rounds import SCALING, play, toy_model, toy_plan, toy_trainer

from fedjax_llm import lora
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.federation import effective
from fedjax_llm.training.client_update import LocalTraining

STEPS = LocalTraining(batch_size=3, local_steps=2)


def products(adapters) -> dict[str, np.ndarray]:
    return {path: np.asarray(f["a"], np.float64) @ np.asarray(f["b"], np.float64) for path, f in adapters.items()}


def norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in tree.values())))


@pytest.mark.parametrize("layout", ["together", "in pairs"])
@pytest.mark.parametrize("begun", [False, True], ids=["from the base", "from the weights' own part"])
def test_the_error_is_the_distance_from_the_mean_of_the_products(layout, begun):
    """Relative to what that mean has over the base model: with PiSSA the fresh product is a part of the base."""
    plan = toy_plan(toy_trainer("sgd", 1.0), STEPS, layout=layout, cohort=5)
    adapters = toy_model()[2]
    if begun:
        plan = plan._replace(offset={path: -SCALING * product for path, product in lora.products(adapters).items()})
    state, (report,) = play(plan, rounds=1)
    alone, _ = play(plan._replace(setting="local", aggregation=FedAvg().make()), rounds=1)
    shares = np.array([len(client.examples) for client in plan.clients], float)
    shares /= shares.sum()
    clients = [products(jax.tree.map(lambda leaf, c=c: leaf[c], alone.adapters)) for c in range(5)]
    mean = {path: sum(w * own[path] for w, own in zip(shares, clients, strict=True)) for path in adapters}
    server, fresh = products(state.adapters), products(adapters)
    size = {path: mean[path] - fresh[path] * begun for path in mean}
    expected = norm({path: mean[path] - server[path] for path in mean}) / norm(size)
    assert report.aggregation_error == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3


def test_it_is_measured_where_it_can_be_told_and_asked_for():
    plan, adapters = toy_plan(toy_trainer(), STEPS), toy_model()[2]
    assert effective.measured(plan, adapters)
    assert not effective.measured(plan._replace(measure_error=False), adapters)
    assert not effective.measured(plan._replace(setting="local"), adapters)
    personal = plan.aggregation._replace(personal=lambda path, name: name == "b")
    assert not effective.measured(plan._replace(aggregation=personal), adapters)
    with_magnitudes = {path: {**factors, "m": factors["b"][0]} for path, factors in adapters.items()}
    assert not effective.measured(plan, with_magnitudes)
    _, (report,) = play(plan._replace(measure_error=False), rounds=1)
    assert report.aggregation_error is None
