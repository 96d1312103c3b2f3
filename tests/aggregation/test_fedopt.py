"""The server-optimiser family against plain NumPy, over several rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.aggregation.fedadagrad import FedAdagrad
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fedavgm import FedAvgM
from fedjax_llm.aggregation.fedyogi import FedYogi
from fedjax_llm.types import Sum

ROUNDS = 5
RNG = np.random.default_rng(0)
START = RNG.normal(size=(3, 2))
DELTAS = 0.1 * RNG.normal(size=(ROUNDS, 4, 3, 2))  # of 4 clients
WEIGHTS = RNG.integers(1, 9, size=(ROUNDS, 4)).astype(float)
MEANS = np.array([np.average(d, axis=0, weights=w) for d, w in zip(DELTAS, WEIGHTS, strict=True)])


def rounds_of(algorithm) -> np.ndarray:
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


def momentum(lr: float, beta: float, nesterov: bool) -> np.ndarray:
    """Hsu et al. 2019: v <- beta v + delta; theta <- theta + lr v (looking ahead: lr (beta v + delta))."""
    theta, v, path = START, 0.0, []
    for delta in MEANS:
        v = beta * v + delta
        theta = theta + lr * (beta * v + delta if nesterov else v)
        path.append(theta)
    return np.stack(path)


def adaptive(second, lr: float, b1: float, b2: float, tau: float) -> np.ndarray:
    """Reddi et al. 2021, Algorithm 2, with moments that start at zero and are corrected for it."""
    theta, m, v, path = START, 0.0, np.zeros_like(START), []
    for t, delta in enumerate(MEANS, start=1):
        m = b1 * m + (1 - b1) * delta
        v = second(v, delta**2, b2)
        theta = theta + lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + tau)
        path.append(theta)
    return np.stack(path)


def adam(v, square, b2):
    return b2 * v + (1 - b2) * square


def yogi(v, square, b2):
    return v - (1 - b2) * square * np.sign(v - square)


def adagrad(lr: float, tau: float) -> np.ndarray:
    """The sum of squares starts at tau^2."""
    return START + np.cumsum(lr * MEANS / np.sqrt(tau**2 + np.cumsum(MEANS**2, axis=0)), axis=0)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (FedAvg(), START + MEANS.cumsum(axis=0)),
        (FedAvg(server_lr=0.3), START + 0.3 * MEANS.cumsum(axis=0)),
        (FedAvgM(momentum=0.0), START + MEANS.cumsum(axis=0)),
        (FedAvgM(), momentum(1.0, 0.9, False)),
        (FedAvgM(server_lr=0.5, momentum=0.7, nesterov=True), momentum(0.5, 0.7, True)),
        (FedAdam(), adaptive(adam, 1e-2, 0.9, 0.99, 1e-3)),
        (FedAdam(server_lr=0.1, b1=0.0, b2=0.5, tau=0.1), adaptive(adam, 0.1, 0.0, 0.5, 0.1)),
        (FedYogi(), adaptive(yogi, 1e-2, 0.9, 0.99, 1e-3)),
        (FedYogi(server_lr=0.1, b1=0.3, b2=0.9, tau=0.01), adaptive(yogi, 0.1, 0.3, 0.9, 0.01)),
        (FedAdagrad(), adagrad(1e-2, 1e-3)),
        (FedAdagrad(server_lr=0.2, tau=0.1), adagrad(0.2, 0.1)),
    ],
    ids=str,
)
def test_the_path_is_that_of_the_published_algorithm(algorithm, expected):
    np.testing.assert_allclose(rounds_of(algorithm), expected, atol=2e-6)


def test_fedavg_of_one_client_is_that_client():
    aggregation = FedAvg().make()
    adapters, client = jnp.asarray(START, jnp.float32), jnp.asarray(START + 1, jnp.float32)
    moved, _ = aggregation.update(
        Sum(7.0 * (client - adapters), jnp.float32(7.0)), aggregation.init(adapters), adapters
    )
    np.testing.assert_allclose(moved, client, rtol=1e-6)


def test_the_oracles_tell_the_algorithms_apart():
    paths = [rounds_of(algorithm()) for algorithm in (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad)]
    gaps = [np.abs(one[-1] - other[-1]).max() for i, one in enumerate(paths) for other in paths[:i]]
    assert min(gaps) > 1e-5
