"""The span check on ground that is known: random matrices, and gradients of a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from fedjax_llm import lora
from fedjax_llm.errors import UserError
from fedjax_llm.leakage import span_check
from fedjax_llm.leakage.inversion import Batch, relaxed_gradient
from fedjax_llm.leakage.recovery import matched_rouge, rouge, token_recovery
from fedjax_llm.types import Adapters
from tests.models.tiny_configs import TINY_CONFIGS, tiny_of
from tests.tiny import tiny_adapters, tiny_model

VOCABULARY = 97
SCALING = 1.0
COMPILED = jax.jit(relaxed_gradient, static_argnums=(0, 2))


def gradient(rows: np.ndarray, adapters: Adapters, train: str = "both") -> Adapters:
    """The mean gradient of all tokens after the first of each row [B, L]."""
    model, params = tiny_model()
    trained, frozen = lora.split(adapters, train)
    weights = jnp.asarray(Batch((rows.shape[1],) * len(rows), (1,) * len(rows)).weights())
    return COMPILED(model, params, SCALING, trained, frozen, jax.nn.one_hot(rows, VOCABULARY), weights)


def found_in(update: Adapters, adapters: Adapters) -> span_check.TokensFound:
    model, params = tiny_model()
    return span_check.recover_tokens(model, params, adapters, update, differences=False)


def sentences_in(update: Adapters, adapters: Adapters, tokens: np.ndarray, length: int) -> list[tuple[int, ...]]:
    model, params = tiny_model()
    return span_check.recover_sentences(
        model, params, adapters, SCALING, update, tokens, length=length, differences=False, threshold=1e-3
    )


def rows_of(seed: int, sequences: int, length: int) -> np.ndarray:
    """Distinct tokens throughout."""
    return np.random.default_rng(seed).permutation(VOCABULARY)[: sequences * length].reshape(sequences, length)


@given(st.integers(0, 2**31), st.sampled_from([2, 9, 30]), st.sampled_from([1, 4, 12]), st.sampled_from([1, 5, 12]))
@settings(max_examples=15)
def test_residuals_are_those_of_least_squares(seed: int, width: int, tokens: int, rank: int):
    rng = np.random.default_rng(seed)
    update = rng.normal(size=(width, min(tokens, width))) @ rng.normal(size=(min(tokens, width), rank))
    inputs = rng.normal(size=(5, width))
    fitted = update @ np.linalg.lstsq(update, inputs.T, rcond=1e-6)[0]
    expected = np.linalg.norm(inputs.T - fitted, axis=0) / np.linalg.norm(inputs, axis=1)
    assert_allclose(span_check.span_residuals(update, jnp.asarray(inputs, jnp.float32)), expected, atol=2e-5)


@pytest.mark.parametrize(("tokens", "rank", "member"), [(4, 8, 0.0), (12, 8, 0.54), (100, 8, 0.96), (100, 128, 0.0)])
def test_members_stand_out_until_the_tokens_outnumber_the_rank(tokens: int, rank: int, member: float):
    """Equal random directions: of a member's square about 1 - rank / tokens is left, of another's 1 - rank / width."""
    width, rng, near, far = 256, np.random.default_rng(0), [], []
    for _ in range(2):
        inputs = rng.normal(size=(tokens, width))
        update = inputs.T @ rng.normal(size=(tokens, rank))
        others = rng.normal(size=(64, width))
        near.append(span_check.span_residuals(update, jnp.asarray(inputs, jnp.float32)))
        far.append(span_check.span_residuals(update, jnp.asarray(others, jnp.float32)))
    seen = min(tokens, rank)
    assert_allclose(np.mean(near), member, atol=0.05)
    assert_allclose(np.sqrt(np.mean(np.square(far))), np.sqrt(1 - seen / width), atol=0.02)
    if tokens < rank:
        assert np.max(near) < 1e-5 < 0.5 < np.min(far)


@pytest.mark.parametrize("train", ["both", "b"])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_fewer_tokens_than_rank_tokens_and_order_are_read_exactly(seed: int, train: str):
    adapters = tiny_adapters(tiny_model()[0], rank=16, targets=("q_proj", "v_proj"), seed=seed)
    rows = rows_of(seed, 2, 6)
    update = gradient(rows, adapters, train)
    found = found_in(update, adapters)
    assert found.verdict == "conclusive"
    # The last token of a row is only ever a target.
    assert found.tokens.tolist() == sorted(rows[:, :-1].ravel().tolist())
    sentences = sentences_in(update, adapters, found.tokens, rows.shape[1])
    assert set(map(tuple, rows[:, :-1].tolist())) <= set(sentences)
    assert matched_rouge(sentences, rows[:, :-1].tolist(), 2) == 1.0


def test_with_more_tokens_than_rank_the_check_says_so_and_finds_nothing():
    adapters = tiny_adapters(tiny_model()[0], rank=3, targets=("q_proj", "v_proj"))
    rows = rows_of(0, 4, 12)
    update = gradient(rows, adapters)
    found = found_in(update, adapters)
    assert found.verdict == "saturated"
    assert not len(found.tokens)
    assert sentences_in(update, adapters, np.unique(rows), 12) == []
    others = np.setdiff1d(np.arange(VOCABULARY), rows)
    assert found.residuals[rows[:, :-1].ravel()].mean() < found.residuals[others].mean()


def test_a_first_round_gives_no_update_of_a_and_that_of_b_gives_the_tokens():
    adapters = tiny_adapters(tiny_model()[0], rank=16, targets=("q_proj", "v_proj"))
    fresh = {path: {"a": own["a"], "b": jnp.zeros_like(own["b"])} for path, own in adapters.items()}
    rows = rows_of(3, 1, 8)
    update = gradient(rows, fresh)
    assert not np.any(update["layers.0.self_attn.v_proj"]["a"])
    only_a, _ = lora.partition(update, lambda path, name: name == "a")
    silent = found_in(only_a, fresh)
    assert (silent.verdict, len(silent.tokens), silent.rank) == ("silent", 0, 0)
    assert np.all(silent.residuals == 1)
    assert found_in(update, fresh).tokens.tolist() == sorted(rows[0, :-1].tolist())


def test_noise_destroys_it():
    adapters = tiny_adapters(tiny_model()[0], rank=16, targets=("q_proj", "v_proj"))
    update, rng = gradient(rows_of(0, 1, 6), adapters), np.random.default_rng(0)
    scale = 0.1 * np.sqrt(np.mean([np.mean(np.square(leaf)) for leaf in jax.tree.leaves(update)]))
    noised = jax.tree.map(lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32), update)
    found = found_in(noised, adapters)
    assert found.verdict == "saturated"
    assert not len(found.tokens)


@pytest.mark.parametrize("architecture", ["GPTNeoXForCausalLM", "GPT2LMHeadModel", "Olmo2ForCausalLM"])
def test_models_whose_first_layer_sees_something_else_are_refused(architecture: str):
    model, params = tiny_of(TINY_CONFIGS[architecture])
    with pytest.raises(UserError, match=f"does not serve {architecture}"):
        span_check.recover_tokens(model, params, {}, {})


@pytest.mark.parametrize(
    ("architecture", "targets"), [("Gemma3ForCausalLM", ("q_proj", "v_proj")), ("Phi3ForCausalLM", ("qkv_proj",))]
)
def test_families_like_llama_are_read(architecture: str, targets: tuple[str, ...]):
    model, params = tiny_of(TINY_CONFIGS[architecture])
    adapters = tiny_adapters(model, rank=16, targets=targets)
    rows = rows_of(5, 1, 8)
    weights = jnp.asarray(Batch((8,), (1,)).weights())
    update = COMPILED(model, params, SCALING, adapters, {}, jax.nn.one_hot(rows, VOCABULARY), weights)
    found = span_check.recover_tokens(model, params, adapters, update, differences=False)
    assert found.tokens.tolist() == sorted(rows[0, :-1].tolist())
    read = span_check.recover_sentences(
        model, params, adapters, SCALING, update, found.tokens, length=8, differences=False, threshold=1e-3
    )
    assert tuple(rows[0, :-1].tolist()) in read


@pytest.mark.parametrize("clients", [2, 4])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=3)
def test_a_sum_of_clients_is_one_batch_of_all_their_tokens(clients: int, seed: int):
    adapters = tiny_adapters(tiny_model()[0], rank=16, targets=("q_proj", "v_proj"))
    rows = rows_of(seed, clients, 4)
    updates = [gradient(row[None], adapters) for row in rows]
    total = jax.tree.map(lambda *leaves: sum(leaves) / clients, *updates)
    whole = found_in(gradient(rows, adapters), adapters)
    summed = found_in(total, adapters)
    assert summed.rank == whole.rank == 3 * clients
    assert summed.tokens.tolist() == whole.tokens.tolist() == sorted(rows[:, :-1].ravel().tolist())


def test_rounding_of_a_difference_is_not_taken_for_tokens():
    rng = np.random.default_rng(0)
    start = rng.uniform(-0.04, 0.04, (64, 32)).astype(np.float32)
    change = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 32)) * 1e-5
    update = (start + change.astype(np.float32)) - start
    assert span_check.column_space(update, floor=span_check.rounding_floor(start)).shape == (64, 3)
    assert span_check.column_space(update).shape[1] > 3


def test_adapters_above_layer_0_are_out_of_reach():
    adapters = {path: own for path, own in tiny_adapters(tiny_model()[0]).items() if path.startswith("layers.1.")}
    with pytest.raises(UserError, match="lowest adapted layer is 1"):
        found_in(adapters, adapters)
    mlp = {path: own for path, own in tiny_adapters(tiny_model()[0]).items() if "mlp" in path}
    with pytest.raises(UserError, match="q_proj, k_proj, v_proj or qkv_proj"):
        found_in(mlp, mlp)


def test_recovery_counts_what_was_not_known():
    assert token_recovery([1, 2, 9], [1, 2, 3, 4], known=[1]) == (1 / 3, 1 / 2)
    assert token_recovery([], [1, 2]) == (0.0, 1.0)


def test_rouge_is_the_overlap_of_multisets():
    assert rouge([1, 1, 2], [1, 2, 2], 1) == pytest.approx(2 * 2 / 6)
    assert rouge([1, 2, 3], [2, 3, 4], 2) == pytest.approx(2 * 1 / 4)
    assert (rouge([1], [1], 2), rouge([1], [2], 2)) == (1.0, 0.0)


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=6), min_size=1, max_size=4), st.randoms())
def test_the_matching_forgives_order_and_spare_candidates(rows: list[list[int]], random):
    shuffled = [*rows, [7, 7]]
    random.shuffle(shuffled)
    assert matched_rouge(shuffled, rows, 2) == 1.0
    assert matched_rouge([], rows, 1) == 0.0
    assert matched_rouge(rows[:1], rows, 1) <= 1.0
