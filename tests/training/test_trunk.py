"""The cache of trunk states: always the states, computed no more often than memory asks for."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same, tiny_adapters, tiny_model
from toy_rounds import toy_example

from fedjax_llm.data.packing import Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.data.shared_rows import SharedRow
from fedjax_llm.models.causal_lm import CausalLM, lowest_adapted
from fedjax_llm.training.trunk import TrunkCache

LAYERS = 2
MODEL, PARAMS = tiny_model(layers=3)
TOKEN = 32 * 4  # bytes of a token's states
SHAPES = (Shape(3, 8, 0), Shape(2, 16, 0))
EXAMPLES = [toy_example(i, length, 3) for i, length in enumerate([5, 8, 12, 1, 12, 8, 12, 5])]
PLENTY = 10**6
anyone = st.lists(st.sampled_from(range(len(EXAMPLES))), max_size=6)


def cache_of(capacity=PLENTY, shapes=SHAPES):
    return TrunkCache(MODEL, PARAMS, LAYERS, shapes, capacity)


def of(*numbers):
    return [EXAMPLES[number] for number in numbers]


def tokens_in(examples):
    return sum(len(example.tokens) for example in examples)


@pytest.fixture
def computed(monkeypatch):
    """The microbatches [M, L] that are computed from here on."""
    seen, trunk = [], CausalLM.trunk

    def counted(self, params, tokens, *rest):
        if not isinstance(tokens, jax.core.Tracer):
            seen.append(tokens.shape)
        return trunk(self, params, tokens, *rest)

    monkeypatch.setattr(CausalLM, "trunk", counted)
    return seen


def rows_of(cache, examples, shape):
    """The states of examples that have rows of their own."""
    return cache.rows([SharedRow((example,)) for example in examples], shape)


def fill(cache, examples):
    """Fills, and gives what progress was told."""
    told = []
    cache.fill(examples, advance=told.append)
    return told


def test_rows_hold_the_states_of_each_example_alone_and_zeros():
    block = rows_of(cache_of(), EXAMPLES, (10, 20))
    assert block.shape == (10, 20, 32)
    assert block.dtype == np.float32
    for row, example in zip(block, EXAMPLES, strict=False):
        alone = MODEL.trunk(PARAMS, example.tokens[None], LAYERS)[0]
        np.testing.assert_allclose(row[: len(alone)], alone, rtol=0, atol=1e-5)
        assert not row[len(alone) :].any()
    assert not block[len(EXAMPLES) :].any()


@pytest.mark.parametrize("shape", [(1, 16), (2, 4)])
def test_a_microbatch_that_is_too_small_is_refused(shape):
    with pytest.raises((IndexError, ValueError)):
        rows_of(cache_of(), of(0, 1), shape)


@settings(max_examples=25)
@given(
    capacity=st.integers(0, 70).map(lambda tokens: tokens * TOKEN),
    history=st.lists(st.tuples(st.booleans(), anyone), max_size=5),
    asked=anyone,
)
def test_neither_what_was_asked_before_nor_memory_changes_a_bit(capacity, history, asked):
    cache = cache_of(capacity)
    for ahead, numbers in history:
        fill(cache, of(*numbers)) if ahead else rows_of(cache, of(*numbers), (6, 16))
        assert cache.used <= capacity
    block = rows_of(cache, of(*asked), (6, 16))
    for row, number in zip(block, asked, strict=False):
        assert same(row, rows_of(cache_of(), of(number), (1, 16))[0])
    assert cache.used <= capacity


def test_other_shapes_change_rounding_only():
    wide = rows_of(cache_of(shapes=(Shape(8, 24, 0),)), EXAMPLES, (8, 16))
    np.testing.assert_allclose(wide, rows_of(cache_of(), EXAMPLES, (8, 16)), rtol=0, atol=1e-5)


def test_states_are_in_the_models_type():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    cache = TrunkCache(MODEL, params, LAYERS, SHAPES, PLENTY)
    block = rows_of(cache, EXAMPLES, (8, 16))
    assert block.dtype == jnp.bfloat16
    assert cache.used == tokens_in(EXAMPLES) * 32 * 2


def test_what_is_filled_is_not_computed_again(computed):
    cache = cache_of()
    fill(cache, EXAMPLES)
    # Five short ones in threes, three long ones in twos, each in the shortest shape that holds it.
    assert Counter(computed) == {(3, 8): 2, (2, 16): 2}
    assert cache.used == tokens_in(EXAMPLES) * TOKEN
    rows_of(cache, of(4, 4, 0), (4, 16))
    fill(cache, EXAMPLES[::-1])
    assert len(computed) == 4


def test_equal_tokens_are_computed_and_kept_once(computed):
    copies = [EncodedExample(f"copy-{i}", EXAMPLES[0].tokens.astype(np.int64), 1) for i in range(7)]
    cache = cache_of()
    fill(cache, [*copies, EXAMPLES[0]])
    assert computed == [(3, 8)]
    assert cache.used == 5 * TOKEN
    block = rows_of(cache, copies, (7, 8))
    assert all(same(row, block[0]) for row in block)


def test_what_was_not_used_longest_is_dropped_first(computed):
    cache = cache_of(capacity=tokens_in(of(0, 1, 2)) * TOKEN)
    fill(cache, of(0, 1, 2))
    rows_of(cache, of(0), (1, 8))
    rows_of(cache, of(3), (1, 8))  # one token: the eight of example 1 have to go
    computed.clear()
    rows_of(cache, of(0, 2, 3), (3, 16))
    assert not computed
    rows_of(cache, of(1), (1, 8))
    assert computed == [(3, 8)]


def test_filling_beyond_the_capacity_keeps_the_first_that_fit(computed):
    cache = cache_of(capacity=tokens_in(of(0, 1, 2)) * TOKEN)
    rows_of(cache, of(7), (1, 8))  # makes room
    told = fill(cache, EXAMPLES)
    assert sum(told) == len(EXAMPLES)
    assert cache.used == cache.capacity
    computed.clear()
    rows_of(cache, of(0, 1, 2), (3, 16))
    assert not computed


def test_without_memory_everything_is_computed_when_asked_for(computed):
    cache = cache_of(capacity=0)
    assert sum(fill(cache, EXAMPLES)) == len(EXAMPLES)
    assert not computed
    for _ in range(2):
        assert rows_of(cache, of(0, 2), (2, 16)).any()
    assert Counter(computed) == {(3, 8): 2, (2, 16): 2}
    assert cache.used == 0


@given(known=anyone, numbers=anyone, capacity=st.sampled_from([0, 20 * TOKEN, PLENTY]))
@settings(max_examples=15)
def test_progress_counts_every_example_once(known, numbers, capacity):
    cache = cache_of(capacity)
    fill(cache, of(*known))
    told = fill(cache, of(*numbers))
    assert sum(told) == len(numbers)
    assert min(told) >= 0


def test_progress_comes_with_each_microbatch():
    assert fill(cache_of(), EXAMPLES) == [0, 3, 2, 2, 1]


def test_training_on_cached_states_has_the_gradients_of_the_whole():
    adapters = tiny_adapters(MODEL, targets=("q_proj", "down_proj"), leading=(3,))
    adapters = {path: factors for path, factors in adapters.items() if path.startswith(f"layers.{LAYERS}.")}
    examples = of(2, 0, 4)
    tokens, real = np.zeros((3, 16), np.int32), np.zeros((3, 16, 1), bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)], real[row, : len(example.tokens)] = example.tokens, True
    below = rows_of(cache_of(), examples, tokens.shape)
    assert lowest_adapted(adapters) == LAYERS

    def loss(adapters, below):
        return jnp.sum(jnp.where(real, jnp.sin(MODEL.hidden(PARAMS, adapters, tokens, below=below)), 0.0))

    gradient = jax.jit(jax.grad(loss))
    whole, above = gradient(adapters, None), gradient(adapters, below)
    for one, other in zip(jax.tree.leaves(above), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
