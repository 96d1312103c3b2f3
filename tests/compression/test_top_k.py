"""The largest values and the memory of the others, against plain NumPy; and encodings of the counted length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import index_bytes, indices, largest, quantised_bytes, quantised_values

from fedjax_llm.compression.bf16 import Bfloat16
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.rotated import Rotated
from fedjax_llm.compression.top_k import TopK

N = 300
PLAIN, CODED = TopK(0.05).make(), TopK(0.05, values=Quantise(4, block=6)).make()


def tree(vector: np.ndarray) -> dict:
    """A message of 300 values."""
    return {"a": jnp.asarray(vector[:100].reshape(20, 5)), "b": jnp.asarray(vector[100:])}


def flat(message: dict) -> np.ndarray:
    return np.concatenate([np.asarray(message["a"]).ravel(), np.asarray(message["b"])])


def inputs(rounds: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, (rounds, N)).astype(np.float32)


def play(codec, vectors: np.ndarray):
    """Everything sent, and the memory before and after, round by round."""
    memory = codec.init(tree(vectors[0]))
    for number, vector in enumerate(vectors):
        before = memory
        message, memory = codec.code(jax.random.key(number), tree(vector), memory)
        yield vector, flat(message), flat(before) if before else None, flat(memory) if memory else None


@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_what_is_sent_and_remembered_is_that_of_the_published_algorithm(seed):
    memory = np.zeros(N, np.float32)
    for vector, sent, _, after in play(PLAIN, inputs(4, seed)):
        wanted = vector + memory
        expected = np.zeros(N, np.float32)
        places = largest(wanted, 15)
        expected[places] = wanted[places]
        memory = wanted - expected
        assert np.array_equal(sent, expected)
        assert np.array_equal(after, memory)


@pytest.mark.parametrize("codec", [PLAIN, CODED], ids=["plain", "coded"])
def test_nothing_is_lost_sent_and_memory_are_message_and_memory(codec):
    for vector, sent, before, after in play(codec, inputs(5, 1)):
        wanted = vector + before
        np.testing.assert_array_max_ulp(np.where(sent == 0, after, wanted), wanted, maxulp=0)
        np.testing.assert_allclose(sent + after, wanted, rtol=2.0**-23)


def test_all_that_is_sent_approaches_all_that_was_to_be_sent():
    vectors = np.repeat(inputs(1, 2), 200, axis=0)
    total, gaps = np.zeros(N), []
    for number, (_, sent, _, _) in enumerate(play(PLAIN, vectors), start=1):
        total += sent
        gaps.append(np.linalg.norm(total / number - vectors[0]) / np.linalg.norm(vectors[0]))
    assert gaps[0] > 0.5
    assert gaps[-1] < 0.1
    forgetful = [sent for _, sent, _, _ in play(TopK(0.05, error_feedback=False).make(), vectors[:3])]
    assert np.array_equal(forgetful[0], forgetful[-1])  # without the memory the others are never sent


@pytest.mark.parametrize(
    ("size", "width"), [(1, 1), (2, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24, 3), (2**24 + 1, 4)]
)
def test_an_index_takes_the_fewest_bytes_that_hold_it(size, width):
    last = np.array([size - 1])
    assert indices(index_bytes(last, width), width) == last
    assert width == 1 or indices(index_bytes(last, width - 1), width - 1) != last
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)
    assert TopK(1e-9).make().nbytes(shape) == width + 4


@pytest.mark.parametrize(
    ("share", "size", "kept"), [(0.07, 100, 7), (0.1, 10, 1), (0.11, 10, 2), (1.0, 9, 9), (1, 9, 9)]
)
def test_the_share_is_taken_as_it_is_written(share, size, kept):
    assert TopK(share).make().nbytes(np.zeros(size, np.float32)) == kept * 5


def test_the_largest_values_pack_into_the_bytes_that_are_counted():
    vector = inputs(1, 3)[0]
    ((_, sent, _, _),) = play(PLAIN, vector[None])
    places = largest(vector, 15)
    data = index_bytes(places, 2) + sent[places].astype("<f4").tobytes()
    assert len(data) == PLAIN.nbytes(tree(vector)) == 15 * 6
    decoded = np.zeros(N, np.float32)
    decoded[indices(data[:30], 2)] = np.frombuffer(data[30:], "<f4")
    assert np.array_equal(decoded, sent)


def test_quantised_largest_values_pack_into_the_bytes_that_are_counted():
    vector = inputs(1, 4)[0]
    ((_, sent, _, _),) = play(CODED, vector[None])
    places = largest(vector, 15)
    data = index_bytes(places, 2) + quantised_bytes(sent[places], vector[places], 4, 6)
    assert len(data) == CODED.nbytes(tree(vector)) == 15 * 2 + 8 + 3 * 4
    decoded = np.zeros(N, np.float32)
    decoded[indices(data[:30], 2)] = quantised_values(data[30:], 15, 4, 6)
    assert np.array_equal(decoded, sent)
    assert np.count_nonzero(sent) <= 15


@pytest.mark.parametrize(
    ("values", "expected"),
    [(Bfloat16(), 15 * 2), (Rotated(Quantise(4)), 8 + 8 + 4), (Rotated(Quantise(4), block=4), 8 + 8 + 4)],
    ids=str,
)
def test_the_bytes_of_a_composition_are_those_of_its_parts(values, expected):
    assert TopK(0.05, values=values).make().nbytes(tree(inputs(1, 0)[0])) == 15 * 2 + expected


def test_messages_in_bfloat16_lose_nothing_either():
    codec = TopK(0.25).make()
    message = jnp.asarray(inputs(1, 5)[0][:8], jnp.bfloat16)
    memory = jnp.linspace(0.001, 0.002, 8)
    sent, after = codec.code(jax.random.key(0), message, memory)
    assert sent.dtype == jnp.bfloat16
    wanted = message.astype(jnp.float32) + memory
    np.testing.assert_allclose(sent.astype(jnp.float32) + after, wanted, rtol=1e-6)
