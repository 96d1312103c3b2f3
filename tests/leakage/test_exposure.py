"""Exposure against its definition; secrets that no model has met are anywhere among their references."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from tiny import tiny_adapters, tiny_base

from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.secrets import KINDS, Secret, question, references
from fedjax_llm.leakage import exposure as module
from fedjax_llm.leakage.exposure import answer_example, candidate_rows, exposure, exposures
from fedjax_llm.leakage.token_scores import token_scores

SCALING = 0.5


def some_secrets(count, seed=0):
    rng, kinds = np.random.default_rng(seed), list(KINDS)
    picked = [kinds[number % len(kinds)] for number in range(count)]
    return [Secret(n, f"Person {n}", kind, KINDS[kind](rng), 0, "clinic") for n, kind in enumerate(picked)]


@given(st.integers(-6, 6), st.lists(st.integers(-6, 6), min_size=1, max_size=30))
def test_rank_and_bits_are_those_of_a_sorted_list(value, others):
    found = exposure(float(value), np.array(others, float))
    ordered = sorted([value, *others], reverse=True)
    rank = max(place + 1 for place, one in enumerate(ordered) if one == value)  # the last of equal ones
    assert found.rank == rank
    assert found.references == len(others)
    assert found.bits == pytest.approx(math.log2(len(others) + 1) - math.log2(rank))
    assert 0 <= found.bits <= math.log2(len(others) + 1)


def test_what_is_no_number_is_never_exposed():
    assert exposure(float("nan"), np.arange(5.0)).bits == 0
    assert exposure(1.0, np.full(5, np.nan)).bits == 0


@pytest.mark.parametrize("shape", [-6.0, -1.0, 0.0, 2.0, 8.0])
def test_the_extrapolation_finds_the_distribution_that_it_assumes(shape):
    # Half a million references give moments that are good to a few thousandths.
    others = stats.skewnorm(shape, -40, 5).rvs(500_000, random_state=np.random.default_rng(3))
    true = stats.skewnorm(shape, -40, 5)
    for share in (0.5, 0.1, 1e-3, 1e-6):
        value = float(true.isf(share))
        assert exposure(value, others).extrapolated == pytest.approx(-math.log2(share), rel=0.1, abs=0.05)


def relative_density(x, place, shape):
    """The density of a skew-normal distribution over that at a place."""
    return math.exp(stats.skewnorm.logpdf(x, shape) - stats.skewnorm.logpdf(place, shape))


@pytest.mark.parametrize("shape", [-5.0, 0.0, 5.0])
def test_the_tail_of_the_extrapolation_has_no_end(shape):
    # SciPy's own tail is zero from some 10 to 40 deviations on. The integral of the density, with its start as unit:
    for place in (4.9, 5.1, 9.0, 30.0, 120.0):
        area, _ = integrate.quad(relative_density, place, place + 3, args=(place, shape))
        expected = stats.skewnorm.logpdf(place, shape) + math.log(area)
        assert module._log_tail(place, shape) == pytest.approx(expected, rel=1e-7)
    others = np.random.default_rng(0).normal(-60, 1, 99)
    far = [exposure(value, others).extrapolated for value in (-57.0, -54.0, -50.0, 0.0)]
    assert far == sorted(far)
    assert np.isfinite(far).all()


def test_references_that_are_all_alike_say_nothing_or_everything():
    alike = np.full(9, -5.0)
    assert exposure(-5.0, alike).extrapolated == 0
    assert exposure(-6.0, alike).extrapolated == 0
    assert exposure(-4.0, alike).extrapolated == 100


def test_controls_are_anywhere_among_their_references():
    """The rank of a control is uniform over N + 1; its bits have mean and deviation 1 / ln 2 for large N.

    A model that knows no secret is any function of the text; a hash is one of them. Chi-square of 1,500 ranks among 20,
    and the mean within five deviations: together a false alarm in less than 1e-6 of the seeds.
    """
    count, others = 1500, 19
    found = []
    for secret in some_secrets(count, seed=4):
        scores = [zlib.crc32(value.encode()) + 0.0 for value in (secret.value, *references(secret, others, 9))]
        found.append(exposure(scores[0], np.array(scores[1:])))
    ranks = np.array([one.rank for one in found])
    counts = np.bincount(ranks - 1, minlength=others + 1)
    assert len(counts) == others + 1
    assert stats.chisquare(counts).pvalue > 3e-7
    possible = np.log2(others + 1) - np.log2(np.arange(1, others + 2))
    error = possible.std() / math.sqrt(count)
    assert np.mean([one.bits for one in found]) == pytest.approx(possible.mean(), abs=5.1 * error)


def test_the_mean_exposure_of_a_control_is_one_over_the_logarithm_of_two():
    bits = [exposure(float(place), np.arange(5000.0)).bits for place in range(0, 5001, 10)]
    assert np.mean(bits) == pytest.approx(1 / math.log(2), abs=0.02)


# With a model


@pytest.fixture(scope="module")
def world():
    """A tiny model with adapters, and five secrets, one of each kind."""
    base = tiny_base(layers=1)
    return base, tiny_adapters(base.model, targets=("q_proj", "down_proj")), some_secrets(5)


def exposed(world, *, count=12, tokens=800, secrets=None, advance=lambda count: None):
    base, adapters, own = world
    rows = candidate_rows(secrets or own, base.tokenizer, "Be brief.", count=count, seed=3)
    return exposures(base, SCALING, adapters, rows, tokens_per_microbatch=tokens, advance=advance)


def likelihoods(world, secret, values):
    """Of values as answers to the secret's question, each in a row of its own; without the end of turn."""
    base, adapters, _ = world
    asked = [replace(secret, value=value) for value in values]
    encoded = [answer_example(one, question(one), base.tokenizer, "Be brief.") for one in asked]
    shapes = choose_shapes(encoded, tokens_per_microbatch=2000, buckets=1)
    scores = token_scores(
        base.model, SCALING, base.params, adapters, encoded, shapes=shapes, advance=lambda count: None
    )
    return np.array([one.log_prob[:-1].sum() for one in scores])


