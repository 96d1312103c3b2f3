"""Poisson samples of units and of sites: as often as said, independent of one another, and secret keys' functions."""

import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy_private import private_plan
from toy_rounds import toy_example

from fedjax_llm.data.records import unit_name
from fedjax_llm.federation.local_work import past_rounds, work_of
from fedjax_llm.federation.sampling import (
    Cycle,
    attendance,
    generator,
    sample_clients,
    sample_units,
    secret_round_key,
    unit_group,
)
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.training.client_update import LocalTraining

KEY = noise.run_key("reproducible", 2)
FALSE_ALARM = 1e-6  # at most, of each statistical test
UNITS = tuple((toy_example(u, 6, 2),) for u in range(12))
PROBABILITY, STEPS, ROUNDS, SITES = 0.3, 2, 150, 3


def taken(steps, units) -> np.ndarray:
    """bool [S, U]: whether a unit is in a step's batch."""
    place = {unit[0].record_id: u for u, unit in enumerate(units)}
    found = np.zeros((len(steps), len(units)), bool)
    for s, batch in enumerate(steps):
        for examples in batch:
            assert not found[s, place[examples[0].record_id]]
            found[s, place[examples[0].record_id]] = True
    return found


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    """bool [rounds, sites, steps, units], as the rounds draw them."""
    return np.stack(
        [
            [
                taken(sample_units(jax.random.fold_in(key, site), UNITS, PROBABILITY, STEPS, 1), UNITS)
                for site in range(SITES)
            ]
            for key in (secret_round_key(KEY, number, 0, "units") for number in range(ROUNDS))
        ]
    )


def independent(one: np.ndarray, other: np.ndarray, tests: int) -> bool:
    """Whether two equally long rows of draws agree as often as independent ones, by an exact binomial test."""
    agree = PROBABILITY**2 + (1 - PROBABILITY) ** 2
    return stats.binomtest(int((one == other).sum()), one.size, agree).pvalue > FALSE_ALARM / tests


def test_every_unit_is_sampled_as_often_as_said(samples):
    for place in np.ndindex(SITES, STEPS, len(UNITS)):
        drawn = samples[(slice(None), *place)]
        wrong = stats.binomtest(int(drawn.sum()), ROUNDS, PROBABILITY).pvalue
        assert wrong > FALSE_ALARM / (SITES * STEPS * len(UNITS)), place
    assert stats.binomtest(int(samples.sum()), samples.size, PROBABILITY).pvalue > FALSE_ALARM


def test_batch_sizes_are_binomial_and_not_fixed(samples):
    """Chi-squared over the sizes, tails pooled."""
    sizes = np.clip(samples.sum(axis=-1).ravel(), 1, 7)
    law = stats.binom(len(UNITS), PROBABILITY)
    chances = [law.cdf(1), *law.pmf(range(2, 7)), law.sf(6)]
    counts = [int((sizes == size).sum()) for size in range(1, 8)]
    assert stats.chisquare(counts, np.array(chances) * sizes.size).pvalue > FALSE_ALARM


@pytest.mark.parametrize("axis", ["units", "steps", "sites", "rounds"])
def test_draws_are_independent(samples, axis):
    if axis == "rounds":
        pairs = [(samples[:-1], samples[1:])]
    else:
        number = {"sites": 1, "steps": 2, "units": 3}[axis]
        rows = np.moveaxis(samples, number, 0)
        pairs = list(itertools.combinations(rows, 2))
    for one, other in pairs:
        assert independent(one, other, len(pairs))


def test_the_check_of_independence_finds_one_draw_for_two_sites(samples):
    assert not independent(samples[:, 0], samples[:, 0], 1)


