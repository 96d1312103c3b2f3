"""Streaming in chunks gives the tokens of plain streaming, and compiles for no prompt of its own."""

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_adapters, tiny_model

from fedjax_llm.errors import UserError
from fedjax_llm.models import streaming
from fedjax_llm.models.decoding import Greedy, Nucleus, stream
from fedjax_llm.models.streaming import Tempered, stream_in_chunks

ROOM = {"longest_prompt": 100, "most_new_tokens": 20}


def tempered(temperature, seed=0):
    return Tempered(jax.random.key(seed), jnp.float32(temperature))


def prompt(length):
    return [(7 * place + length) % 97 for place in range(length)]


def chunked(adapters, tokens, sampler, *, new=12, ends=(), **changed):
    model, params = tiny_model(**changed)
    made = stream_in_chunks(model, params, adapters, tokens, max_new_tokens=new, end_ids=ends, sampler=sampler, **ROOM)
    return list(made)


def plain(adapters, tokens, sampler, *, new=12, ends=()):
    model, params = tiny_model()
    return list(stream(model, params, adapters, tokens, max_new_tokens=new, end_ids=ends, sampler=sampler))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70, 100])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "tuned"])
def test_the_tokens_are_those_of_plain_streaming(length, adapted):
    adapters = tiny_adapters(tiny_model()[0]) if adapted else {}
    expected = plain(adapters, prompt(length), Greedy())
    assert chunked(adapters, prompt(length), tempered(0.0)) == expected
    assert len(expected) == 12


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_a_temperature_samples_as_nucleus_does_with_all_tokens(temperature):
    expected = plain({}, prompt(40), Nucleus(jax.random.key(3), temperature))
    assert chunked({}, prompt(40), tempered(temperature, 3)) == expected
    assert expected != plain({}, prompt(40), Greedy())


def test_it_ends_before_a_token_that_ends_and_at_the_limits():
    whole = chunked({}, prompt(40), tempered(0.0))
    end = whole[5]
    assert chunked({}, prompt(40), tempered(0.0), ends={end}) == whole[: whole.index(end)]
    assert chunked({}, prompt(40), tempered(0.0), new=0) == []
    assert len(chunked({}, prompt(40), tempered(0.0), new=500)) == ROOM["most_new_tokens"]
    assert len(chunked({}, prompt(40), tempered(0.0), context=43)) == 3


def test_prompts_that_do_not_fit_are_refused_at_the_call():
    model, params = tiny_model(context=64)
    settings = {"max_new_tokens": 4, "end_ids": (), "sampler": tempered(0.0)}
    with pytest.raises(ValueError, match="101 tokens are more than 100"):
        stream_in_chunks(model, params, {}, prompt(101), **ROOM, **settings)
    with pytest.raises(UserError, match="the model's context is 64"):
        stream_in_chunks(model, params, {}, prompt(64), **ROOM, **settings)
    with pytest.raises(UserError, match="no token"):
        stream_in_chunks(model, params, {}, [], **ROOM, **settings)


def test_two_programs_serve_all_prompts_limits_and_temperatures():
    chunked({}, prompt(5), tempered(0.0), new=2)
    compiled = streaming._step._cache_size()
    for length, temperature, new in ((1, 0.5, 3), (33, 0.0, 12), (100, 1.5, 20)):
        chunked({}, prompt(length), tempered(temperature, length), new=new)
    assert streaming._step._cache_size() == compiled