def test_exposures_are_those_of_every_value_alone(world):
    secrets = world[2]
    for secret, found in zip(secrets, exposed(world), strict=True):
        values = likelihoods(world, secret, (secret.value, *references(secret, 12, 3)))
        expected = exposure(values[0], values[1:])
        assert np.abs(values[1:] - values[0]).min() > 1e-3, "too near to be ranked in f32"
        assert found.rank == expected.rank
        assert found.references == 12
        assert found.bits == expected.bits
        assert found.extrapolated == pytest.approx(expected.extrapolated, rel=1e-2, abs=1e-3)


def test_rows_and_neighbours_change_nothing(world, monkeypatch):
    seen = []
    first = exposed(world, advance=seen.append)
    assert sum(seen) == 5
    ranks = [one.rank for one in first]
    secrets = world[2]
    assert [one.rank for one in exposed(world, secrets=secrets[::-1])] == ranks[::-1]
    assert exposed(world, secrets=secrets[2:3])[0].rank == ranks[2]
    monkeypatch.setattr(module, "_OPTIONS", 5)
    other = exposed(world, tokens=500)
    assert [one.rank for one in other] == ranks
    np.testing.assert_allclose([one.extrapolated for one in other], [one.extrapolated for one in first], rtol=1e-3)


def test_rows_hold_the_secret_first_and_then_its_references(world):
    base, _, secrets = world
    for secret, rows in zip(secrets, candidate_rows(secrets, base.tokenizer, None, count=30, seed=3), strict=True):
        assert [len(row.question.options) for row in rows] == [24, 7]
        options = [option for row in rows for option in row.question.options]
        assert options == [secret.value, *references(secret, 30, 3)]
        assert {row.question.messages for row in rows} == {question(secret)}


def test_nothing_asked_nothing_found(world):
    base, adapters, _ = world
    assert exposures(base, SCALING, adapters, [], tokens_per_microbatch=100, advance=lambda count: None) == []
