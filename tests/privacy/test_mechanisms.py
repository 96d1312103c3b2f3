"""The numbers in every mechanism: by hand, by the closed form of the Gaussian mechanism, and by jax_privacy's "
"accountants."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import regimes
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.privacy import participation
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.dp_fedavg import DpFedAvg, update_noise
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.guarantee import Privacy, build, spent
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import EVERY_SITE, AdaptiveClip, Budget, Mechanism, Population, releases

RECORDS = regimes.REGIME
SITES = RECORDS._replace(unit="site")
THREE = Population(("a", "b", "c"), (64, 200, 10), (5, 5, 5), (1, 1, 1))
GIVEN = Budget(None, 1e-5)


def whole_run(mechanism: Mechanism, population: Population) -> dict[str, list[Event]]:
    """All that a run releases where each site takes part in as many rounds as the population says."""
    charged: dict[str, list[Event]] = {}
    for number in range(max(population.participations)):
        rounds = zip(population.sites, population.participations, strict=True)
        for name, event in releases(mechanism, [site for site, count in rounds if number < count]).items():
            charged.setdefault(name, []).append(event)
    return charged


def gaussian_delta(epsilon: float, multiplier: float) -> float:
    """Of one Gaussian release (Balle & Wang 2018, arXiv 1805.06530, theorem 8)."""
    normal = NormalDist()
    one, other = 0.5 / multiplier, epsilon * multiplier
    return normal.cdf(one - other) - math.exp(epsilon) * normal.cdf(-one - other)


def jax_privacy_epsilon(multiplier: float, units: int, batch_size: int, steps: int, delta: float) -> float:
    """DP-SGD by jax_privacy's own accountant."""
    from jax_privacy.accounting import DpParams, DpsgdTrainingAccountant, PldAccountantConfig

    accountant = DpsgdTrainingAccountant(PldAccountantConfig(value_discretization_interval=1e-3))
    params = DpParams(noise_multipliers=multiplier, num_samples=units, delta=delta, batch_size=batch_size)
    return accountant.compute_epsilon(steps, params)


def test_dp_sgd_with_given_noise():
    regime = RECORDS._replace(local_steps=3)
    mechanism = DpSgd(0.5, 1.5, "layers", examples_per_unit=2).make(regime, THREE, GIVEN)
    assert (mechanism.name, mechanism.unit, mechanism.clip) == ("DpSgd", "record", Clip(0.5, "layers"))
    assert (mechanism.clipped, mechanism.noised, mechanism.examples_per_unit) == ("gradients", "steps", 2)
    np.testing.assert_array_equal(mechanism.stddev, [1.5, 1.5, 1.5])
    # 16 of 64, 16 of 200, and all 10 of a site that has no 16.
    np.testing.assert_allclose(mechanism.sampling, [0.25, 0.08, 1.0], rtol=1e-15)
    np.testing.assert_allclose(mechanism.denominators, [16, 16, 10], rtol=1e-15)
    assert mechanism.events == {
        "a": Event("gaussian", 1.5, 0.25, 3),
        "b": Event("gaussian", 1.5, 0.08, 3),
        "c": Event("gaussian", 1.5, 1.0, 3),
    }
    assert (mechanism.weight, mechanism.cohort_probability, mechanism.site_weights) == (0.0, None, None)
    assert "the server" in mechanism.adversary


def test_dp_sgd_with_a_given_sampling_probability_divides_by_what_that_means_at_each_site():
    mechanism = DpSgd(1.0, 1.0, sampling_probability=0.1).make(RECORDS, THREE, GIVEN)
    np.testing.assert_allclose(mechanism.denominators, [6.4, 20, 1])
    assert {event.sampling_probability for event in mechanism.events.values()} == {0.1}


@pytest.mark.parametrize("setting", ["local", "centralised"])
def test_dp_sgd_protects_from_nobody_who_holds_the_data(setting: str):
    adversary = DpSgd(1.0, 1.0).make(RECORDS._replace(setting=setting), THREE, GIVEN).adversary
    assert ("pooled data" in adversary) == (setting == "centralised")
    assert "the server" not in adversary


