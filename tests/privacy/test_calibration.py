"""Calibration: the least noise, the most rounds, the largest sampling that a target allows, and what delta may be."""

import hypothesis
import hypothesis.strategies as st
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import calibration, disk_cache
from fedjax_llm.privacy.accounting import epsilon
from fedjax_llm.privacy.calibration import (
    check_delta,
    noise_multiplier_of_all,
    noise_multipliers,
    rounds_within,
    sampling_probability_within,
)
from fedjax_llm.privacy.events import Event


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own: nothing that another version computed is believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDJAX_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_accounting(monkeypatch):
    """From here on nothing is accounted, and nothing is remembered but what is on disk."""

    def refuse(*_, **__):
        raise AssertionError("accounted again")

    def stop():
        monkeypatch.setattr(calibration, "guarantee", refuse)
        monkeypatch.setattr(disk_cache, "_seen", {})

    return stop


def gaussian(noise_multiplier=0.0, probability=1.0, count=1):
    return Event("gaussian", noise_multiplier, probability, count)


@pytest.mark.parametrize(
    ("template", "target", "delta", "accountant"),
    [
        (gaussian(probability=0.1, count=100), 4.0, 1e-3, "pld"),
        (gaussian(probability=0.1, count=100), 4.0, 1e-3, "rdp"),
        (gaussian(count=20), 8.0, 1e-3, "pld"),
        (Event("banded", 0.0, 0.2, 30, bands=4), 2.0, 1e-4, "pld"),
        (Event("matrix", 0.0, count=64), 1.0, 1e-6, "pld"),
        (gaussian(probability=0.8, count=200), 250_000.0, 1e-5, "pld"),
    ],
)
def test_the_noise_is_the_least_that_meets_the_target(template, target, delta, accountant):
    (found,) = noise_multipliers([template], target, delta, accountant)

    def cost(noise_multiplier):
        event = Event(template.kind, noise_multiplier, template.sampling_probability, template.count, template.bands)
        return epsilon([event], delta, accountant)

    assert cost(found) <= target < cost(found - 1e-3)
    assert found == round(found * 1000) / 1000


def test_jax_privacy_finds_the_same_noise():
    from jax_privacy.accounting import DpsgdTrainingAccountant, PldAccountantConfig, calibrate_noise_multiplier

    theirs = calibrate_noise_multiplier(
        target_epsilon=3.0,
        accountant=DpsgdTrainingAccountant(PldAccountantConfig(value_discretization_interval=1e-3)),
        batch_sizes=40,
        num_updates=60,
        num_samples=400,
        target_delta=1e-4,
        tol=1e-3,
    )
    (ours,) = noise_multipliers([gaussian(probability=0.1, count=60)], 3.0, 1e-4)
    assert ours == pytest.approx(theirs, abs=2.5e-3)


def test_equal_templates_are_calibrated_once_with_progress_and_kept_on_disk(no_accounting, monkeypatch):
    searches, seen = [], []
    search = calibration._least_noise
    monkeypatch.setattr(calibration, "_least_noise", lambda *args: searches.append(args) or search(*args))
    # The noise multipliers of templates do not matter.
    templates = [gaussian(1.0, count=9), gaussian(2.0, count=16), gaussian(3.0, count=9)]
    first = noise_multipliers(templates, 2.0, 1e-5, progress=lambda *args: seen.append(args))
    assert len(searches) == 2
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert first[0] == first[2] < first[1]
    no_accounting()
    assert noise_multipliers(templates, 2.0, 1e-5) == first
    for target, delta, accountant in ((2.1, 1e-5, "pld"), (2.0, 1e-6, "pld"), (2.0, 1e-5, "rdp")):
        with pytest.raises(AssertionError, match="again"):
            noise_multipliers(templates, target, delta, accountant)


def test_common_noise_is_what_the_worst_composition_needs():
    compositions = [[gaussian(count=5)], [gaussian(count=9), gaussian(probability=0.5, count=2)], [gaussian(count=7)]]
    seen = []
    found = noise_multiplier_of_all(compositions, 3.0, 1e-5, progress=lambda *args: seen.append(args))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    alone = [noise_multiplier_of_all([composition], 3.0, 1e-5) for composition in compositions]
    assert found == max(alone) == alone[1]
    assert noise_multiplier_of_all(compositions[::-1], 3.0, 1e-5) == found
    # The costliest by count is not always the one that needs most: here sampling decides.
    tricky = [[gaussian(probability=0.1, count=300)], [gaussian(count=2)]]
    assert noise_multiplier_of_all(tricky, 3.0, 1e-5) == max(
        noise_multiplier_of_all([one], 3.0, 1e-5) for one in tricky
    )


