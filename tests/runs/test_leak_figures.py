"""From single secrets and attacks to means and shares: intervals against oracles, and text for people."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.runs.leak_figures import Estimate, auc_of, by_repetitions, extracted, mean_of, percent, share_of, tries


def secret(repetitions, **fields):
    """The figures of one, as ``leakage.json`` holds them."""
    return {
        "repetitions": repetitions,
        "coin": False,
        "tokens": 5,
        "greedy": 0,
        "foreign_greedy": 0,
        "exposure": 1.0,
        "extrapolated_exposure": 2.0,
        "tries": 10.0,
    } | fields


@given(total=st.integers(1, 300), data=st.data())
def test_a_share_has_clopper_and_pearsons_interval(total, data):
    hits = data.draw(st.integers(0, total))
    found = share_of([True] * hits + [False] * (total - hits))
    assert found.value == hits / total
    assert found.low == pytest.approx(stats.beta.ppf(0.025, hits, total - hits + 1) if hits else 0.0, abs=1e-9)
    assert found.high == pytest.approx(stats.beta.ppf(0.975, hits + 1, total - hits) if hits < total else 1.0, abs=1e-9)


def test_the_interval_of_a_mean_covers_it():
    """Bootstrap intervals of 40 skewed values miss about 7%: of 300, more than 60 or none with probability < 1e-8."""
    rng = np.random.default_rng(0)
    found = [mean_of(rng.exponential(2.0, 40)) for _ in range(300)]
    missed = sum(not one.low <= 2.0 <= one.high for one in found)
    assert 1 <= missed <= 60
    assert all(one.low <= one.value <= one.high for one in found)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_a_mean_is_within_its_interval_and_that_within_the_values(values):
    found = mean_of(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= max(values) + 1e-9
    assert mean_of(values) == found


def test_the_interval_of_a_mean_is_about_that_of_a_normal_one():
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    found, half = mean_of(values), 1.96 * values.std() / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.15)


def test_secrets_come_by_their_repetitions_and_controls_first():
    secrets = [
        secret(8, greedy=5, foreign_greedy=4, beam=1, foreign_beam=None, exposure=6.0, tries=1.0),
        secret(0, exposure=1.0, tries=1e9),
        secret(8, greedy=3, foreign_greedy=0, beam=None, foreign_beam=None, exposure=4.0, tries=3.0),
        secret(1, greedy=4, beam=None, foreign_beam=2, exposure=2.0, extrapolated_exposure=7.0),
        secret(0, exposure=2.0, extrapolated_exposure=4.0, tries=1e7),
        secret(1, coin=True, greedy=5, exposure=None),
        secret(0, coin=True, greedy=5, exposure=None),
    ]
    controls, once, often = by_repetitions(secrets)
    assert [(one.repetitions, one.secrets) for one in (controls, once, often)] == [(0, 2), (1, 1), (8, 2)]
    assert (controls.exposure.value, once.exposure.value, often.exposure.value) == (1.5, 2.0, 5.0)
    assert (controls.extrapolated, once.extrapolated) == (3.0, 7.0)
    assert (controls.greedy.value, once.greedy.value, often.greedy.value) == (0.0, 1.0, 0.5)
    assert (controls.foreign.value, once.foreign.value, often.foreign.value) == (0.0, 0.0, 0.5)
    assert controls.beam is None
    assert (once.beam.value, often.beam.value) == (1.0, 0.5)
    assert (controls.tries, often.tries) == (5.05e8, 2.0)
    assert often.point(often.greedy) == (8, 0.5, often.greedy.low, often.greedy.high)


def test_what_was_not_measured_is_not_made_up():
    (found,) = by_repetitions([secret(2, exposure=None, extrapolated_exposure=None)])
    assert (found.exposure, found.extrapolated, found.beam) == (None, None, None)
    assert percent(found.beam) == "-"
    assert by_repetitions([]) == by_repetitions([secret(1, coin=True)]) == []


@pytest.mark.parametrize(("right", "whole"), [(3, False), (4, True), (5, True)])
def test_a_value_is_whole_without_its_end_of_turn(right, whole):
    assert extracted(secret(1, greedy=right)) is whole
    assert extracted(secret(1, foreign_greedy=right), "foreign_greedy") is whole


def curve(auc, half=0.05):
    return {"auc": auc, "auc_low": auc - half, "auc_high": auc + half}


def test_one_models_auc_keeps_its_interval():
    assert auc_of([{"auc": 0.7, "auc_low": 0.6, "auc_high": 0.75}]) == pytest.approx((0.7, 0.6, 0.75))


@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=6))
def test_the_spread_of_models_widens_the_interval_and_more_models_do_not_shrink_their_own(values):
    found = auc_of([curve(value) for value in values])
    assert found.value == pytest.approx(np.mean(values))
    spread = stats.t.interval(0.95, len(values) - 1, scale=max(stats.sem(values), 1e-12))[1]
    expected = np.sqrt(0.05**2 + spread**2)
    assert found.low == pytest.approx(max(0.0, np.mean(values) - expected), abs=1e-9)
    assert found.high == pytest.approx(min(1.0, np.mean(values) + expected), abs=1e-9)


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1"), (1234.4, "1,234"), (999_999, "999,999"), (3e6, "10^6"), (8e9, "10^10"), (1e15, "> 10^15")],
)
def test_numbers_of_samples_for_people(count, text):
    assert tries(count) == text
    assert tries(float("inf")) == "> 10^15"


def test_estimates_for_people():
    assert str(Estimate(0.5, 0.25, 1.0)) == "0.50 [0.25, 1.00]"
    assert percent(Estimate(0.5, 0.251, 1.0)) == "50% [25%, 100%]"
