"""What must hold on a GPU or TPU too: the same rounds and the same answers as on the CPU."""

from typing import Any

import jax
import numpy as np
import pytest
from tiny import tiny_model
from toy_rounds import toy_model, toy_plan, toy_trainer

from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.secure import ring
from fedjax_llm.training.client_update import LocalTraining

pytestmark = pytest.mark.accelerator


def rounds_on(device: Any, optimizer: str) -> Any:
    """The adapters after two rounds whose weights and state live on a device."""
    plan = toy_plan(toy_trainer(optimizer), LocalTraining(batch_size=2, local_steps=2))
    params, adapters = jax.device_put(toy_model()[1:], device)
    state = initial_state(plan, adapters)
    with jax.default_matmul_precision("highest"):
        for _ in range(2):
            state, _ = run_round(plan, params, state)
    assert {leaf.device for leaf in jax.tree.leaves(state.adapters)} == {device}
    return state.adapters


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rounds_are_those_of_the_cpu(optimizer: str):
    here, cpu = (rounds_on(device, optimizer) for device in (jax.devices()[0], jax.devices("cpu")[0]))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-4), here, cpu)


def test_logits_are_those_of_the_cpu():
    model, params = tiny_model()
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)

    def logits(device: Any) -> np.ndarray:
        there = jax.device_put(params, device)
        with jax.default_matmul_precision("highest"):
            return np.asarray(model.logits(there, model.hidden(there, {}, jax.device_put(tokens, device))[0]))

    np.testing.assert_allclose(logits(jax.devices()[0]), logits(jax.devices("cpu")[0]), rtol=0, atol=1e-4)


def test_integers_and_their_sums_are_those_of_the_host():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(0, 2, (25, 5000)).astype(np.float32), rng.integers(1, 700, 25).astype(np.float32)
    on = ring.grid(4.0, 25, float(weights.sum()))
    here = ring.quantise(values, weights, on)
    there = jax.jit(ring.quantise, static_argnums=2)(*jax.device_put((values, weights), jax.devices()[0]), on)
    assert there.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(here, np.asarray(there))
    np.testing.assert_array_equal(ring.total(here), np.asarray(ring.total(there)))
