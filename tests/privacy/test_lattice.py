"""Bounds on Rényi divergences of integer noise against the divergences themselves, in one dimension, by summation."""

import math
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting, calibration, lattice
from fedjax_llm.privacy.accounting import delta_of, epsilon, epsilon_curve, guarantee
from fedjax_llm.privacy.events import LATTICE, Event
from fedjax_llm.privacy.gaussian_releases import to_dp_event
from fedjax_llm.privacy.lattice import ORDERS, poisson_sampled, renyi

SMALL = (2, 3, 5, 8, 16, 32)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own: nothing that another version computed is believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDJAX_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def shared(kind: str, share: float, summands: int, shift: float = 1, values: int = 1, **sampling) -> Event:
    """The event of shares of this standard deviation."""
    z = share * math.sqrt(summands) / shift
    return Event(kind, z, summands=summands, sensitivity=float(shift), values=values, **sampling)


def log_mass(kind: str, share: float, summands: int) -> np.ndarray:
    """Logarithms of the probabilities of the sum of the shares, by convolution, the origin in the middle."""
    reach = 400
    values = np.arange(-reach, reach + 1)
    if kind == "skellam":
        variance = summands * share**2
        return stats.skellam.logpmf(values, variance / 2, variance / 2)
    one = np.exp(-(values**2) / (2 * share**2))
    mass = one / one.sum()
    total = mass
    for _ in range(summands - 1):
        total = np.convolve(total, mass, mode="same")
    with np.errstate(divide="ignore"):
        return np.log(total)


def divergence(first: np.ndarray, second: np.ndarray, order: int) -> float:
    """Rényi's, of log masses, where both are known to float64."""
    known = (first > -200) & (second > -200)
    terms = order * first[known] - (order - 1) * second[known]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


@pytest.mark.parametrize("kind", LATTICE)
@pytest.mark.parametrize(
    ("share", "summands", "shift"), [(3.0, 1, 1), (2.0, 3, 1), (2.5, 4, 3), (4.0, 2, 5), (1.2, 9, 2)]
)
def test_the_bound_is_above_the_divergence_and_close(kind: str, share: float, summands: int, shift: int):
    mass = log_mass(kind, share, summands)
    moved = np.roll(mass, shift)
    bounds = dict(zip(ORDERS.tolist(), renyi(shared(kind, share, summands, shift)), strict=True))
    for order in SMALL:
        exact = max(divergence(mass, moved, order), divergence(moved, mass, order))
        assert exact <= bounds[order] * (1 + 1e-9)
        if order <= 8:
            assert bounds[order] <= (1.6 if kind == "skellam" else 1.25) * exact  # a theorem for wider noise than this


@pytest.mark.parametrize("kind", LATTICE)
@pytest.mark.parametrize("probability", [0.01, 0.2, 0.7, 0.99])
def test_the_bound_for_samples_is_above_the_divergences_both_ways(kind: str, probability: float):
    """The noise is symmetric, so that taking a unit away reveals no more than adding it."""
    mass = log_mass(kind, 8.0, 2)
    moved = np.roll(mass, 12)
    mixed = np.logaddexp(math.log1p(-probability) + mass, math.log(probability) + moved)
    bounds = dict(zip(ORDERS.tolist(), renyi(shared(kind, 8.0, 2, 12, sampling_probability=probability)), strict=True))
    for order in SMALL:
        added, removed = divergence(mixed, mass, order), divergence(mass, mixed, order)
        assert removed <= added * (1 + 1e-9)
        assert added <= bounds[order] * (1 + 1e-9)
    assert bounds[2] <= 1.1 * divergence(mixed, mass, 2)


@given(st.floats(-6, 6), st.floats(0.001, 0.999), st.integers(2, 64))
def test_symmetric_noise_reveals_most_when_a_unit_is_added(log_ratio: float, q: float, order: int):
    """What the bound for samples rests on, for one pair of mirrored points of likelihood ratio r."""
    r = math.exp(log_ratio)
    here, there = 1 - q + q * r, q + (1 - q) * r
    added = here**order + there**order * r ** (1 - order)
    removed = here ** (1 - order) + there ** (1 - order) * r**order
    assert removed <= added * (1 + 1e-9)


@settings(max_examples=25)
@given(st.floats(0.6, 20), st.floats(1e-4, 0.9999))
def test_sampled_gaussian_divergences_are_those_of_dp_accounting(z: float, probability: float):
    whole = ORDERS / (2 * z**2)
    found = poisson_sampled(whole, probability)
    event = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(z))
    theirs = dp_accounting.rdp.RdpAccountant(
        orders=ORDERS, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
    ).compose(event)
    assert (found >= theirs.rdp * (1 - 1e-9) - 1e-12).all()  # pyrefly: ignore[missing-attribute]
    np.testing.assert_allclose(found, theirs.rdp, rtol=1e-6, atol=1e-11)  # pyrefly: ignore[missing-attribute]
    assert (found <= whole).all()