def test_calibrated_dp_sgd_has_noise_of_its_own_at_every_site_and_meets_the_target():
    population = Population(("a", "b"), (64, 200), (5, 3), (1, 1))
    privacy = Privacy(DpSgd(), target_epsilon=3.0, delta=5e-4)
    mechanism = build(privacy, RECORDS, population)
    assert mechanism is not None
    assert mechanism.stddev[0] > 1.2 * mechanism.stddev[1]
    charged = whole_run(mechanism, population)
    assert [sum(event.count for event in charged[site]) for site in "ab"] == [5, 3]
    for site, epsilon in spent(mechanism, charged, 5e-4).items():
        index = population.sites.index(site)
        assert 2.9 < epsilon <= 3.0
        steps, units = population.participations[index], population.units[index]
        oracle = jax_privacy_epsilon(mechanism.stddev[index], units, 16, steps, 5e-4)
        assert epsilon == pytest.approx(oracle, rel=2e-3)


def test_a_site_that_never_takes_part_releases_nothing():
    absent = THREE._replace(participations=(5, 0, 5))
    mechanism = DpSgd(1.0, 1.0).make(RECORDS, absent, GIVEN)
    assert spent(mechanism, whole_run(mechanism, absent), 1e-3, "rdp")["b"] == 0.0


def test_a_patient_of_two_sites_has_an_account_that_meets_the_target_too():
    population = Population(("a", "b", "c"), (16, 16, 16), (4, 4, 4), (1, 1, 1), (("a", "b"),))
    regime = RECORDS._replace(unit="patient", rounds=4)
    mechanism = build(Privacy(DpSgd(), "patient", target_epsilon=2.0, delta=1e-3), regime, population)
    assert mechanism is not None
    epsilons = spent(mechanism, whole_run(mechanism, population), 1e-3, shared=population.shared)
    # Everybody is in every step (q = 1): k steps are one release of multiplier z / sqrt(k).
    assert set(epsilons) == {"a", "b", "c", "a / b"}
    assert epsilons["a / b"] == pytest.approx(2.0, abs=0.02)
    assert epsilons["c"] == pytest.approx(2.0, abs=0.02)
    assert epsilons["a"] == epsilons["b"] < 1.5
    np.testing.assert_allclose(mechanism.stddev[:2], math.sqrt(2) * mechanism.stddev[2], rtol=5e-3)
    assert gaussian_delta(epsilons["a / b"], mechanism.stddev[0] / math.sqrt(8)) <= 1e-3 * (1 + 1e-6)


def test_sites_that_share_owners_by_way_of_others_are_calibrated_together():
    shared = (("a", "b"), ("d", "e"), ("b", "c"), ("c", "d"))
    assert participation._connected(shared) == [{"a", "b", "c", "d", "e"}]
    assert participation._connected((("a", "b"), ("c", "d"))) == [{"a", "b"}, {"c", "d"}]


def test_dp_fedsgd_with_given_noise_and_a_cohort():
    mechanism = DpFedSgd(2.0, 0.7).make(RECORDS._replace(cohort=2), THREE, GIVEN)
    assert (mechanism.clipped, mechanism.noised, mechanism.clip) == ("gradients", "sum", Clip(2.0))
    np.testing.assert_array_equal(mechanism.stddev, [0.7, 0.7, 0.7])
    np.testing.assert_array_equal(mechanism.denominators, [1, 1, 1])
    # Two of three sites a round; 16, 16 and 10 units of each on average.
    assert mechanism.weight == pytest.approx(2 / 3 * (16 + 16 + 10), rel=1e-12)
    assert mechanism.events["b"] == Event("gaussian", 0.7, 0.08, 1)
    assert mechanism.cohort_probability is None
    assert "the server" not in mechanism.adversary
    assert any("secure aggregation" in sentence for sentence in mechanism.assumptions)


def test_calibrated_dp_fedsgd_has_one_noise_and_the_worst_site_meets_the_target():
    population = Population(("a", "b"), (64, 200), (5, 5), (1, 1))
    mechanism = build(Privacy(DpFedSgd(), target_epsilon=3.0, delta=5e-4), RECORDS, population)
    assert mechanism is not None
    epsilons = spent(mechanism, whole_run(mechanism, population), 5e-4)
    assert mechanism.stddev[0] == mechanism.stddev[1]
    assert epsilons["b"] < 2.0 < 2.9 < epsilons["a"] <= 3.0


