"""Token scores against all logits in NumPy; shapes, chunks and a trunk never change them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_model
from toy_rounds import toy_example

from fedjax_llm import lora
from fedjax_llm.data.packing import Shape, choose_shapes, target_count
from fedjax_llm.leakage import token_scores as module
from fedjax_llm.leakage.token_scores import TokenScores, slot_scores, token_scores
from fedjax_llm.models.causal_lm import lowest_adapted
from fedjax_llm.training.trunk import TrunkCache

SCALING = 0.5
EXAMPLES = [toy_example(i, length, i % 5) for i, length in enumerate((2, 5, 9, 30, 12, 12, 25, 3, 17, 31, 8))][1:]
_logits = jax.jit(
    lambda model, params, adapters, tokens: model.logits(
        params, model.hidden(params, lora.scaled(adapters, SCALING), tokens)[0]
    ),
    static_argnums=0,
)


def quiet(count):
    """Takes progress and shows nothing."""


def moments(logits, tokens):
    """The four columns in f64 from logits [T, V]."""
    logits = np.asarray(logits, np.float64)
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    chance = np.exp(logs)
    mean = (chance * logs).sum(-1)
    std = np.sqrt((chance * (logs - mean[:, None]) ** 2).sum(-1))
    return TokenScores(logs[np.arange(len(tokens)), tokens], mean, std, logs.max(-1))


def oracle(model, params, adapters, example):
    """One example alone, all logits at once."""
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(example.tokens)] = example.tokens
    first = len(example.tokens) - target_count(example)
    places = np.arange(first, len(example.tokens))
    return moments(_logits(model, params, adapters, padded)[places - 1], example.tokens[places])


def scored(model, params, adapters, examples, tokens=128, buckets=2, shapes=None, **fields):
    shapes = shapes or choose_shapes(EXAMPLES, tokens_per_microbatch=tokens, buckets=buckets)
    return token_scores(model, SCALING, params, adapters, examples, shapes=shapes, **{"advance": quiet} | fields)


def agree(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for column, values in zip(one, other, strict=True):
            assert column.dtype == np.float64
            np.testing.assert_allclose(column, values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "adapted"), [({}, True), ({"layers": 1, "window": 5, "tied": True}, False)])
def test_scores_are_those_of_the_full_logits(kind, adapted):
    model, params = tiny_model(**kind)
    adapters = tiny_adapters(model) if adapted else {}
    agree(
        scored(model, params, adapters, EXAMPLES),
        [oracle(model, params, adapters, example) for example in EXAMPLES],
        3e-5,
    )


def test_neither_packing_nor_chunks_nor_order_change_a_score(monkeypatch):
    model, params = tiny_model(layers=1)
    adapters = tiny_adapters(model, targets=("q_proj",))
    first = scored(model, params, adapters, EXAMPLES)
    agree(scored(model, params, adapters, EXAMPLES, 300, 1), first)
    agree(scored(model, params, adapters, EXAMPLES[::-1])[::-1], first)
    agree(scored(model, params, adapters, EXAMPLES[3:5]), first[3:5])
    monkeypatch.setattr(module, "_CHUNK", 7)
    slot_scores.clear_cache()
    agree(scored(model, params, adapters, EXAMPLES, shapes=(Shape(3, 40, 64),)), first)
    slot_scores.clear_cache()


def test_a_trunk_changes_no_score():
    model, params = tiny_model(layers=2)
    every = tiny_adapters(model, targets=("q_proj", "down_proj"))
    adapters = {path: factors for path, factors in every.items() if path.startswith("layers.1.")}
    shapes = choose_shapes(EXAMPLES, tokens_per_microbatch=128, buckets=1)
    trunk = TrunkCache(model, params, lowest_adapted(adapters), shapes, 10**6)
    found = scored(model, params, adapters, EXAMPLES, shapes=shapes, trunk=trunk)
    agree(found, [oracle(model, params, adapters, example) for example in EXAMPLES], 3e-5)
    assert trunk.used


def test_progress_counts_every_example_once():
    model, params = tiny_model(layers=1)
    seen = []
    found = scored(model, params, {}, EXAMPLES, advance=seen.append)
    assert sum(seen) == len(EXAMPLES)
    assert len(seen) > 1
    assert [len(one.log_prob) for one in found] == [target_count(example) for example in EXAMPLES]
    assert scored(model, params, {}, []) == []


class Table(NamedTuple):
    """A model whose logits stand in a table: a token's number is its row."""

    def hidden(self, params, adapters, tokens, below=None):
        return jnp.asarray(tokens)[..., None]

    def logits(self, params, hidden):
        return params[hidden[..., 0]]


@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.1, 3.0, 50.0, 1e4]), shift=st.floats(-1e4, 1e4))
@settings(max_examples=60)
def test_scores_of_any_logits(seed, spread, shift):
    rng = np.random.default_rng(seed)
    table = (rng.normal(size=(6, 11)) * spread + shift).astype(np.float32)
    targets = rng.integers(0, 11, 6)
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    columns = slot_scores(Table(), 1.0, jnp.asarray(table), {}, tokens, np.arange(6) // 3, np.arange(6) % 3, targets)
    found, expected = TokenScores(*np.asarray(columns, np.float64)), moments(table, targets)
    assert np.isfinite(columns).all()
    for name in ("log_prob", "mean", "best"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-3, atol=1e-3 * (1 + np.abs(expected.mean).max()))
    # The likeliest token has exactly the best log-probability, and no other token reaches it.
    likeliest = table[np.arange(6), targets] == table.max(-1)
    assert np.array_equal(found.log_prob == found.best, likeliest)
