"""Bounds against mechanisms of known epsilon: above it no more often than they say, above zero where it leaks."""

from functools import cache
from math import erf, exp, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

from fedjax_llm.errors import UserError
from fedjax_llm.leakage import audit
from fedjax_llm.leakage.audit import Bound

DELTA, SIGNIFICANCE, CANARIES = 1e-5, 0.01, 1000
METHODS = (audit.one_run, audit.one_run_gaussian, audit.clopper_pearson)
LIMITS = {"significance": SIGNIFICANCE, "delta": DELTA}


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Of the Gaussian mechanism with sensitivity one (Balle and Wang 2018, theorem 8)."""

    def below(x: float) -> float:
        return 0.5 * (1 + erf(x / sqrt(2)))

    return below(0.5 / sigma - epsilon * sigma) - exp(epsilon) * below(-0.5 / sigma - epsilon * sigma)


@cache
def sigma_of(epsilon: float) -> float:
    """The noise with which the Gaussian mechanism has this epsilon at DELTA."""
    return brentq(lambda sigma: gaussian_delta(sigma, epsilon) - DELTA, 0.05, 50)


def scores(seed: int, sigma: float, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Of canaries in and out by fair coins, in noise."""
    rng = np.random.default_rng(seed)
    coins = rng.random(CANARIES) < 0.5
    drawn = shift * coins + sigma * rng.normal(size=CANARIES)
    return drawn[coins], drawn[~coins]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_bounds_exceed_the_true_epsilon_no_more_often_than_they_say(method, epsilon):
    runs = 40 if method is not audit.one_run_gaussian else 5
    above = sum(method(*scores(seed, sigma_of(epsilon)), **LIMITS).epsilon > epsilon for seed in range(runs))
    assert above <= stats.binom.isf(1e-6, runs, SIGNIFICANCE)


@pytest.mark.parametrize("method", METHODS)
def test_a_leak_shows(method):
    bound = method(*scores(0, sigma_of(8.0)), **LIMITS)
    assert 1.0 < bound.epsilon < 8.0
    assert (bound.confidence, bound.delta, bound.canaries) == (1 - SIGNIFICANCE, DELTA, CANARIES)


@pytest.mark.parametrize("method", METHODS)
def test_scores_without_noise_contradict_a_claim_that_they_can_reach(method):
    bound = method(*scores(0, 1e-3), **LIMITS)
    assert audit.beats(bound, 3.0)
    assert not audit.beats(bound, 30.0)


@pytest.mark.parametrize("canaries", [128, 1024])
def test_perfect_scores_show_the_most_that_can_be_shown(canaries):
    # All guesses are right, of which half as many are made as there are canaries: p^guesses is a fifth of the
    # significance, for five numbers of guesses, and p = e^epsilon / (1 + e^epsilon); delta costs a little.
    guesses = canaries // 2
    p = (SIGNIFICANCE / 5) ** (1 / guesses)
    most = audit.most_shown(guesses, guesses, significance=SIGNIFICANCE, delta=1e-12)
    assert most == pytest.approx(np.log(p / (1 - p)), rel=1e-3)
    assert audit.most_shown(guesses, guesses, **LIMITS) < most
    perfect = np.arange(canaries)
    assert audit.one_run(perfect[guesses:], perfect[:guesses], significance=SIGNIFICANCE, delta=1e-12).epsilon == most


@pytest.mark.parametrize("method", [audit.one_run, audit.clopper_pearson])
def test_scores_that_say_nothing_show_something_no_more_often_than_is_allowed(method):
    significance, runs = 0.2, 400
    drawn = np.random.default_rng(0).normal(size=(runs, CANARIES))
    coins = np.random.default_rng(1).random((runs, CANARIES)) < 0.5
    bounds = [method(s[c], s[~c], significance=significance, delta=DELTA) for s, c in zip(drawn, coins, strict=True)]
    assert sum(bound.epsilon > 0 for bound in bounds) <= stats.binom.isf(1e-6, runs, significance)


def test_more_canaries_can_show_more():
    shown = [audit.most_shown(n, n, **LIMITS) for n in (20, 100, 500)]
    assert np.all(np.diff(shown) > 1)


