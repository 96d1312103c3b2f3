"""Cohorts and orders of examples: uniform, without repeats, and functions of the key alone."""

import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_rounds import toy_example

from fedjax_llm.federation.sampling import client_id, generator, round_key, sample_cohort, sample_steps

KEY = jax.random.key(11)
SITES, SIZE, ROUNDS = 8, 3, 1500
EXAMPLES = tuple(toy_example(i, 6, 2) for i in range(12))


@pytest.fixture(scope="module")
def cohorts() -> list[tuple[int, ...]]:
    return [tuple(map(int, sample_cohort(round_key(KEY, n, "cohort"), SITES, SIZE))) for n in range(1, ROUNDS + 1)]


def test_cohorts_have_no_repeats_and_are_in_order(cohorts):
    for cohort in cohorts:
        assert len(cohort) == SIZE
        assert list(cohort) == sorted(set(cohort))
        assert set(cohort) <= set(range(SITES))


@pytest.mark.parametrize("together", [1, 2])
def test_every_site_and_every_pair_is_in_as_many_cohorts(cohorts, together):
    # Hoeffding and a union bound over the groups: a fair sampler fails with probability 1e-6 at most.
    groups = list(itertools.combinations(range(SITES), together))
    share = 1.0
    for i in range(together):
        share *= (SIZE - i) / (SITES - i)
    allowed = np.sqrt(np.log(2 * len(groups) / 1e-6) / (2 * ROUNDS))
    counts = Counter(group for cohort in cohorts for group in itertools.combinations(cohort, together))
    assert allowed < share  # else the bound would allow a group that never comes
    for group in groups:
        assert abs(counts[group] / ROUNDS - share) < allowed, group


@pytest.mark.parametrize("size", [None, SITES, SITES + 1])
def test_all_take_part_where_the_cohort_is_as_large(size):
    assert sample_cohort(KEY, SITES, size).tolist() == list(range(SITES))


def test_the_key_decides():
    again = [sample_cohort(round_key(jax.random.key(11), n, "cohort"), SITES, SIZE).tolist() for n in (1, 2, 3)]
    assert again == [sample_cohort(round_key(KEY, n, "cohort"), SITES, SIZE).tolist() for n in (1, 2, 3)]
    orders = [sample_steps(jax.random.fold_in(KEY, n), EXAMPLES, 12, 1, None)[0] for n in (0, 0, 1)]
    ids = [[example.record_id for example in order] for order in orders]
    assert ids[0] == ids[1] != ids[2]


def test_keys_differ_by_round_and_purpose():
    purposes = ("cohort", "order", "dropout")
    keys = {tuple(jax.random.key_data(round_key(KEY, n, p)).tolist()) for n in range(4) for p in purposes}
    assert len(keys) == 12
    draws = {generator(round_key(KEY, n, p)).integers(2**62) for n in range(4) for p in purposes}
    assert len(draws) == 12


@settings(max_examples=40)
@given(count=st.integers(1, 12), batch=st.integers(1, 7), steps=st.integers(1, 8), seed=st.integers(0, 2**31 - 1))
def test_steps_take_every_example_once_before_any_twice(count, batch, steps, seed):
    dealt = sample_steps(jax.random.fold_in(KEY, seed), EXAMPLES[:count], batch, steps, None)
    assert [len(step) for step in dealt] == [batch] * steps
    ids = [example.record_id for step in dealt for example in step]
    for first in range(0, len(ids), count):
        one_pass = ids[first : first + count]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= {example.record_id for example in EXAMPLES[:count]}


@settings(max_examples=40)
@given(count=st.integers(1, 12), batch=st.integers(1, 7), epochs=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_epochs_cover_everything_that_many_times(count, batch, epochs, seed):
    dealt = sample_steps(jax.random.fold_in(KEY, seed), EXAMPLES[:count], batch, None, epochs)
    per_pass = -(-count // batch)
    assert len(dealt) == epochs * per_pass
    everything = sorted(example.record_id for example in EXAMPLES[:count])
    for first in range(0, len(dealt), per_pass):
        one_pass = dealt[first : first + per_pass]
        assert sorted(example.record_id for step in one_pass for example in step) == everything
        assert [len(step) for step in one_pass[:-1]] == [batch] * (per_pass - 1)
        assert 1 <= len(one_pass[-1]) <= batch


def test_passes_are_shuffled_anew():
    first, second = sample_steps(KEY, EXAMPLES, 12, None, 2)
    assert [example.record_id for example in first] != [example.record_id for example in second]


def test_client_ids_stay_with_the_name():
    assert client_id("nervous") == 190127080  # in every process and on every machine
    names = [f"site-{i}" for i in range(500)]
    ids = {client_id(name) for name in names}
    assert len(ids) == len(names)
    assert all(0 <= one < 2**31 for one in ids)