@given(st.integers(1, 4), st.floats(0.3, 3.0))
def test_under_noise_on_the_sum_a_patient_of_m_sites_moves_the_sum_by_m_clip_norms(m: int, z: float):
    """Everybody in one round: what the account's events compose to is one release of multiplier z / m."""
    names = tuple("abcde")
    population = Population(names, (4,) * 5, (1,) * 5, (1,) * 5, (names[:m],) if m > 1 else ())
    mechanism = DpFedSgd(1.0, z).make(RECORDS._replace(unit="patient", rounds=1), population, GIVEN)
    composed = sum(mechanism.events[site].noise_multiplier ** -2 for site in names[:m]) ** -0.5
    assert composed == pytest.approx(z / m, rel=1e-12)
    assert mechanism.events["e"].noise_multiplier == z
    np.testing.assert_array_equal(mechanism.stddev, np.full(5, z))


def test_calibrated_dp_fedsgd_covers_a_patient_of_two_sites():
    population = Population(("a", "b", "c"), (16, 16, 16), (4, 4, 4), (1, 1, 1), (("a", "b"),))
    regime = RECORDS._replace(unit="patient", rounds=4)
    mechanism = build(Privacy(DpFedSgd(), "patient", target_epsilon=2.0, delta=1e-3), regime, population)
    assert mechanism is not None
    epsilons = spent(mechanism, whole_run(mechanism, population), 1e-3, shared=population.shared)
    assert max(epsilons.values()) == epsilons["a / b"] == pytest.approx(2.0, abs=0.02)
    # Four rounds, in each of which this patient moves the sum by two clip norms.
    assert gaussian_delta(2.0, mechanism.stddev[0] / 2 / math.sqrt(4)) <= 1e-3


def test_dp_fedavg_with_a_secret_cohort():
    hundred = Population(tuple(map(str, range(100))), (1,) * 100, (5,) * 100, (1,) * 100)
    mechanism = DpFedAvg(0.3, 1.1).make(SITES._replace(cohort=20), hundred, GIVEN)
    assert (mechanism.clipped, mechanism.noised, mechanism.weight) == ("deltas", "sum", 20.0)
    assert mechanism.cohort_probability == 0.2
    assert mechanism.sampling is None
    assert mechanism.site_weights is None
    np.testing.assert_array_equal(mechanism.stddev, np.full(100, 1.1))
    assert mechanism.events == {EVERY_SITE: Event("gaussian", 1.1, 0.2, 1)}
    # A round of any cohort, an empty one too, is charged to the one account that every site has.
    assert releases(mechanism, []) == mechanism.events
    assert any("secret" in sentence for sentence in mechanism.assumptions)


@pytest.mark.parametrize("cohort", [None, 3, 7])
def test_dp_fedavg_of_all_sites_assumes_no_secret(cohort: int | None):
    mechanism = DpFedAvg(0.3, 1.1).make(SITES._replace(cohort=cohort), THREE, GIVEN)
    assert (mechanism.cohort_probability, mechanism.weight) == (1.0, 3.0)
    assert not any("secret" in sentence for sentence in mechanism.assumptions)


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_capped_weights_never_exceed_the_sensitivity(examples: int, cap: int):
    mechanism = DpFedAvg(1.0, 1.0, examples_cap=cap).make(SITES._replace(weighting="examples"), THREE, GIVEN)
    assert mechanism.site_weights is not None
    assert mechanism.site_weights(examples) == min(examples / cap, 1.0)


def test_calibrated_dp_fedavg_meets_the_target():
    privacy = Privacy(DpFedAvg(), "site", target_epsilon=2.0, delta=1e-2)
    mechanism = build(privacy, SITES, THREE)
    assert mechanism is not None
    epsilons = spent(mechanism, whole_run(mechanism, THREE), 1e-2)
    assert list(epsilons) == [EVERY_SITE]
    assert epsilons[EVERY_SITE] == pytest.approx(2.0, abs=0.02)
    assert gaussian_delta(2.0, mechanism.stddev[0] / math.sqrt(5)) <= 1e-2