def test_rounds_fill_the_budget(no_accounting):
    event = gaussian(4.0, 0.5, 2)
    found = rounds_within(event, 2.0, 1e-5)
    assert epsilon([gaussian(4.0, 0.5, 2 * found)], 1e-5) <= 2.0 < epsilon([gaussian(4.0, 0.5, 2 * found + 2)], 1e-5)
    assert rounds_within(gaussian(0.5), 0.1, 1e-5) == 0
    assert rounds_within(gaussian(0.0), 8.0, 1e-5) == 0
    assert rounds_within(gaussian(1000.0), 8.0, 1e-5, most=50) == 50
    no_accounting()
    assert rounds_within(event, 2.0, 1e-5) == found
    with pytest.raises(AssertionError, match="again"):
        rounds_within(gaussian(4.0, 0.5, 3), 2.0, 1e-5)


def test_sampling_fills_the_budget(no_accounting):
    event = gaussian(2.0, 1.0, 20)
    found = sampling_probability_within(event, 2.0, 1e-5)
    assert 0 < found < 1
    assert epsilon([gaussian(2.0, found, 20)], 1e-5) <= 2.0 < epsilon([gaussian(2.0, found + 1e-6, 20)], 1e-5)
    assert sampling_probability_within(gaussian(50.0, 0.1), 8.0, 1e-5) == 1.0
    assert sampling_probability_within(gaussian(0.0, 0.1), 8.0, 1e-5) == 0.0
    no_accounting()
    assert sampling_probability_within(gaussian(2.0, 0.3, 20), 2.0, 1e-5) == found


@hypothesis.given(st.integers(-5, 200), st.integers(1, 50), st.integers(1, 80), st.integers(1, 200))
def test_the_search_finds_the_first_and_asks_no_number_twice(first, low, length, guess):
    asked = []

    def test(number):
        asked.append(number)
        return number >= first

    end = low + length
    found = calibration._first(test, low, end, max(guess, low))
    assert found == next((number for number in range(low, end) if number >= first), end)
    assert len(asked) == len(set(asked))
    assert all(low <= number < end for number in asked)


@pytest.mark.parametrize("ask", [rounds_within, sampling_probability_within])
def test_a_matrix_mechanism_has_neither_rounds_nor_sampling_to_choose(ask):
    with pytest.raises(UserError, match=r"matrix mechanism.*calibrate"):
        ask(Event("matrix", 1.0, count=10), 1.0, 1e-5)


def test_impossible_targets_are_refused():
    searches = [
        lambda *target: noise_multipliers([gaussian()], *target),
        lambda *target: noise_multiplier_of_all([[gaussian()]], *target),
        lambda *target: rounds_within(gaussian(1.0), *target),
        lambda *target: sampling_probability_within(gaussian(1.0), *target),
    ]
    for search in searches:
        for target in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(UserError, match=f"the target epsilon is {target}; it must be positive and finite"):
                search(target, 1e-5)
        for delta in (0.0, 1.0):
            with pytest.raises(UserError, match=f"delta is {delta}"):
                search(1.0, delta)
        with pytest.raises(UserError, match="unknown accountant 'pld2'; did you mean 'pld'"):
            search(1.0, 1e-5, "pld2")
    with pytest.raises(UserError, match=r"sampling probability is 1\.5"):
        noise_multipliers([gaussian(probability=1.5)], 1.0, 1e-5)
    with pytest.raises(
        UserError, match=r"no noise multiplier up to 10000 gives epsilon 0\.001 at delta 1e-09 for 9{9}"
    ):
        noise_multipliers([gaussian(count=999_999_999)], 1e-3, 1e-9)


def test_delta_is_checked_against_the_units_of_every_account():
    check_delta(1e-5, {"nervous": 10_000, "every site": 20})
    check_delta(1e-3, {"a": 100})
    with pytest.raises(UserError) as refused:
        check_delta(1e-3, {"small": 60, "large": 7000, "larger": 12_345})
    text = str(refused.value)
    assert "'larger' has 12345 (delta at most 8.1e-06)" in text
    assert "'large' has 7000 (delta at most 1.4e-05)" in text
    assert "small'" not in text
    assert text.endswith("Set delta to 8.1e-06 or less.")
    check_delta(8.1e-6, {"larger": 12_345})
    for delta in (0.0, 1.0):
        with pytest.raises(UserError, match=f"delta is {delta}"):
            check_delta(delta, {"a": 3})


@hypothesis.given(st.integers(1, 10**9))
def test_the_delta_that_is_advised_is_accepted(count):
    with pytest.raises(UserError) as refused:
        check_delta(0.5, {"a": count})
    check_delta(float(str(refused.value).rsplit("Set delta to ", 1)[1].removesuffix(" or less.")), {"a": count})