def test_wide_noise_costs_what_gaussian_noise_of_the_same_multiplier_costs():
    for kind in LATTICE:
        event = Event(kind, 1.3, 0.1, 40, summands=8, sensitivity=2.0**16, values=2**19)
        assert epsilon([event], 1e-5) == pytest.approx(
            min(_gaussian_by_integer_orders(event), epsilon([replace(event, kind="gaussian")], 1e-5, "rdp") * 1.02),
            rel=1e-6,
        )


def _gaussian_by_integer_orders(event: Event) -> float:
    rdp = event.count * poisson_sampled(ORDERS / (2 * event.noise_multiplier**2), event.sampling_probability)
    return dp_accounting.rdp.compute_epsilon(ORDERS.tolist(), rdp.tolist(), 1e-5)[0]


@pytest.mark.parametrize("kind", LATTICE)
def test_narrow_noise_and_large_changes_cost_more(kind: str):
    wide = epsilon([Event(kind, 2.0, summands=10, sensitivity=4000.0, values=1024)], 1e-5)
    narrow = epsilon([Event(kind, 2.0, summands=10, sensitivity=1.0, values=1024)], 1e-5)
    assert narrow > wide * 1.01


def test_shares_of_discrete_gaussians_that_are_too_narrow_show_nothing():
    assert epsilon([shared("discrete gaussian", 0.49, 10_000)], 1e-5) == math.inf
    assert epsilon([shared("discrete gaussian", 0.51, 10_000, values=2**20)], 1e-5) > 1000
    assert epsilon([shared("skellam", 0.49, 10_000)], 1e-5) < 1


def test_a_change_in_l1_is_bounded_by_both_dimensions_and_integrality():
    assert lattice.l1(3.0, 4) == 6.0  # at most sqrt(4) * 3
    assert lattice.l1(2.0, 100) == 4.0  # at most four ones
    assert lattice.l1(0.5, 100) == 0.25


@pytest.mark.parametrize("kind", LATTICE)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_all_questions_agree_whatever_accountant_is_asked_for(kind: str, accountant):
    event = Event(kind, 1.5, 0.2, 1, summands=5, sensitivity=900.0, values=256)
    ten, mixed = replace(event, count=10), Event("gaussian", 2.0, 0.5, 3)
    found = guarantee([ten, mixed], 1e-5, accountant)
    assert found.accountant == "rdp"
    assert found == guarantee([mixed, *[event] * 10], 1e-5, accountant, keep=False)
    assert max(epsilon([ten], 1e-5), epsilon([mixed], 1e-5)) < found.epsilon
    assert found.epsilon < epsilon([ten], 1e-5) + epsilon([mixed], 1e-5, "rdp")
    assert delta_of([ten, mixed], found.epsilon, accountant) == pytest.approx(1e-5, rel=1e-6)
    curve = epsilon_curve([[event], [], [event]], 1e-5, accountant)
    assert curve[0] == curve[1] < curve[2] == epsilon([replace(event, count=2)], 1e-5)
    z = calibration.noise_multiplier_of_all([[ten]], 2.0, 1e-5, accountant)
    assert epsilon([replace(ten, noise_multiplier=z)], 1e-5) <= 2.0
    assert epsilon([replace(ten, noise_multiplier=z - 1e-3)], 1e-5) > 2.0
    assert calibration.rounds_within(event, found.epsilon, 1e-5, accountant) >= 10
    assert calibration.sampling_probability_within(ten, epsilon([ten], 1e-5), 1e-5, accountant) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", LATTICE)
def test_no_noise_is_no_privacy_and_nothing_released_costs_nothing(kind: str):
    event = Event(kind, 0.0, summands=2, sensitivity=10.0, values=4)
    assert epsilon([event], 1e-5) == math.inf
    assert delta_of([event], 1.0) == 1.0
    assert epsilon([replace(event, noise_multiplier=1.0, count=0)], 1e-5) == 0.0


@pytest.mark.parametrize("kind", LATTICE)
@pytest.mark.parametrize("change", [{"summands": 0}, {"sensitivity": 0.0}, {"sensitivity": math.inf}, {"values": 0}])
def test_events_without_what_their_cost_depends_on_are_refused(kind: str, change: dict):
    event = replace(Event(kind, 1.0, summands=2, sensitivity=10.0, values=4), **change)
    with pytest.raises(UserError, match="cannot be accounted for"):
        epsilon([event], 1e-5)


def test_dp_accounting_has_no_word_for_integer_noise():
    with pytest.raises(UserError, match="no sampled Gaussian"):
        to_dp_event([shared("skellam", 2.0, 3)])


def test_answers_in_the_cache_are_of_the_event_that_was_asked_about():
    event = Event("skellam", 1.0, summands=4, sensitivity=50.0, values=64)
    found = {
        epsilon([replace(event, **change)], 1e-5)
        for change in ({}, {"sensitivity": 3.0}, {"kind": "discrete gaussian"})
    }
    assert len(found) == 3
    assert accounting.epsilon([event], 1e-5) in found
