"""Beam search against every sequence there is, against plain lists of beams, and against greedy decoding."""

import itertools
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_model

from fedjax_llm.errors import UserError
from fedjax_llm.models.beam import beam_search
from fedjax_llm.models.decoding import generate

VOCABULARY = 7
_logits = jax.jit(
    lambda model, params, adapters, tokens: model.logits(params, model.hidden(params, adapters, tokens)[0]),
    static_argnums=0,
)


@cache
def small():
    """A model of seven tokens, its weights, and adapters that change it."""
    model, params = tiny_model(vocab_size=VOCABULARY, layers=1)
    return model, params, tiny_adapters(model)


@cache
def log_probs(text):
    """Log-probabilities of the token after a text [V], from the whole sequence at once."""
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(text)] = text
    logits = np.asarray(_logits(*small(), padded)[len(text) - 1], np.float64)
    return logits - np.log(np.exp(logits).sum())


def taught(prompt, tokens):
    """The log-probability of a continuation, token by token."""
    return sum(log_probs((*prompt, *tokens[:place]))[token] for place, token in enumerate(tokens))


def searched(prompts, beams, new, ends, pad_id=0):
    return beam_search(*small(), prompts, beams=beams, max_new_tokens=new, end_ids=ends, pad_id=pad_id)


def plain_beams(prompt, beams, new, ends):
    """The algorithm with lists: extend all, sort, keep the best."""
    held = [((), 0.0)]
    for _ in range(new):
        options = []
        for tokens, score in held:
            if tokens and tokens[-1] in ends:
                options.append((tokens, score))
                continue
            chance = log_probs((*prompt, *tokens))
            options += [((*tokens, token), score + chance[token]) for token in range(VOCABULARY)]
        held = sorted(options, key=lambda one: -one[1])[:beams]
    return held


def agree(found, expected, ends):
    """Whether beams are the expected ones, which hold the token that ended them."""
    cut = [[token for token in tokens if token not in ends] for tokens, _ in expected]
    assert [tokens for tokens, _ in found] == cut
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=2e-5)


PROMPTS = [[3], [1, 2, 6, 0, 4], [5] * 3 + [2] * 30]
NEVER = (90, 91)  # no tokens of the model; as many as other ends, so that the same program is compiled


@pytest.mark.parametrize("ends", [NEVER, (4, 90), (0, 5)])
def test_two_tokens_are_searched_exhaustively(ends):
    # With as many beams as tokens none is lost at the first, so that the best of all pairs must be found.
    for prompt, found in zip(PROMPTS, searched(PROMPTS, VOCABULARY, 2, ends), strict=True):
        every = {(one,) if one in ends else (one, two) for one, two in itertools.product(range(VOCABULARY), repeat=2)}
        ranked = sorted(((tokens, taught(prompt, tokens)) for tokens in every), key=lambda one: -one[1])
        agree(found, ranked[:VOCABULARY], ends)


@given(ends=st.sampled_from([NEVER, (1, 90), (2, 6)]), seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_beams_are_those_of_plain_lists(ends, seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCABULARY, int(length)).tolist() for length in rng.integers(1, 30, 3)]
    for prompt, found in zip(prompts, searched(prompts, 3, 6, ends), strict=True):
        agree(found, plain_beams(prompt, 3, 6, ends), ends)


def test_scores_are_those_of_the_taught_text_with_the_token_that_ended_it():
    end, ended = 2, 0
    prompts = [[3], [1, 2, 6, 0, 4], [5] * 3]
    for prompt, found in zip(prompts, searched(prompts, 3, 6, (end, 90)), strict=True):
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
        assert len({tuple(tokens) for tokens, _ in found}) == 3
        for tokens, score in found:
            whole = [*tokens, end] if len(tokens) < 6 else tokens
            ended += len(tokens) < 6
            assert score == pytest.approx(taught(prompt, whole), abs=2e-5)
    assert ended, "no beam ended: the test would see little"


def test_one_beam_is_greedy_decoding():
    model, params, adapters = small()
    for ends in (NEVER, (4, 90)):
        made = generate(model, params, adapters, PROMPTS, max_new_tokens=8, end_ids=ends, pad_id=0)
        assert [[tokens for tokens, _ in own] for own in searched(PROMPTS, 1, 8, ends)] == [[row] for row in made]


def test_padding_changes_nothing():
    one, other = (searched(PROMPTS, VOCABULARY, 2, (4, 90), pad_id) for pad_id in (0, 6))
    assert one == other


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        ([[1]], {"beams": 0}, "beams is 0; it must be at least 1"),
        ([[1]], {"beams": VOCABULARY + 1}, "beams is 8; .* 7"),
        ([[1], []], {}, "no token"),
        ([[1], [2] * 509], {}, "no room for 4 tokens in the context of 512; shorten it"),
    ],
)
def test_impossible_searches_are_refused(prompts, fields, message):
    with pytest.raises(UserError, match=message):
        beam_search(*small(), prompts, **({"beams": 2, "max_new_tokens": 4, "end_ids": (), "pad_id": 0} | fields))


def test_nothing_asked_nothing_made():
    assert searched([], 3, 4, NEVER) == []
    assert searched([[1], [2]], 3, 0, NEVER) == [[], []]
