"""Quantisers: real encodings of the counted length, the exact variance, and its published bounds."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wire import bfloat16_bytes, bfloat16_values, quantised_bytes, quantised_values

from fedjax_llm.compression.bf16 import Bfloat16
from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.rotated import Rotated, hadamard

DRAWS = 2000


def vector(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, size).astype(np.float32)


def sent(config, values: np.ndarray, key: int = 0) -> np.ndarray:
    codec = config.make()
    return np.asarray(codec.code(jax.random.key(key), {"w": jnp.asarray(values)}, ())[0]["w"])


def draws(config, values: np.ndarray, count: int = DRAWS) -> np.ndarray:
    """What is decoded with many keys, [K, n]."""
    code = config.make().code
    keys = jax.random.split(jax.random.key(3), count)
    return np.asarray(jax.vmap(lambda key: code(key, jnp.asarray(values), ())[0])(keys), np.float64)


@pytest.mark.parametrize(
    ("bits", "block", "size"), [(8, 16, 37), (4, 8, 13), (4, 99, 14), (3, 5, 21), (2, 1, 5), (7, 4, 9)]
)
def test_quantised_values_pack_into_the_bytes_that_are_counted(bits, block, size):
    values = vector(size)
    values[:3] = 0  # with blocks of one value, whole blocks of zeros
    decoded = sent(Quantise(bits, block), values)
    data = quantised_bytes(decoded, values, bits, block)
    assert len(data) == Quantise(bits, block).make().nbytes({"w": values})
    assert np.array_equal(quantised_values(data, size, bits, block), decoded)


def test_four_bits_pack_two_values_a_byte():
    assert Quantise(4, block=100).make().nbytes(np.zeros(100, np.float32)) == 50 + 4
    assert Quantise(4, block=100).make().nbytes(np.zeros(101, np.float32)) == 51 + 8
    assert Quantise(3, block=8).make().nbytes([np.zeros((3, 1), np.float32)] * 3) == 4 + 2 * 4


def test_bfloat16_packs_into_two_bytes_a_value():
    values = vector(33)
    decoded = sent(Bfloat16(), values)
    data = bfloat16_bytes(decoded)
    assert len(data) == Bfloat16().make().nbytes({"w": values}) == 66
    assert np.array_equal(bfloat16_values(data), decoded)


def test_bfloat16_gives_one_of_the_two_neighbours_and_leaves_bfloat16_as_it_is():
    values = vector(50)
    down = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((values.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    decoded = sent(Bfloat16(), values)
    assert ((decoded == down) | (decoded == up)).all()
    assert (decoded == down).any()
    assert (decoded == up).any()
    assert np.array_equal(sent(Bfloat16(), down), down)


def variance(values: np.ndarray, bits: int, block: int) -> float:
    """The expected squared error of stochastic rounding: p (1 - p) squared steps a value."""
    total, levels = 0.0, 2 ** (bits - 1) - 1
    for first in range(0, len(values), block):
        part = np.abs(values[first : first + block].astype(np.float64))
        place = part / part.max() * levels
        up = place - np.floor(place)
        total += ((part.max() / levels) ** 2 * up * (1 - up)).sum()
    return total


@pytest.mark.parametrize(("bits", "block"), [(2, 64), (4, 64), (8, 16)])
def test_the_squared_error_is_that_of_rounding_at_random_and_within_the_bounds(bits, block):
    values, levels = vector(64, seed=1), 2 ** (bits - 1) - 1
    errors = np.square(draws(Quantise(bits, block), values) - values).sum(axis=1)
    expected = variance(values, bits, block)
    # By the central limit theorem; six standard errors are a false alarm in 5e8 draws of the keys.
    assert abs(errors.mean() - expected) < 6 * errors.std() / np.sqrt(DRAWS) + 1e-6
    parts = values.astype(np.float64).reshape(-1, block)
    grid = (block * np.square(np.abs(parts).max(axis=1)) / (4 * levels**2)).sum()
    assert expected <= grid
    assert expected <= np.sqrt(block) / levels * np.square(parts).sum()


def test_the_rotation_is_orthonormal_and_its_own_inverse():
    matrix = np.ones((1, 1))
    for _ in range(4):
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    values = vector(3 * 16).reshape(3, 16)
    rotated = jax.jit(hadamard)(values)
    np.testing.assert_allclose(rotated, values @ matrix / 4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(hadamard)(rotated), values, atol=1e-5)


def test_the_rotation_evens_out_values_that_a_grid_cannot_hold():
    """Suresh et al. 2017: the error falls from sqrt(d) to log(d) where one value is much larger than the others."""
    size, levels = 1024, 1
    values = np.full(size, size**-0.5, np.float32)
    values[17] = 1.0
    square = float(np.square(values).sum())
    errors = np.square(draws(Rotated(Quantise(2, block=size), block=size), values, 300) - values).sum(axis=1)
    bound = (np.log(2 * size) + 1) / (2 * levels**2) * square
    assert errors.mean() + 6 * errors.std() / np.sqrt(300) < bound
    assert variance(values, 2, size) > 2 * bound  # what the grid alone would do


@dataclass(frozen=True)
class First:
    """Keeps the first value alone, which shows the signs of a rotation."""

    def make(self) -> Codec:
        def code(key, message, memory):
            return jnp.where(jnp.arange(message.size) == 0, message, 0.0), memory

        return Codec(lambda message: (), code, lambda message: 4, unbiased=True)


def test_every_key_rotates_in_its_own_way():
    found = np.array([sent(Rotated(First(), block=16), np.ones(16, np.float32), key) for key in range(40)])
    shown = found[np.abs(found[:, 0]) > 0.01]  # where the signs do not cancel
    assert len(shown) > 15
    np.testing.assert_allclose(np.abs(shown), np.abs(shown[:, :1]).repeat(16, axis=1), rtol=1e-5)
    patterns = {tuple(row > 0) for row in shown * shown[:, :1]}
    assert len(patterns) > 0.8 * len(shown)  # of 32768 that there are


@pytest.mark.parametrize(("size", "padded"), [(1, 1), (5, 8), (8, 8), (9, 9), (11, 12), (16, 16), (30, 32), (37, 40)])
def test_a_rotated_message_is_the_seed_and_the_coded_rotation(size, padded):
    """Only the last block of eight is padded; and without coding the message comes back."""
    config = Rotated(Quantise(8, block=16), block=8)
    inner = Quantise(8, block=16).make()
    assert config.make().nbytes([np.zeros(size, np.float32)]) == 8 + inner.nbytes(np.zeros(padded, np.float32))
    values = vector(size)
    np.testing.assert_allclose(sent(Rotated(Bfloat16(), block=8), values), values, atol=2.0**-5 * np.abs(values).max())