@given(
    mean=st.floats(0, 3),
    deviation=st.floats(0.5, 2).filter(lambda s: s == 1 or abs(s - 1) > 1e-3),
    epsilon=st.floats(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_the_hockey_stick_is_the_integral_of_what_is_above(mean, deviation, epsilon):
    places = np.linspace(-15, 15, 30_001)
    top = stats.norm.pdf(places, mean, deviation) - exp(epsilon) * stats.norm.pdf(places)
    wanted = np.trapezoid(np.maximum(top, 0), places)
    assert audit.hockey_stick(mean, deviation, epsilon) == pytest.approx(wanted, abs=1e-5)


@given(st.floats(0.1, 12))
@settings(max_examples=30, deadline=None)
def test_equal_deviations_give_the_epsilon_of_the_gaussian_mechanism(epsilon):
    assert audit.gaussian_epsilon(1 / sigma_of(epsilon), 1.0, DELTA) == pytest.approx(epsilon, rel=1e-6)


@given(mean=st.floats(0, 4), deviation=st.floats(0.6, 1.6))
@settings(max_examples=40, deadline=None)
def test_telling_two_gaussians_apart_is_as_hard_from_either_side(mean, deviation):
    back = audit.gaussian_epsilon(mean / deviation, 1 / deviation, DELTA)
    assert audit.gaussian_epsilon(mean, deviation, DELTA) == pytest.approx(back, rel=1e-6, abs=1e-9)


def test_what_cannot_be_told_apart_has_epsilon_zero_and_what_is_certain_the_largest():
    assert audit.gaussian_epsilon(0.0, 1.0, DELTA) == 0
    assert audit.gaussian_epsilon(1000.0, 1.0, DELTA) == 200


def cosines(seed: int, sigma: float, canaries: int = 1000, dimension: int = 20_000) -> np.ndarray:
    """Of one Gaussian release of the sum of all canaries' directions, with each of them."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((canaries, dimension), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    release = directions.sum(axis=0) + np.float32(sigma) * rng.standard_normal(dimension, np.float32)
    return (directions @ release / np.linalg.norm(release)).astype(np.float64)


@pytest.mark.parametrize(("epsilon", "within"), [(1.0, 0.75), (3.0, 0.25), (10.0, 0.15)])
def test_canary_directions_estimate_the_epsilon_of_the_gaussian_mechanism(epsilon, within):
    # Of the deviation of a thousand cosines 2 % are chance, which is much of a small epsilon and little of a large one.
    sigma = sigma_of(epsilon)
    bound = audit.canary_clients(cosines(0, sigma), 20_000, delta=DELTA)
    assert bound.epsilon == pytest.approx(epsilon, rel=within)
    # The other canaries lengthen the release by sqrt(1 + k / (d sigma^2)).
    mean = 1 / sqrt(1000 + 20_000 * sigma**2)
    assert bound.details["mean cosine"] == pytest.approx(mean, abs=6 * 20_000**-0.5 / sqrt(1000))
    wanted = audit.gaussian_epsilon(mean * sqrt(20_000), 1.0, DELTA)
    assert bound.details["with deviation of d"] == pytest.approx(wanted, abs=6 * 0.2)


def test_an_estimate_contradicts_no_claim():
    bound = audit.canary_clients(np.full(100, 0.9) + np.linspace(-0.01, 0.01, 100), 20_000, delta=DELTA)
    assert bound.confidence is None
    assert bound.epsilon > 100
    assert not audit.beats(bound, 1.0)


def test_directions_that_were_not_in_show_nothing():
    cosine = np.random.default_rng(0).normal(0, 1e-2, 10_000)
    assert audit.canary_clients(cosine, 10_000, delta=DELTA).epsilon < 0.5
    assert audit.canary_clients(-np.abs(cosine), 10_000, delta=DELTA).details["with deviation of d"] == 0


def test_only_what_is_above_the_claim_contradicts_it():
    bound = Bound("any", 2.0, DELTA, 0.95, 10, "nothing")
    assert audit.beats(bound, 1.99)
    assert not audit.beats(bound, 2.0)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_audited_is_refused(method):
    one = np.ones(3)
    with pytest.raises(UserError, match="0 canaries were in"):
        method(one[:0], one, **LIMITS)
    with pytest.raises(UserError, match="not finite"):
        method(one, one * np.nan, **LIMITS)
    with pytest.raises(UserError, match="significance is 0"):
        method(one, one, significance=0, delta=DELTA)
    with pytest.raises(UserError, match="delta is 1"):
        method(one, one, significance=0.05, delta=1)


def test_cosines_that_are_none_are_refused():
    with pytest.raises(UserError, match="two or more"):
        audit.canary_clients(np.array([0.5]), 100, delta=DELTA)
    with pytest.raises(UserError, match="two or more"):
        audit.canary_clients(np.array([0.5, 1.5]), 100, delta=DELTA)