def test_another_attempt_samples_anew_and_shares_no_bits_with_the_noise():
    purposes = ("cohort", "units", "site noise", "sum noise", "count noise", "dropout")
    moments = [(number, attempt, purpose) for number in range(4) for attempt in range(3) for purpose in purposes]
    keys = {tuple(np.asarray(jax.random.key_data(secret_round_key(KEY, *moment))).tolist()) for moment in moments}
    assert len(keys) == len(moments)
    for purpose, draw in (
        ("units", lambda key: taken(sample_units(key, UNITS, 0.5, 4, 1), UNITS)),
        ("cohort", lambda key: sample_clients(key, 60, 0.5)),
    ):
        first, again, other = (draw(secret_round_key(KEY, 1, attempt, purpose)) for attempt in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_cohorts_are_independent_coins():
    drawn = np.zeros((600, 8), bool)
    for number in range(600):
        cohort = sample_clients(secret_round_key(KEY, number, 0, "cohort"), 8, PROBABILITY)
        assert list(cohort) == sorted(set(cohort))
        drawn[number, cohort] = True
    for column in drawn.T:
        assert stats.binomtest(int(column.sum()), 600, PROBABILITY).pvalue > FALSE_ALARM / 8
    for one, other in itertools.combinations(drawn.T, 2):
        assert independent(one, other, 28)
    assert (drawn.sum(axis=1) == 0).any()  # 0.7^8 = 6 %: that none of 600 is empty has a chance of 4e-16


@pytest.mark.parametrize("probability", [1e-12, 1.0])
def test_samples_may_be_empty_and_may_be_everybody(probability):
    everyone = int(probability)
    assert len(sample_clients(KEY, 9, probability)) == 9 * everyone
    steps = sample_units(KEY, UNITS, probability, 3, 1)
    assert [len(batch) for batch in steps] == [len(UNITS) * everyone] * 3


def test_units_are_whole_up_to_the_cap_and_chosen_anew_beyond_it():
    """Each of the 10 pairs of a unit's 5 examples comes as often (chi-squared)."""
    pair, five = tuple(toy_example(u, 6, 2) for u in (50, 51)), tuple(toy_example(u, 6, 2) for u in range(60, 65))
    steps = sample_units(KEY, (pair, five), 1.0, 600, 2)
    assert all(batch[0] == pair for batch in steps)
    chosen = Counter(tuple(sorted(example.record_id for example in batch[1])) for batch in steps)
    assert all(len(set(names)) == 2 for names in chosen)
    assert len(chosen) == 10
    assert stats.chisquare(list(chosen.values())).pvalue > FALSE_ALARM


@settings(max_examples=30)
@given(groups=st.integers(2, 5), rounds=st.integers(1, 5), steps=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_with_cycles_a_unit_takes_part_at_most_once_in_as_many_steps_as_there_are_groups(groups, rounds, steps, seed):
    member = np.array([unit_group(("record", unit[0].record_id), groups, seed) for unit in UNITS])
    every = []
    for number in range(rounds):
        key, cycle = secret_round_key(KEY, number, seed, "units"), Cycle(number * steps, groups, member)
        every.append(taken(sample_units(key, UNITS, 1.0, steps, 1, cycle), UNITS))
    over_run = np.concatenate(every)
    for u, column in enumerate(over_run.T):
        numbers = np.flatnonzero(column)
        assert (np.diff(numbers) >= groups).all()
        # With probability 1 it misses no turn of its group either.
        assert numbers.tolist() == [i for i in range(rounds * steps) if i % groups == member[u]]


def test_a_units_group_is_a_matter_of_its_own_name_and_groups_are_of_a_size():
    names = [("record", f"record-{i}") for i in range(2000)]
    found = np.array([unit_group(name, 4, 7) for name in names])
    assert stats.chisquare(np.bincount(found, minlength=4)).pvalue > FALSE_ALARM
    assert [unit_group(name, 4, 7) for name in names[5:9]] == found[5:9].tolist()
    assert unit_group(("owner", "record-1"), 10**9, 7) != unit_group(("record", "record-1"), 10**9, 7)
    other = np.array([unit_group(name, 4, 8) for name in names])
    assert 0.15 < (found == other).mean() < 0.35  # another site deals anew: 1/4, and 0.1 is 10 standard deviations


def test_the_rounds_take_turns_over_all_steps_of_a_site_whenever_it_takes_part():
    """A site that misses rounds goes on where it stopped, so its units keep their distance in its own steps."""
    config = DpSgd(2.0, 1.0, sampling_probability=0.5, noise=BandedToeplitz(2))
    local = LocalTraining(batch_size=2, local_steps=3)
    plan = private_plan(config, "record", local, cohort=3)
    groups, rounds = plan.mechanism.correlated.cyclic, 6
    assert groups == 2
    certain = plan._replace(mechanism=plan.mechanism._replace(sampling=np.ones(len(plan.clients))))
    present = attendance(plan.key, rounds, len(plan.clients), plan.cohort)
    assert not present.all(axis=0).all()
    for c, client in enumerate(plan.clients):
        numbers = [number for number in range(1, rounds + 1) if present[number - 1, c]]
        parts = [np.zeros((0, len(client.units)), bool)]
        parts += [
            taken(work_of(certain, c, number, 0, past_rounds(certain, number)), client.units) for number in numbers
        ]
        over_run = np.concatenate(parts)
        for unit, column in zip(client.units, over_run.T, strict=True):
            name = unit_name(unit[0].record_id, unit[0].owner, "record")
            group = unit_group(name, groups, client.id)
            assert np.flatnonzero(column).tolist() == list(range(group, len(column), groups))


def test_a_generator_takes_all_the_bits_of_a_key():
    words = np.arange(4, dtype=np.uint32)
    keys = [jax.random.wrap_key_data(np.array(pair, np.uint32)) for pair in itertools.product(words, words)]
    assert len({generator(key).integers(2**62) for key in keys}) == 16
