"""Norms, rotations and attention by their formulas; the output layer's gradients, which are written out by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_layers as plain_maths
import pytest
from jax.test_util import check_grads

from fedjax_llm.models.layers import (
    LayerNorm,
    RMSNorm,
    grouped_attention,
    rotary_tables,
    rotate,
    soft_capped,
    vocabulary_logits,
)

ROWS, WIDTH, VOCABULARY = 5, 16, 97
TARGETS = np.random.default_rng(0).integers(0, VOCABULARY, ROWS)


def sample(hidden: Any = jnp.float32, table: Any = jnp.float32, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Hidden states [K, D] and a table [V, D] of given types."""
    rng = np.random.default_rng(seed)
    states, words = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(VOCABULARY, WIDTH)) / np.sqrt(WIDTH)
    return jnp.asarray(states, hidden), jnp.asarray(words, table)


def plain(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """The same with the gradients that jax finds."""
    return jnp.einsum("kd,vd->kv", hidden, table, preferred_element_type=jnp.float32)


def loss(logits: Any, hidden: jax.Array, table: jax.Array) -> jax.Array:
    """Cross-entropy of some targets."""
    return -jnp.mean(jax.nn.log_softmax(logits(hidden, table))[np.arange(ROWS), TARGETS])


def by_hand(hidden: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of :func:`loss` in f64."""
    hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
    logits = hidden @ table.T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    weights[np.arange(ROWS), TARGETS] -= 1
    return weights @ table / ROWS, weights.T @ hidden / ROWS


def test_in_f32_value_and_gradients_are_those_of_jax():
    hidden, table = sample()
    np.testing.assert_array_equal(vocabulary_logits(hidden, table), plain(hidden, table))
    own, expected = (jax.grad(loss, argnums=(1, 2))(logits, hidden, table) for logits in (vocabulary_logits, plain))
    for one, other, exact in zip(own, expected, by_hand(hidden, table), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(one, exact, rtol=1e-4, atol=1e-7)


def test_gradients_of_gradients_are_right_too():
    """Attacks on gradients take them."""
    check_grads(lambda *both: jnp.sin(vocabulary_logits(*both)), sample(), order=2, modes=["rev"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("hidden_type", [jnp.bfloat16, jnp.float32])
def test_in_bf16_gradients_are_near_and_of_their_arguments_types(hidden_type):
    hidden, table = sample(hidden_type, jnp.bfloat16)
    logits = vocabulary_logits(hidden, table)
    assert logits.dtype == jnp.float32
    wide = (np.asarray(one, np.float64) for one in (hidden, table))
    np.testing.assert_allclose(logits, np.einsum("kd,vd->kv", *wide), rtol=1e-2, atol=1e-2)
    found = jax.grad(loss, argnums=(1, 2))(vocabulary_logits, hidden, table)
    assert [one.dtype for one in found] == [hidden_type, jnp.bfloat16]
    for one, exact in zip(found, by_hand(hidden, table), strict=True):
        error = np.linalg.norm(np.asarray(one, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 2**-7  # a rounding to 8 bits of what goes in, and one of what comes out


@pytest.mark.parametrize("axis", [0, None])
def test_a_batch_of_hidden_states_has_the_gradients_of_each(axis):
    pairs = [sample(seed=seed) for seed in (1, 2, 3)]
    table = pairs[0][1] if axis is None else jnp.stack([table for _, table in pairs])
    hidden = jnp.stack([states for states, _ in pairs])
    gradient = jax.grad(lambda states, words: loss(vocabulary_logits, states, words), argnums=(0, 1))
    found = jax.vmap(gradient, in_axes=(0, axis))(hidden, table)
    for number, (states, words) in enumerate(pairs):
        expected = gradient(states, pairs[0][1] if axis is None else words)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[number], other, rtol=1e-5, atol=1e-7)


def test_a_narrow_table_is_never_widened_as_it_would_be():
    hidden, table = sample(jnp.bfloat16, jnp.bfloat16)
    programs = {}
    for logits in (vocabulary_logits, plain):
        backward = jax.grad(lambda states, words, logits=logits: loss(logits, states, words))
        programs[logits] = jax.jit(backward).lower(hidden, table).as_text()
    wide = f"tensor<{VOCABULARY}x{WIDTH}xf32>"
    assert wide in programs[plain]
    assert wide not in programs[vocabulary_logits]


@pytest.mark.parametrize(("wanted", "products"), [((0,), 2), ((0, 1), 3)])
def test_a_frozen_table_costs_no_product_for_its_gradient(wanted, products):
    hidden, table = sample()
    backward = jax.grad(lambda states, words: loss(vocabulary_logits, states, words), argnums=wanted)
    operations = jax.jit(backward).lower(hidden, table).compile().cost_analysis()["flops"]
    assert products <= operations / (2 * ROWS * WIDTH * VOCABULARY) < products + 0.5  # the softmax besides


# Norms, rotations, attention


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_rounds_before_the_scale_or_after_it(offset, dtype):
    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(3 * rng.normal(size=shape), dtype) for shape in ((40, WIDTH), WIDTH))
    found = RMSNorm(1e-3, offset).apply({"params": {"scale": scale}}, x)
    wide = plain_maths.normed(np.asarray(x, np.float64), 1.0, 1e-3)
    if offset is None:
        expected = jnp.asarray(wide, dtype) * scale
    else:
        expected = jnp.asarray(wide * (offset + np.asarray(scale, np.float64)), dtype)
    assert found.dtype == dtype
    exact = {"float32": {"rtol": 1e-6}, "bfloat16": {"rtol": 0}}[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), **exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_norm_takes_mean_and_variance_away_and_rounds_once(dtype):
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(5 + 3 * rng.normal(size=shape), dtype) for shape in ((40, WIDTH), WIDTH, WIDTH))
    found = LayerNorm(1e-3).apply({"params": {"scale": scale, "bias": bias}}, x)
    wide, scale, bias = (np.asarray(array, np.float64) for array in (x, scale, bias))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3) * scale + bias
    assert found.dtype == dtype
    exact = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "bfloat16": {"rtol": 2**-8}}[dtype]  # half a unit
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, **exact)


@pytest.mark.parametrize("turned", [4, 8])
def test_the_first_dimensions_of_a_head_are_turned_in_pairs(turned):
    heads = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    frequencies = np.array([1.0, 0.3, 0.1, 0.01])[: turned // 2]
    found = np.asarray(rotate(jnp.asarray(heads), rotary_tables(jnp.arange(5), jnp.asarray(frequencies))))
    for row, at, head in np.ndindex(2, 5, 3):
        expected = plain_maths.rotated(heads[row, at, head], at, frequencies)
        np.testing.assert_allclose(found[row, at, head], expected, atol=1e-6)
    assert np.array_equal(found[..., turned:], heads[..., turned:])


@pytest.mark.parametrize(("scale", "cap"), [(None, None), (0.2, None), (None, 0.5), (3.0, 2.0)])
def test_attention_scales_its_scores_and_then_caps_them(scale, cap):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 6, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    found = grouped_attention(query, key, value, np.tri(6, dtype=bool)[None], scale, cap)
    for row in range(2):
        expected = plain_maths.attended(query[row], key[row], value[row], scale or 0.5, None, cap)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_soft_caps_bound_and_hardly_move_what_is_small():
    x = jnp.linspace(-90.0, 90.0, 181)
    found = np.asarray(soft_capped(x, 30.0))
    assert np.abs(found).max() < 30 == np.abs(soft_capped(1000 * x, 30.0)).max()
    assert np.all(np.diff(found) > 0)
    np.testing.assert_allclose(soft_capped(x / 1000, 30.0), x / 1000, rtol=1e-4)
