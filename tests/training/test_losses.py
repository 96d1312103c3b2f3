"""The chunked loss against the plain one, and its gradient against that of the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from fedjax_llm.training import losses
from fedjax_llm.training.losses import target_nll

CHUNK = 8  # in place of 256, so that few slots make several chunks
MODEL, PARAMS = tiny_model(layers=1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", CHUNK)


def slots(count: int):
    """Hidden states [K, D], targets [K], and weights [K] of which one is zero."""
    rng = np.random.default_rng(count)
    hidden = jnp.asarray(rng.normal(size=(count, 32)), jnp.float32)
    weights = rng.normal(size=count).astype(np.float32)
    weights[0] = 0.0
    return hidden, rng.integers(0, 97, count).astype(np.int32), weights


def plain(params, hidden, tokens):
    """By definition, with all logits at once: the embedding is tied or not as the model says."""
    return -jax.nn.log_softmax(MODEL.logits(params, hidden))[jnp.arange(len(tokens)), tokens]


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 2])
def test_value_and_gradient_are_those_of_the_plain_loss(count):
    hidden, tokens, weights = slots(count)
    value = jax.jit(lambda h: target_nll(MODEL, PARAMS, h, tokens))(hidden)
    np.testing.assert_allclose(value, plain(PARAMS, hidden, tokens), rtol=1e-5, atol=1e-5)
    slope = jax.jit(jax.grad(lambda h: jnp.sum(weights * target_nll(MODEL, PARAMS, h, tokens))))(hidden)
    expected = jax.grad(lambda h: jnp.sum(weights * plain(PARAMS, h, tokens)))(hidden)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(slope[0])  # of weight zero


def test_the_chunk_of_the_package_gives_the_same(monkeypatch):
    hidden, tokens, _ = slots(2 * CHUNK + 3)
    small = target_nll(MODEL, PARAMS, hidden, tokens)
    monkeypatch.undo()
    np.testing.assert_allclose(target_nll(MODEL, PARAMS, hidden, tokens), small, rtol=1e-5)


@pytest.mark.parametrize("count", [CHUNK, 2 * CHUNK + 1])
def test_nothing_flows_to_the_weights(count):
    hidden, tokens, _ = slots(count)
    slopes = jax.grad(lambda params: jnp.sum(target_nll(MODEL, params, hidden, tokens)))(PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))
    # which is a choice: the plain loss has a gradient there
    slopes = jax.grad(lambda params: jnp.sum(plain(params, hidden, tokens)))(PARAMS)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_all_the_logits_are_never_held():
    hidden, tokens, _ = slots(4 * CHUNK)
    slope = jax.grad(lambda h: jnp.sum(target_nll(MODEL, PARAMS, h, tokens)))
    assert f"f32[{CHUNK},97]" in str(jax.make_jaxpr(slope)(hidden))
    assert f"f32[{4 * CHUNK},97]" not in str(jax.make_jaxpr(slope)(hidden))


def test_a_bad_slot_spoils_no_other():
    hidden, tokens, _ = slots(CHUNK + 3)
    spoilt = hidden.at[2].set(jnp.nan)
    value, slope = (
        jax.vmap(jnp.isfinite)(f(spoilt))
        for f in (
            lambda h: target_nll(MODEL, PARAMS, h, tokens),
            jax.grad(lambda h: jnp.sum(target_nll(MODEL, PARAMS, h, tokens))),
        )
    )
    expected = np.arange(CHUNK + 3) != 2
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(slope.all(axis=1), expected)


@pytest.mark.parametrize("large", [100.0, -100.0])
def test_large_logits_do_not_overflow(large):
    hidden, tokens, _ = slots(3)
    assert np.isfinite(target_nll(MODEL, PARAMS, large * hidden, tokens)).all()
