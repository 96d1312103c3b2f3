"""Sums over microbatches, and steps of those clients whose batch is complete."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import same
from toy_rounds import SCALING, mean_gradient, toy_example, toy_model, toy_trainer

from fedjax_llm import trees
from fedjax_llm.data.packing import Shape, pack
from fedjax_llm.errors import UserError
from fedjax_llm.training.client_update import LocalTraining, Secrets, Trainer, accumulate, run, start, step
from fedjax_llm.training.rows import rows_of
from fedjax_llm.types import Local

C = 3
RNG = np.random.default_rng(0)
FINISHED = np.array([True, False, True])
DENOMINATOR = np.array([2.0, 1.0, 5.0], np.float32)
RATES = np.array([1.0, 0.0, 0.25], np.float32)


def random_tree():
    return {
        "w": {"a": jnp.asarray(RNG.normal(size=(C, 4, 2)), "f4"), "b": jnp.asarray(RNG.normal(size=(C, 2, 3)), "f4")}
    }


ANCHOR, ADAPTERS, GRADIENTS = (random_tree() for _ in range(3))


def known(start) -> Local:
    """What clients know that keep and receive nothing."""
    return Local(start, (), (), np.full(C, 2))


def stepped(optimizer: optax.GradientTransformation, proximal: float = 0.0):
    trainer = Trainer(None, 1.0, optimizer, proximal)
    before = start(trainer, ADAPTERS)._replace(gradients=GRADIENTS, loss=jnp.arange(3.0))
    return before, step(trainer, before, known(ANCHOR), FINISHED, DENOMINATOR, RATES)


def test_a_step_divides_the_sum_and_scales_the_rate():
    _, after = stepped(optax.sgd(0.1))
    for leaf, a, g in zip(*map(jax.tree.leaves, (after.adapters, ADAPTERS, GRADIENTS)), strict=True):
        np.testing.assert_allclose(leaf[0], a[0] - 0.1 * g[0] / 2, rtol=1e-6)
        np.testing.assert_allclose(leaf[2], a[2] - 0.25 * 0.1 * g[2] / 5, rtol=1e-6)


def test_clients_that_wait_stay_as_they_are():
    before, after = stepped(optax.adam(0.1))
    for name in ("adapters", "optimizer", "gradients"):
        one, other = (jax.tree.map(lambda leaf: leaf[1], getattr(state, name)) for state in (before, after))
        assert same(one, other), name
    assert after.optimizer[0].count.tolist() == [1, 0, 1]
    for leaf in jax.tree.leaves(after.gradients):
        assert not np.any(leaf[FINISHED])  # ready for the next batch
    assert after.loss.tolist() == [0, 1, 2]  # of the whole round


def test_clients_have_optimizers_of_their_own():
    _, after = stepped(optax.adam(0.1))
    for c in (0, 2):
        own, gradient = (jax.tree.map(lambda leaf, c=c: leaf[c], tree) for tree in (ADAPTERS, GRADIENTS))
        adam = optax.adam(0.1 * RATES[c])
        mean = jax.tree.map(lambda g, c=c: g / DENOMINATOR[c], gradient)
        updates, _ = adam.update(mean, adam.init(own), own)
        expected = optax.apply_updates(own, updates)
        for leaf, value in zip(*map(jax.tree.leaves, (after.adapters, expected)), strict=True):
            np.testing.assert_allclose(leaf[c], value, rtol=1e-5)


def test_the_proximal_term_pulls_to_the_anchor():
    _, plain = stepped(optax.sgd(0.1))
    _, pulled = stepped(optax.sgd(0.1), proximal=0.7)
    all_four = (pulled.adapters, plain.adapters, ADAPTERS, ANCHOR)
    for leaf, without, a, o in zip(*map(jax.tree.leaves, all_four), strict=True):
        pull = 0.1 * 0.7 * RATES[:, None, None] * (o - a)
        np.testing.assert_allclose(leaf - without, np.where(FINISHED[:, None, None], pull, 0), atol=1e-6)


def test_adapters_in_bfloat16_stay_so_and_sum_in_float32():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ADAPTERS)
    trainer = Trainer(None, 1.0, optax.adamw(0.1), 0.3)
    state = start(trainer, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.gradients)} == {jnp.dtype("float32")}
    after = step(trainer, state._replace(gradients=GRADIENTS), known(half), FINISHED, DENOMINATOR, RATES)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)


def test_microbatches_add_up_to_the_batch():
    trainer, (model, params, adapters) = toy_trainer(), toy_model()
    examples = [toy_example(i, 9, i) for i in range(3)]
    batches = list(pack([[examples]], [Shape(2, 16, 16)], clients=1, per_token=True))
    assert [batch.finished.tolist() for batch in batches] == [[False], [True]]
    state = start(trainer, trees.repeat(adapters, 1))
    for batch in batches:
        rows = rows_of(batch)
        state = accumulate(trainer, params, state, rows, jax.random.split(jax.random.key(0), 1))
    loss, gradient = mean_gradient(params, adapters, examples, "token")
    tokens = batches[1].denominator[0]
    assert state.loss[0] / tokens == pytest.approx(float(loss), rel=1e-5)
    for leaf, value in zip(*map(jax.tree.leaves, (state.gradients, gradient)), strict=True):
        np.testing.assert_allclose(leaf[0] / tokens, value, atol=1e-5)
    assert trainer.scaling == SCALING
    assert trainer.model is model


def test_a_round_without_work_changes_nothing():
    trainer, (_, params, adapters) = toy_trainer(), toy_model()
    state = start(trainer, trees.repeat(adapters, 2))
    assert run(trainer, params, state, [], jax.random.split(jax.random.key(0), 2), np.ones((2, 1))) is state


def test_a_given_optimizer_state_is_taken_up():
    trainer = Trainer(None, 1.0, optax.adam(0.1), 0.0)
    kept = jax.vmap(trainer.optimizer.init)(ADAPTERS)
    kept = (kept[0]._replace(count=jnp.array([4, 5, 6], jnp.int32)), kept[1])
    state = start(trainer, ADAPTERS, kept)._replace(gradients=GRADIENTS)
    assert step(trainer, state, known(ANCHOR), FINISHED, DENOMINATOR, RATES).optimizer[0].count.tolist() == [5, 5, 7]


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("local_steps", 0), ("local_epochs", 0), ("proximal", -0.1)],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(UserError, match=f"training.{field} is {value}"):
        replace(LocalTraining(), **{field: value})


def test_factors_that_rest_stay_and_gather_no_noise():
    """Their moments must not fill with noise while they rest, which would move them when their turn comes."""
    trainer = Trainer(None, 1.0, optax.adam(0.1), noisy=True)
    before = start(trainer, ADAPTERS)._replace(gradients=GRADIENTS)
    secrets = Secrets(jax.random.split(jax.random.key(0), C), jnp.ones(C))
    live = {"a": jnp.float32(0), "b": jnp.float32(1)}
    numbers = np.zeros(C, np.int32)
    after = step(trainer, before, known(ANCHOR), FINISHED, DENOMINATOR, RATES, numbers, secrets, live)
    assert same(after.adapters["w"]["a"], ADAPTERS["w"]["a"])
    assert not np.any(after.optimizer[0].mu["w"]["a"])
    assert np.all(np.asarray(after.optimizer[0].mu["w"]["b"])[FINISHED] != 0)
    free = step(trainer, before, known(ANCHOR), FINISHED, DENOMINATOR, RATES, numbers, secrets)
    assert np.all(np.asarray(free.optimizer[0].mu["w"]["a"])[FINISHED] != 0)
