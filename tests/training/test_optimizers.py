"""Every optimiser that optax offers by name, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.training.client_update import Trainer, start, step
from fedjax_llm.training.optimizers import Optimizer, Schedule, optimizer_names
from fedjax_llm.types import Local, PyTree

schedules = st.builds(
    Schedule,
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 0.95),
    end=st.floats(0, 1),
)


def one_step(transform: optax.GradientTransformation, rate: float) -> PyTree:
    """The change of one client's parameters."""
    trainer = Trainer(None, 1.0, transform, 0.0)
    adapters = {"w": {"a": jnp.ones((1, 4, 2)), "b": jnp.full((1, 2, 3), -0.5)}}
    state = start(trainer, adapters)._replace(gradients=jax.tree.map(jnp.ones_like, adapters))
    ones = np.ones(1, np.float32)
    after = step(trainer, state, Local(adapters, (), (), ones), np.array([True]), ones, rate * ones)
    return jax.tree.map(jnp.subtract, after.adapters, adapters)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_offered_optimizer_trains_clients_and_heeds_the_rate(name):
    transform = Optimizer(name, 0.01).make()
    whole, half, none = (one_step(transform, rate) for rate in (1.0, 0.5, 0.0))
    if name != "rprop":  # which only looks at its first gradient
        assert all(np.any(leaf) for leaf in jax.tree.leaves(whole))
    for leaf, halved, nothing in zip(*map(jax.tree.leaves, (whole, half, none)), strict=True):
        assert np.isfinite(leaf).all()
        np.testing.assert_allclose(halved, leaf / 2, atol=2e-7)
        assert not np.any(nothing)


def test_the_usual_names_are_offered_and_those_that_need_more_than_a_gradient_are_not():
    assert {"sgd", "adam", "adamw", "lion", "adafactor", "rmsprop"} <= set(optimizer_names())
    assert not {"lbfgs", "noisy_sgd", "polyak_sgd", "chain", "scale_by_adam"} & set(optimizer_names())


def test_options_reach_optax():
    params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.1, 0.2])
    made = Optimizer("sgd", 0.5, {"momentum": 0.9, "nesterov": True}).make()
    updates, _ = made.update(gradient, made.init(params), params)
    np.testing.assert_allclose(updates, -0.5 * 1.9 * gradient, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Optimizer("adamx"), r"optimizer.name is 'adamx', which optax does not have; did you mean .*'adam'"),
        (Optimizer("lbfgs"), "'lbfgs'"),
        (Optimizer("scale_by_adam"), "'scale_by_adam'"),
        (Optimizer("adamw", options={"weight_decai": 0.1}), "takes no option 'weight_decai'; did you mean 'weight_dec"),
        (Optimizer("sgd", options={"learning_rate": 0.1}), "takes no option 'learning_rate'"),
        (Optimizer("sgd", 0.0), "learning_rate is 0.0"),
        (Optimizer("sgd", -1.0), "learning_rate is -1.0"),
        (Optimizer("sgd", float("nan")), "learning_rate is nan"),
        (Optimizer("sgd", float("inf")), "learning_rate is inf"),
    ],
)
def test_what_optax_does_not_know_is_refused(optimizer, message):
    with pytest.raises(UserError, match=message):
        optimizer.make()


@pytest.mark.parametrize(
    ("schedule", "steps", "factors"),
    [
        (Schedule(), 3, [1, 1, 1]),
        (Schedule("linear"), 4, [1, 0.75, 0.5, 0.25]),
        (Schedule("linear", end=0.2), 2, [1, 0.6]),
        (Schedule("constant", warmup=0.5), 4, [0.5, 1, 1, 1]),
        (Schedule("linear", warmup=0.5), 4, [0.5, 1, 1, 0.5]),
        (Schedule("cosine"), 4, [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        (Schedule("cosine"), 1, [1]),
    ],
)
def test_schedules_by_hand(schedule, steps, factors):
    assert [schedule.factor(s, steps) for s in range(steps)] == pytest.approx(factors)


@given(schedule=schedules, steps=st.integers(1, 40))
def test_no_step_is_lost_and_the_rate_rises_then_falls(schedule, steps):
    factors = np.array([schedule.factor(s, steps) for s in range(steps)])
    assert (factors > 0).all()
    assert (factors <= 1 + 1e-9).all()
    peak = int(factors.argmax())
    assert (np.diff(factors[: peak + 1]) >= -1e-9).all()
    assert (np.diff(factors[peak:]) <= 1e-9).all()
    if schedule.shape == "constant":
        assert factors[-1] == 1


@pytest.mark.parametrize("field", [{"warmup": 1.0}, {"warmup": -0.1}, {"end": -0.1}])
def test_impossible_schedules_are_refused(field):
    (name,) = field
    with pytest.raises(UserError, match=f"a schedule's {name} is {field[name]}"):
        Schedule(**field)
