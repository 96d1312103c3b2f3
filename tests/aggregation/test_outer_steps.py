"""FedSGD and DiLoCo: an optimiser's step at the server, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_rounds import mean_gradient, play, toy_model, toy_plan, toy_sites, toy_trainer

from fedjax_llm.aggregation.diloco import DiLoCo
from fedjax_llm.aggregation.fedsgd import FedSgd
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import Sum

ROUNDS = 5
RNG = np.random.default_rng(0)
START = RNG.normal(size=(3, 2))
DELTAS = 0.1 * RNG.normal(size=(ROUNDS, 4, 3, 2))  # of 4 clients
WEIGHTS = RNG.integers(1, 9, size=(ROUNDS, 4)).astype(float)


def path_of(algorithm) -> np.ndarray:
    """The adapters after every round, [rounds, ...]."""
    aggregation, path = algorithm.make(), []
    update = jax.jit(aggregation.update)
    adapters = {"w": {"a": jnp.asarray(START, jnp.float32)}}
    state = aggregation.init(adapters)
    for deltas, weights in zip(DELTAS, WEIGHTS, strict=True):
        total = {"w": {"a": jnp.asarray(np.tensordot(weights, deltas, 1), jnp.float32)}}
        adapters, state = update(Sum(total, jnp.float32(weights.sum())), state, adapters)
        path.append(adapters["w"]["a"])
    return np.stack(path)


def torch_sgd(lr: float, momentum: float, nesterov: bool) -> np.ndarray:
    """SGD as PyTorch documents it: the first buffer is the gradient, with no dampening."""
    theta, buffer, path = START, None, []
    for deltas, weights in zip(DELTAS, WEIGHTS, strict=True):
        gradient = -np.average(deltas, axis=0, weights=weights)
        buffer = gradient if buffer is None else momentum * buffer + gradient
        theta = theta - lr * (gradient + momentum * buffer if nesterov else buffer)
        path.append(theta)
    return np.stack(path)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (DiLoCo(), torch_sgd(0.7, 0.9, True)),
        (DiLoCo(server_lr=0.3, momentum=0.5), torch_sgd(0.3, 0.5, True)),
        (FedSgd(), torch_sgd(0.1, 0.0, False)),
        (FedSgd(server_lr=0.5, momentum=0.8), torch_sgd(0.5, 0.8, False)),
    ],
    ids=str,
)
def test_the_path_is_that_of_the_outer_optimiser(algorithm, expected):
    np.testing.assert_allclose(path_of(algorithm), expected, atol=2e-6)


def test_looking_ahead_is_another_path():
    assert np.abs(path_of(DiLoCo()) - torch_sgd(0.7, 0.9, False)).max() > 0.01


def test_a_round_of_fedsgd_over_all_sites_is_a_gradient_step_on_all_examples():
    local = LocalTraining(batch_size=8, local_epochs=1, optimizer=Optimizer("sgd", 1.0))
    plan = toy_plan(toy_trainer("sgd", 1.0), local, cohort=5, aggregation=FedSgd(server_lr=0.2).make())
    state, _ = play(plan._replace(measure_error=False), rounds=1)
    _, params, adapters = toy_model()
    examples = [example for _, own in toy_sites() for example in own]
    _, gradient = mean_gradient(params, adapters, examples, "example")
    for found, start, slope in zip(*map(jax.tree.leaves, (state.adapters, adapters, gradient)), strict=True):
        np.testing.assert_allclose(found, start - 0.2 * slope, atol=1e-6)