def test_adaptive_clipping_at_the_papers_numbers():
    """Andrew et al. 2021: with sigma_b = m / 20, the updates of m = 100 clients get half a percent more noise at z = "
    "1."""
    grown = update_noise(1.0, AdaptiveClip(count_noise=5.0), cohort=100)
    assert grown == pytest.approx(1 / math.sqrt(1 - 1 / 100), rel=1e-12)
    assert grown < 1.01
    assert update_noise(0.6, AdaptiveClip(count_noise=0.4), cohort=8) == pytest.approx(0.9071147, rel=1e-6)


@pytest.mark.parametrize(("given_noise", "cohort", "count_noise"), [(None, None, 5.0), (None, 60, 3.0), (1.5, 60, 1.5)])
def test_the_noise_of_the_count_is_a_twentieth_of_the_cohort_if_not_given(given_noise, cohort, count_noise):
    hundred = Population(tuple(map(str, range(100))), (1,) * 100, (5,) * 100, (1,) * 100)
    config = DpFedAvg(1.0, 1.0, adaptive=AdaptiveClip(0.3, 0.1, given_noise))
    mechanism = config.make(SITES._replace(cohort=cohort), hundred, GIVEN)
    assert mechanism.adaptive == AdaptiveClip(0.3, 0.1, count_noise)
    assert mechanism.stddev[0] == pytest.approx((1 - (2 * count_noise) ** -2) ** -0.5, rel=1e-12)
    assert update_noise(1.0, AdaptiveClip(count_noise=given_noise), cohort or 100) == mechanism.stddev[0]


@given(st.floats(0.05, 0.95), st.integers(1, 500))
def test_both_releases_of_an_adaptive_round_together_are_one_of_the_charged_multiplier(part: float, cohort: int):
    adaptive = AdaptiveClip(count_noise=cohort / 20)
    z = part * 2 * adaptive.count_noise
    names = tuple(map(str, range(cohort)))
    population = Population(names, (1,) * cohort, (5,) * cohort, (1,) * cohort)
    mechanism = DpFedAvg(1.0, z, adaptive=adaptive).make(SITES, population, GIVEN)
    # Shifts in units of the noise: a clip norm of the updates, half a client of the count.
    moved = math.hypot(1 / mechanism.stddev[0], 0.5 / adaptive.count_noise)
    assert 1 / moved == pytest.approx(z, rel=1e-9)
    assert mechanism.events[EVERY_SITE].noise_multiplier == z
    assert mechanism.stddev[0] > z


def test_local_dp_charges_replacement_and_composes_over_a_sites_own_rounds():
    population = THREE._replace(participations=(5, 2, 1))
    regime = SITES._replace(cohort=2)
    mechanism = LocalDp(0.5, 4.0).make(regime, population, GIVEN)
    assert (mechanism.clipped, mechanism.noised, mechanism.clip) == ("deltas", "deltas", Clip(0.5))
    np.testing.assert_array_equal(mechanism.stddev, [4.0, 4.0, 4.0])
    assert set(mechanism.events.values()) == {Event("gaussian", 2.0, 1.0, 1)}
    epsilons = spent(mechanism, whole_run(mechanism, population), 1e-2)
    for site, rounds in zip(population.sites, population.participations, strict=True):
        assert gaussian_delta(epsilons[site], 2.0 / math.sqrt(rounds)) == pytest.approx(1e-2, rel=1e-2)


def test_assumptions_say_what_a_figure_or_a_unit_is():
    local = LocalDp(0.5, 4.0).make(SITES, THREE, GIVEN)
    assert any("half of LocalDp's own" in sentence for sentence in local.assumptions)
    record = DpSgd(1.0, 1.0).make(RECORDS, THREE, GIVEN)
    assert any("same id at another site" in sentence for sentence in record.assumptions)


def test_calibrated_local_dp_meets_the_target_at_every_site():
    population = THREE._replace(participations=(4, 1, 1))
    mechanism = LocalDp().make(SITES, population, Budget(2.0, 1e-2))
    np.testing.assert_allclose(mechanism.stddev / mechanism.stddev[1], [2, 1, 1], rtol=5e-3)
    np.testing.assert_allclose(mechanism.stddev, [2 * event.noise_multiplier for event in mechanism.events.values()])
    assert gaussian_delta(2.0, mechanism.stddev[1] / 2) == pytest.approx(1e-2, rel=2e-2)
