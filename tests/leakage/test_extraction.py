"""Measures of extraction against plain loops, exact arithmetic, and what decoding really gives."""

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_model

from fedjax_llm import lora
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.leakage.extraction import (
    common_prefix,
    discoverable,
    edit_similarity,
    greedy_prefix,
    longest_match,
    sampled_log_probs,
    tries,
)
from fedjax_llm.leakage.token_scores import TokenScores, token_scores
from fedjax_llm.models.decoding import generate

few = st.lists(st.integers(0, 3), max_size=12)
SCALING = 0.5


def levenshtein(one, other):
    """By its recursion."""

    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, same)

    return distance(len(one), len(other))


@given(few, few)
def test_similarity_is_levenshteins(made, true):
    longer = max(len(made), len(true))
    expected = 1 - levenshtein(made, true) / longer if longer else 1.0
    assert edit_similarity(made, true) == pytest.approx(expected, abs=1e-12)
    assert edit_similarity(true, made) == edit_similarity(made, true)


def test_similarity_by_hand():
    kitten, sitting = (list(map(ord, word)) for word in ("kitten", "sitting"))
    assert edit_similarity(kitten, sitting) == pytest.approx(1 - 3 / 7)
    assert edit_similarity([1, 2], [1, 2]) == 1
    assert edit_similarity([], [5, 6]) == 0


@given(few, few)
def test_the_longest_match_is_the_longest_common_run(made, true):
    runs = {tuple(made[i:j]) for i in range(len(made)) for j in range(i + 1, len(made) + 1)}
    other = {tuple(true[i:j]) for i in range(len(true)) for j in range(i + 1, len(true) + 1)}
    assert longest_match(made, true) == max(map(len, runs & other), default=0)


@given(few, few)
def test_the_common_prefix_is_the_most_that_both_begin_with(made, true):
    most = max(n for n in range(min(len(made), len(true)) + 1) if made[:n] == true[:n])
    assert common_prefix(made, true) == most
    assert common_prefix(made, made + true) == len(made)


def reached(chance, n):
    """Whether n samples contain it with a probability, exactly."""
    return lambda level: 1 - (1 - chance) ** n >= level


@given(st.integers(1, 400), st.integers(2, 400), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_tries_are_the_least_that_reach_the_level(numerator, more, level):
    chance = Fraction(numerator, numerator + more)
    n = tries(math.log(chance), level)
    assert n == int(n)
    assert n >= 1
    exact, wanted, slack = Fraction(chance), Fraction(level), Fraction(1, 10**9)
    assert reached(exact, int(n))(wanted - slack)
    assert n == 1 or not reached(exact, int(n) - 1)(wanted + slack)


def test_a_level_that_is_just_reached_needs_no_further_try():
    for tenths in range(1, 10):
        for n in range(1, 30):
            level = 1 - (1 - tenths / 10) ** n
            if level < 1 - 1e-4:  # above, a float of the level has too few digits
                assert tries(math.log(tenths / 10), level) == n


@given(st.floats(-600, -1e-3), st.sampled_from([0.1, 0.5, 0.9]))
def test_tries_of_any_probability(log_probability, level):
    # From n log(1 - p) = log(1 - level), where log(1 - p) is a series for what floats cannot hold.
    p = math.exp(log_probability)
    rate = -math.log1p(-p) if p > 1e-300 else p
    assert tries(log_probability, level) == pytest.approx(max(1, -math.log1p(-level) / rate), rel=1e-9, abs=1)


def test_tries_at_the_ends():
    assert tries(0.0, 0.9) == 1
    assert tries(math.log(0.5), 0.5) == 1
    assert tries(math.log(0.5), 0.75) == 2
    assert tries(math.log(0.1), 0.1) == 1
    assert tries(-math.inf, 0.1) == math.inf
    assert tries(-1e6, 0.5) == math.inf
    assert tries(-700.0, 0.5) == pytest.approx(math.log(2) * math.exp(700.0))
    around = [tries(math.log(1e-12) + step, 0.5) for step in (1e-6, 0.0, -1e-6)]  # where the formula changes
    assert around == sorted(around)
    assert around[2] == pytest.approx(around[0], rel=1e-5)


def test_a_continuation_is_discoverable_by_the_product_of_its_tokens():
    found = discoverable(np.log([0.5, 0.2]), levels=(0.1, 0.5))
    assert found.log_probability == pytest.approx(math.log(0.1))
    assert found.tries == {0.1: 1, 0.5: 7}  # 1 - 0.9^6 = 0.47, 1 - 0.9^7 = 0.52
    never = discoverable(np.array([-0.1, -np.inf]))
    assert set(never.tries) == {0.1, 0.5, 0.9}
    assert set(never.tries.values()) == {math.inf}


def test_the_greedy_prefix_ends_at_the_first_wrong_token():
    best = np.array([-0.1, -0.2, -0.3, -0.4])
    for wrong, expected in (((), 4), ((0,), 0), ((2,), 2), ((1, 3), 1)):
        log_prob = best.copy()
        log_prob[list(wrong)] -= 0.5
        assert greedy_prefix(TokenScores(log_prob, best, best, best)) == expected


def test_the_greedy_prefix_is_what_decoding_gives():
    model, params = tiny_model(layers=1)
    adapters, rng = tiny_adapters(model), np.random.default_rng(0)
    prompts = [rng.integers(0, 97, length).tolist() for length in (1, 3, 8, 15, 20)]
    scaled = lora.scaled(adapters, SCALING)
    made = generate(model, params, scaled, prompts, max_new_tokens=10, end_ids=(), pad_id=0)
    examples = []
    for wrong, prompt, row in zip((0, 3, 7, 9, None), prompts, made, strict=True):
        answer = list(row)
        if wrong is not None:
            answer[wrong] = (answer[wrong] + 1) % 97
        examples.append(EncodedExample("r", np.array([*prompt, *answer], np.int32), len(prompt)))
    shapes = choose_shapes(examples, tokens_per_microbatch=80, buckets=2)
    scores = token_scores(model, SCALING, params, adapters, examples, shapes=shapes, advance=lambda count: None)
    found = [greedy_prefix(one) for one in scores]
    assert found == [0, 3, 7, 9, 10]
    answers = [example.tokens[example.prompt_length :].tolist() for example in examples]
    assert found == [common_prefix(row, answer) for row, answer in zip(made, answers, strict=True)]


@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.none() | st.integers(1, 12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    scale=st.sampled_from([1.0, 300.0]),
)
def test_sampled_log_probs_are_those_of_a_plain_softmax(seed, top_k, temperature, scale):
    rng = np.random.default_rng(seed)
    logits, tokens = rng.normal(size=(5, 9)) * scale, rng.integers(0, 9, 5)
    found = sampled_log_probs(logits, tokens, top_k, temperature)
    assert found.dtype == np.float64
    for row, token, value in zip(logits, tokens, found, strict=True):
        kept = sorted(range(9), key=lambda other: -row[other])[:top_k]
        if token not in kept:
            assert value == -np.inf
            continue
        top = max(row)
        weights = {other: math.exp((row[other] - top) / temperature) for other in kept}
        expected = (row[token] - top) / temperature - math.log(sum(weights.values()))
        assert value == pytest.approx(expected, abs=1e-9)


def test_samplers_are_distributions():
    logits = np.random.default_rng(1).normal(size=9)
    for top_k in (1, 4, 9, 40, None):
        every = sampled_log_probs(np.tile(logits, (9, 1)), np.arange(9), top_k, 0.7)
        assert np.exp(every).sum() == pytest.approx(1)
        assert np.isfinite(every).sum() == min(top_k or 9, 9)
