"""Integer noise against its probability mass function. Every statistical check refuses right code at 1e-6."""

import math

import numpy as np
import pytest
from scipy import stats

from fedjax_llm.privacy import discrete_noise
from fedjax_llm.privacy.discrete_noise import discrete_gaussian, log_poisson, skellam, words

ALPHA = 1e-6
SIZE = 200_000
KEYS = [bytes([number]) * 32 for number in range(1, 4)]


def gaussian_mass(stddev: float, values: np.ndarray) -> np.ndarray:
    support = np.arange(-int(40 * stddev) - 10, int(40 * stddev) + 11)
    return np.exp(-(values**2) / (2 * stddev**2)) / np.exp(-(support**2) / (2 * stddev**2)).sum()


def skellam_mass(variance: float, values: np.ndarray) -> np.ndarray:
    return stats.skellam.pmf(values, variance / 2, variance / 2)


def chi_square(drawn: np.ndarray, mass: np.ndarray, values: np.ndarray) -> float:
    """The p-value of a draw, values expected less than ten times taken together."""
    expected = mass * drawn.size
    often = expected >= 10
    counts = np.array([np.count_nonzero(drawn == value) for value in values[often]])
    rest = drawn.size - expected[often].sum()
    expected, counts = np.append(expected[often], rest), np.append(counts, drawn.size - counts.sum())
    if rest < 10:  # too few to be a cell of their own
        expected, counts = expected[:-1] * counts[:-1].sum() / expected[:-1].sum(), counts[:-1]
    return stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stddev", [0.4, 1.0, 1.7, 6.3])
def test_a_discrete_gaussian_has_its_probabilities(stddev: float, key: bytes):
    values = np.arange(-60, 61)
    assert chi_square(discrete_gaussian(key, stddev, SIZE), gaussian_mass(stddev, values), values) > ALPHA


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("variance", [0.3, 2.0, 40.0, 59.9, 60.1, 400.0])  # means up to 30 come from a table
def test_skellam_noise_has_its_probabilities(variance: float, key: bytes):
    values = np.arange(-160, 161)
    assert chi_square(skellam(key, variance, SIZE), skellam_mass(variance, values), values) > ALPHA


@pytest.mark.parametrize("stddev", [30.0, 5000.0, 2.0**20])
@pytest.mark.parametrize("kind", ["discrete gaussian", "skellam"])
def test_wide_noise_is_as_good_as_normal(kind: str, stddev: float):
    key = KEYS[0]
    drawn = discrete_gaussian(key, stddev, SIZE) if kind != "skellam" else skellam(key, stddev**2, SIZE)
    assert drawn.dtype == np.int64
    assert drawn.shape == (SIZE,)
    # Spread evenly over their unit cells, lattice values of this width are normal to within what SIZE draws can tell.
    spread = drawn + np.random.default_rng(0).uniform(-0.5, 0.5, SIZE)
    assert stats.kstest(spread / math.sqrt(stddev**2 + 1 / 12), "norm").pvalue > ALPHA
    sigmas = stats.norm.isf(ALPHA / 2)
    assert abs(drawn.mean()) < sigmas * stddev / math.sqrt(SIZE)
    assert abs(drawn.var() / stddev**2 - 1) < sigmas * math.sqrt(2.1 / SIZE)
    assert abs(np.count_nonzero(drawn > 0) - np.count_nonzero(drawn < 0)) < sigmas * math.sqrt(SIZE)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < sigmas / math.sqrt(SIZE)


@pytest.mark.parametrize("mean", [31.0, 1e4, 2.0**39])
def test_the_probability_of_a_poisson_variable_keeps_its_digits(mean: float):
    counts = np.floor(mean + math.sqrt(mean) * np.array([-4.0, -1.0, 0.0, 0.5, 3.0]))
    # From one count to the next the logarithm changes by log(mean / k), which has no cancellation.
    steps = np.log(mean / (counts + 1))
    assert log_poisson(counts + 1, mean) - log_poisson(counts, mean) == pytest.approx(steps, rel=1e-6, abs=2e-9)
    peak = -0.5 * math.log(2 * math.pi * mean)
    assert log_poisson(np.array([math.floor(mean)]), mean)[0] == pytest.approx(peak, abs=0.01)
    if mean < 1e5:
        assert log_poisson(counts, mean) == pytest.approx(stats.poisson.logpmf(counts, mean), abs=1e-8)
    assert log_poisson(np.zeros(1), mean)[0] == -mean


@pytest.mark.parametrize("draw", [discrete_gaussian, skellam])
def test_noise_is_a_function_of_its_key_alone(draw):
    one, again, other = (draw(key, 50.0, 1000) for key in (KEYS[0], KEYS[0], KEYS[1]))
    np.testing.assert_array_equal(one, again)
    assert np.count_nonzero(one == other) < 300
    assert draw(KEYS[0], 50.0, 0).shape == (0,)


def test_the_stream_is_aes_in_counter_mode():
    """The first block of AES-256 of zeros under a zero key (NIST)."""
    assert words(bytes(32))(2).tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("length", [0, 8, 16, 31, 33])
def test_a_key_that_is_not_of_32_bytes_is_refused(length: int):
    """A clock has eight."""
    with pytest.raises(ValueError, match="32 bytes"):
        discrete_gaussian(bytes(length), 1.0, 4)


@pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, 2 * discrete_noise.LARGEST_STDDEV])
def test_impossible_noise_is_refused(stddev: float):
    with pytest.raises(ValueError, match="standard deviation"):
        discrete_gaussian(KEYS[0], stddev, 4)
    with pytest.raises(ValueError, match="standard deviation"):
        skellam(KEYS[0], math.copysign(stddev**2, stddev), 4)
    with pytest.raises(ValueError, match="size"):
        skellam(KEYS[0], 1.0, -1)
