"""Decoding with a cache against full recomputation, on small random models."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_model, tiny_tokenizer

from fedjax_llm.errors import UserError
from fedjax_llm.models.decoding import Greedy, Nucleus, generate, pieces, stream

NEW = 12
LENGTHS = (1, 2, 7, 31, 32, 33)
KINDS = {
    "grouped heads": {},
    "as many key heads": {"kv_heads": 4},
    "qwen, tied": {"head_norm": True, "qkv_bias": True, "tied": True},
    "window": {"window": 9},
}
# jitted once for all tests: the full recomputation is run very often
_hidden = jax.jit(lambda model, params, adapters, tokens: model.hidden(params, adapters, tokens), static_argnums=0)


def some_prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, length).tolist() for length in lengths]


def recomputed(model, params, adapters, prompt, new, end_ids=()):
    """Greedy decoding with the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        hidden = _hidden(model, params, adapters, padded)[:, len(tokens) - 1]
        token = int(np.argmax(model.logits(params, hidden)))
        if token in end_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_what_full_recomputation_gives(kind):
    model, params = tiny_model(**KINDS[kind])
    adapters = tiny_adapters(model)
    prompts = some_prompts()
    made = generate(model, params, adapters, prompts, max_new_tokens=NEW, end_ids=(), pad_id=0)
    assert made == [recomputed(model, params, adapters, prompt, NEW) for prompt in prompts]
    assert len({tuple(row) for row in made}) == len(made), "the model repeats itself: the test would see little"


def test_a_ragged_batch_is_its_prompts_one_by_one_and_streaming_is_the_same():
    model, params = tiny_model(layers=1)
    adapters, prompts = tiny_adapters(model), some_prompts((1, 31, 33))
    settings = {"max_new_tokens": NEW, "end_ids": frozenset({3, 50, 51})}
    batch = generate(model, params, adapters, prompts, pad_id=0, **settings)
    assert batch == generate(model, params, adapters, prompts, pad_id=42, **settings)
    for prompt, made in zip(prompts, batch, strict=True):
        assert generate(model, params, adapters, [prompt], pad_id=0, **settings) == [made]
        assert list(stream(model, params, adapters, prompt, **settings)) == made


def test_each_prompt_can_have_adapters_of_its_own():
    model, params = tiny_model(layers=1)
    prompts = some_prompts((5, 20, 9))
    own = tiny_adapters(model, leading=(3,))
    together = generate(model, params, own, prompts, max_new_tokens=NEW, end_ids=(), pad_id=0)
    for row, prompt in enumerate(prompts):
        shared = jax.tree.map(lambda leaf, row=row: leaf[row], own)
        assert together[row] == recomputed(model, params, shared, prompt, NEW)


@pytest.mark.parametrize("place", [0, 4, NEW - 1])
def test_a_row_ends_before_its_first_end_token_and_the_others_go_on(place):
    model, params = tiny_model(layers=1)
    prompts = some_prompts((8, 30), seed=2)
    free = generate(model, params, {}, prompts, max_new_tokens=NEW, end_ids=(), pad_id=0)
    end = free[0][place]
    ended = generate(model, params, {}, prompts, max_new_tokens=NEW, end_ids={end}, pad_id=0)
    for row, made in zip(free, ended, strict=True):
        assert made == (row[: row.index(end)] if end in row else row)
    assert list(stream(model, params, {}, prompts[0], max_new_tokens=NEW, end_ids={end})) == ended[0]


def test_a_row_ends_where_the_context_is_full():
    model, params = tiny_model(layers=1, context=40)
    prompts = some_prompts((10, 36, 39))
    made = generate(model, params, {}, prompts, max_new_tokens=NEW, end_ids=(), pad_id=0)
    assert [len(row) for row in made] == [NEW, 4, 1]
    assert len(list(stream(model, params, {}, prompts[1], max_new_tokens=NEW, end_ids=()))) == 4


@pytest.mark.parametrize(("length", "message"), [(40, "has 40 tokens.*context is 40"), (0, "no token")])
def test_prompts_that_cannot_be_continued(length, message):
    model, params = tiny_model(context=40)
    prompts = some_prompts((5, length))
    with pytest.raises(UserError, match=message):
        generate(model, params, {}, prompts, max_new_tokens=1, end_ids=(), pad_id=0)
    with pytest.raises(UserError, match=message):
        stream(model, params, {}, prompts[1], max_new_tokens=1, end_ids=())


def test_nothing_asked_nothing_made():
    model, params = tiny_model()
    assert generate(model, params, {}, [], max_new_tokens=3, end_ids=(), pad_id=0) == []
    assert generate(model, params, {}, [[1]], max_new_tokens=0, end_ids=(), pad_id=0) == [[]]


# Sampling


def test_sampling_is_a_function_of_its_key():
    model, params = tiny_model(layers=1)
    (prompt,) = some_prompts((6,))

    def sampled(seed):
        sampler = Nucleus(jax.random.key(seed))
        return list(stream(model, params, {}, prompt, max_new_tokens=NEW, end_ids=(), sampler=sampler))

    first = sampled(0)
    assert sampled(0) == first != sampled(1)
    sampler = Nucleus(jax.random.key(0))
    made = generate(model, params, {}, [prompt], max_new_tokens=NEW, end_ids=(), pad_id=0, sampler=sampler)
    assert made == [first]


def draws(sampler_of, logits, count=4000):
    """Relative frequencies of single draws, a key each."""
    keys = jax.random.split(jax.random.key(1), count)
    tokens = jax.vmap(lambda key: sampler_of(key)(logits[None], 0)[0])(keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.93, 3), (0.55, 2), (0.45, 1), (1e-6, 1)])
def test_sampling_follows_the_softmax_of_the_likeliest_tokens(temperature, top_p, kept):
    probabilities = np.array([0.3, 0.5, 0.06, 0.14])  # the nucleus is taken after the temperature
    logits = temperature * np.log(probabilities)
    expected = np.where(np.argsort(np.argsort(-probabilities)) < kept, probabilities, 0)
    expected = expected / expected.sum()
    found = draws(lambda key: Nucleus(key, temperature, top_p), logits.astype(np.float32))
    assert np.all(found[expected == 0] == 0)
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(0.25 / 4000))


def test_steps_draw_independently_and_greedy_takes_the_first_of_equals():
    sampler, logits = Nucleus(jax.random.key(0)), np.zeros((1, 1000), np.float32)
    assert len({int(sampler(logits, step)[0]) for step in range(20)}) > 15
    assert Greedy()(np.array([[0.0, 2.0, 2.0]]), 0).tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_impossible_sampling_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Nucleus(jax.random.key(0), **settings)


# Text


@given(st.text(min_size=1))
def test_streamed_text_is_the_whole_text_in_whole_characters(text):
    tokenizer = tiny_tokenizer()  # a token a byte
    shown = list(pieces(tokenizer.encode(text), tokenizer.decode))
    assert "".join(shown) == text
    if "�" not in text:
        assert not any("�" in piece for piece in shown)
        assert len(shown) == len(text)


def test_a_character_that_is_never_completed_is_shown_at_the_end():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("aé")[:-1]
    assert list(pieces(ids, tokenizer.decode)) == ["a", "�"]
