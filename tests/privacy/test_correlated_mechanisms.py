"""Correlated noise in the mechanisms: its sensitivity is that of what the sampler really does."""

import math
from itertools import pairwise

import numpy as np
import pytest
import regimes

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.guarantee import spent
from fedjax_llm.privacy.mechanism import EVERY_SITE, Budget, Mechanism, Population

RECORDS = regimes.REGIME._replace(rounds=8)
TURNS = RECORDS._replace(cohort=1)
EVERY_ROUND = Population(("a", "b"), (256, 40), (8, 8), (1, 1))
IN_TURN = Population(("a", "b"), (256, 40), (2, 1), (4, 8))
GIVEN = Budget(None, 1e-5)
BANDS = BandedToeplitz(bands=4)


def worst(mechanism: Mechanism, steps: int, separation: int, participations: int) -> float:
    """The largest ||C u||^2, by trying every pattern with numpy."""
    column = mechanism.correlated.coefficients
    matrix = np.array([[column[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])
    best = 0.0
    for pattern in range(1, 2**steps):
        places = [i for i in range(steps) if pattern >> i & 1]
        apart = all(later - earlier >= separation for earlier, later in pairwise(places))
        if apart and len(places) <= participations:
            best = max(best, float(np.square(matrix[:, places].sum(axis=1)).sum()))
    return best


def test_banded_noise_at_the_sites_samples_from_groups_that_take_turns():
    mechanism = DpSgd(1.0, 1.5, noise=BANDS).make(RECORDS._replace(local_steps=2), EVERY_ROUND, GIVEN)
    # 16 of a group of 64; a group of 10 has no 16, so all of it takes part.
    np.testing.assert_allclose(mechanism.sampling, [0.25, 1.0])
    np.testing.assert_allclose(mechanism.denominators, [16, 10])
    assert mechanism.events == {"a": Event("banded", 1.5, 0.25, 2, 4), "b": Event("banded", 1.5, 1.0, 2, 4)}
    assert mechanism.correlated.steps == 16
    # A unit takes part once in a turn of the groups; what it changes then lasts for as many steps as there are bands.
    column = mechanism.correlated.coefficients
    np.testing.assert_allclose(mechanism.stddev, 1.5 * math.sqrt(np.square(column).sum()), rtol=1e-6)
    assert not column[4:].any()


def test_a_run_of_banded_noise_costs_a_release_for_each_turn_of_the_groups():
    mechanism = DpSgd(1.0, 1.5, noise=BANDS).make(RECORDS, EVERY_ROUND, GIVEN)
    rounds = {site: [event] * 8 for site, event in mechanism.events.items()}
    turns = {"a": [Event("gaussian", 1.5, 0.25, 2)], "b": [Event("gaussian", 1.5, 1.0, 2)]}
    assert spent(mechanism, rounds, 1e-4) == spent(mechanism, turns, 1e-4)


def test_without_groups_a_unit_of_a_site_may_be_in_every_step_which_leaves_nothing_to_gain():
    with pytest.raises(UserError, match="up to 8 times in 8 steps, 1 or more apart"):
        DpSgd(1.0, 1.0, noise=BandedToeplitz(4, amplified=False)).make(RECORDS, EVERY_ROUND, GIVEN)


@pytest.mark.parametrize("unit", ["record", "site"])
def test_noise_at_the_server_covers_the_worst_pattern_of_cohorts_that_take_turns(unit: str):
    noise = BandedToeplitz(3, amplified=False)
    config = DpFedSgd(1.0, 0.9, noise=noise) if unit == "record" else DpFedAvg(1.0, 0.9, noise=noise)
    mechanism = config.make(TURNS._replace(unit=unit), IN_TURN, GIVEN)
    worst_case = math.sqrt(worst(mechanism, 8, separation=4, participations=2))
    assert mechanism.stddev[0] == pytest.approx(0.9 * worst_case, rel=1e-5)
    assert mechanism.cohort_probability is None
    (event,) = set(mechanism.events.values())
    assert event == Event("matrix", 0.9, 1.0, 1)
    # The whole run is one release, charged with its first round.
    name = next(iter(mechanism.events))
    assert spent(mechanism, {name: [event]}, 1e-2)[name] == spent(mechanism, {name: [event] * 8}, 1e-2)[name]


def test_calibrated_correlated_noise_meets_the_target():
    mechanism = DpFedAvg(noise=BandedToeplitz(3, amplified=False)).make(
        TURNS._replace(unit="site"), IN_TURN, Budget(2.0, 1e-2)
    )
    epsilon = spent(mechanism, {EVERY_SITE: [mechanism.events[EVERY_SITE]] * 8}, 1e-2)[EVERY_SITE]
    assert epsilon == pytest.approx(2.0, abs=0.01)
    assert epsilon <= 2.0


def test_groups_of_units_need_their_site_in_every_round():
    with pytest.raises(UserError, match=r"misses rounds.*cohort=None.*amplified to False"):
        DpFedSgd(1.0, 1.0, noise=BANDS).make(TURNS, IN_TURN, GIVEN)
    mechanism = DpFedSgd(1.0, 1.0, noise=BANDS).make(RECORDS, EVERY_ROUND, GIVEN)
    assert mechanism.weight == pytest.approx(16 + 10)
    assert mechanism.events["a"] == Event("banded", 1.0, 0.25, 1, 4)


def test_whole_sites_are_in_no_groups():
    with pytest.raises(UserError, match="amplified to False"):
        DpFedAvg(1.0, 1.0, noise=BANDS).make(TURNS._replace(unit="site"), IN_TURN, GIVEN)


def test_correlated_noise_of_patients_at_several_sites_is_refused():
    shared = EVERY_ROUND._replace(shared=(("a", "b"),))
    for mechanism in (DpSgd(1.0, 1.0, noise=BANDS), DpFedSgd(1.0, 1.0, noise=BANDS)):
        with pytest.raises(UserError, match="a, b hold data of the same patient"):
            mechanism.make(RECORDS._replace(unit="patient"), shared, GIVEN)
