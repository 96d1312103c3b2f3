"""Sums of integers modulo 2^32: they cannot overflow, are exact in any order anywhere, and near the true mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.secure import ring

BOUNDS = st.floats(1e-3, 1e3)
MANY = settings(max_examples=60, deadline=None)


def exact(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean in f64."""
    return weights.astype(np.float64) @ values.astype(np.float64) / weights.astype(np.float64).sum()


@MANY
@given(BOUNDS, st.integers(3, 12), st.integers(1, 2000), st.integers(0, 2**31))
def test_the_mean_is_within_the_stated_bound(bound: float, clients: int, heaviest: int, seed: int):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, heaviest + 1, clients).astype(np.float32)
    values = rng.uniform(-bound, bound, (clients, 50)).astype(np.float32)
    values = np.clip(values, -np.float32(bound), np.float32(bound))
    on = ring.grid(float(np.float32(bound)), clients, float(weights.sum()))
    found = ring.read(ring.total(ring.quantise(values, weights, on)), on)
    assert found.cut == 0
    assert found.weight == weights.sum()
    limit = ring.error_bound(on, clients, found.weight, float(np.abs(values).max()))
    assert np.abs(found.values / np.float64(found.weight) - exact(values, weights)).max() <= limit


@MANY
@given(BOUNDS, st.integers(3, 300), st.floats(1.0, 1e6))
def test_no_sum_overflows_even_where_all_are_at_the_bound(bound: float, clients: int, heaviest: float):
    heaviest, bound = float(np.float32(heaviest)), float(np.float32(bound))
    if clients * heaviest * max(bound, 1) > 2**30:
        return
    on = ring.grid(bound, clients, clients * heaviest)
    weights = np.full(clients, heaviest, np.float32)
    for sign in (1, -1):
        values = np.full((clients, 2), sign * bound, np.float32)
        integers = ring.quantise(values, weights, on)
        lifted = ring.centred(integers, 32).sum(axis=0)  # int64: what the sum would be without a modulus
        np.testing.assert_array_equal(ring.centred(ring.total(integers), 32), lifted)
        assert np.abs(lifted).max() < 2**31


@MANY
@given(st.integers(3, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_host_and_device_give_the_same_bits_in_any_order(clients: int, size: int, seed: int):
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, (clients, size)).astype(np.float32)  # some are beyond the bound
    weights = rng.integers(1, 700, clients).astype(np.float32)
    on = ring.grid(4.0, clients, float(weights.sum()))
    here = ring.quantise(values, weights, on)
    there = jax.jit(ring.quantise, static_argnums=2)(jnp.asarray(values), jnp.asarray(weights), on)
    assert here.dtype == there.dtype == np.uint32
    np.testing.assert_array_equal(here, np.asarray(there))
    order = rng.permutation(clients)
    np.testing.assert_array_equal(ring.total(here), np.asarray(ring.total(there[order])))
    assert ring.read(ring.total(here), on).cut == (np.abs(values) > 4).sum()


def test_what_is_cut_counts_as_the_bound():
    on = ring.grid(2.0, 3, 3.0)
    values = np.array([[5.0, -9.0], [0.0, 0.0], [0.0, 1.0]], np.float32)
    found = ring.read(ring.total(ring.quantise(values, np.ones(3, np.float32), on)), on)
    np.testing.assert_allclose(found.values, [2.0, -1.0], atol=1e-6)
    assert (found.weight, found.cut) == (3.0, 2)


def test_a_client_of_weight_zero_changes_nothing_but_the_count():
    on = ring.grid(2.0, 3, 3.0)
    (row,) = ring.quantise(np.ones((1, 4), np.float32), np.zeros(1, np.float32), on)
    assert not row.any()


@pytest.mark.parametrize(("bits", "value", "expected"), [(16, 2**16 - 1, -1), (16, 2**15, -(2**15)), (8, 127, 127)])
def test_integers_are_lifted_around_zero(bits: int, value: int, expected: int):
    assert ring.centred(np.array([value], np.uint32), bits) == expected


@pytest.mark.parametrize(("bound", "weight"), [(0.0, 3.0), (-1.0, 3.0), (float("inf"), 3.0), (1.0, 0.0)])
def test_impossible_bounds_are_refused(bound: float, weight: float):
    with pytest.raises(UserError, match=r"secure\.bound"):
        ring.grid(bound, 3, weight)


def test_weights_that_leave_no_room_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"federation\.weighting"):
        ring.grid(1e6, 100, 1e5)
