"""Count sketches: linear in one row, exact without collisions, of known variance, robust by the median."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression.sketch import CountSketch

N, DRAWS = 24, 4000
VALUES = np.random.default_rng(0).normal(size=N).astype(np.float32)


def draws(config: CountSketch, values: np.ndarray, count: int = DRAWS) -> np.ndarray:
    code, keys = config.make().code, jax.random.split(jax.random.key(1), count)
    return np.asarray(jax.vmap(lambda key: code(key, jnp.asarray(values), ())[0])(keys), np.float64)


def test_the_variance_of_a_row_is_that_of_the_values_in_the_same_column():
    errors = np.square(draws(CountSketch(1, 7), VALUES) - VALUES)
    expected = (np.square(VALUES, dtype=np.float64).sum() - np.square(VALUES, dtype=np.float64)) / 7
    # By the central limit theorem with a bound for 24 values: a false alarm in 1e7 choices of the keys.
    assert (np.abs(errors.mean(axis=0) - expected) < 6 * errors.std(axis=0) / np.sqrt(DRAWS)).all()


def test_one_row_is_linear():
    codec, key = CountSketch(1, 5).make(), jax.random.key(2)
    one, other, both = (codec.code(key, v, ())[0] for v in (VALUES, VALUES[::-1] * 2, VALUES + VALUES[::-1] * 2))
    np.testing.assert_allclose(one + other, both, atol=1e-5)
    assert np.abs(one - VALUES).max() > 0.1


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_what_is_alone_comes_back_exactly(rows):
    lonely = np.zeros(N, np.float32)
    lonely[11] = -3.25
    decoded, _ = CountSketch(rows, 3).make().code(jax.random.key(0), jnp.asarray(lonely), ())
    assert decoded[11] == np.float32(-3.25)


def test_the_median_is_spared_by_a_large_value_elsewhere():
    values = VALUES.copy()
    values[0] = 1e4
    worst = {rows: np.abs(draws(CountSketch(rows, 64), values, 400) - values)[:, 1:].mean() for rows in (1, 2, 5)}
    assert worst[5] < 0.05 * worst[1]  # three rows of five would have to collide with it
    assert worst[2] > 0.5 * worst[1]  # the mean of two is not


def test_bytes_are_those_of_the_table_and_the_seed():
    message = {"w": np.zeros((100, 3), np.float32), "n": np.float32(1)}
    assert CountSketch(3, 17).make().nbytes(message) == 3 * 17 * 4 + 8 + 4
