"""Many continuations at once: the sums that NumPy gives, and the tokens that one prompt after the other gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_adapters, tiny_base, tiny_tokenizer

from fedjax_llm import lora
from fedjax_llm.evaluation.continuations import continued, log_likelihoods, stop_ids, until_stop
from fedjax_llm.models.decoding import Nucleus, generate

BASE = tiny_base(layers=1, context=48)
ADAPTERS = lora.scaled(tiny_adapters(BASE.model), 1.5)


def oracle(context, continuation):
    """A forward pass of one row, and NumPy's softmax in f64."""
    tokens = [*context, *continuation][-(BASE.model.config.context + 1) :]
    read = np.zeros((1, BASE.model.config.context), np.int32)
    read[0, : len(tokens) - 1] = tokens[:-1]
    hidden = BASE.model.hidden(BASE.params, ADAPTERS, jnp.asarray(read))
    logits = np.asarray(BASE.model.logits(BASE.params, hidden[0]), np.float64)[: len(tokens) - 1][-len(continuation) :]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = np.array(tokens[-len(continuation) :])
    return log_probs[np.arange(len(chosen)), chosen].sum(), bool((logits.argmax(axis=1) == chosen).all())


def pairs(count):
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(1, 60)), int(rng.integers(1, 20))) for _ in range(count)]
    return [(rng.integers(3, 259, one).tolist(), rng.integers(3, 259, other).tolist()) for one, other in sizes]


def greedy_pair():
    (made,) = generate(BASE.model, BASE.params, ADAPTERS, [[5, 6, 7]], max_new_tokens=6, end_ids=(), pad_id=0)
    return [5, 6, 7], made


def test_log_likelihoods_are_those_of_single_rows():
    asked = [*pairs(12), greedy_pair()]
    assert any(len(one) + len(other) > 49 for one, other in asked)  # contexts that are cut
    done = []
    found = log_likelihoods(BASE.model, BASE.params, ADAPTERS, asked, batch_size=2, buckets=2, advance=done.append)
    wanted = [oracle(*pair) for pair in asked]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found[-1][1]
    assert sum(done) == len(asked)


def test_no_request_no_work():
    assert log_likelihoods(BASE.model, BASE.params, {}, [], batch_size=2) == []
    options = {"max_new_tokens": 3, "end_ids": (), "pad_id": 0, "batch_size": 2}
    assert continued(BASE.model, BASE.params, {}, [], **options) == []


def test_prompts_of_all_lengths_are_continued_in_their_own_order():
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 259, size).tolist() for size in (4, 30, 9, 2, 17)]
    options = {"max_new_tokens": 5, "end_ids": BASE.tokenizer.end_ids, "pad_id": BASE.tokenizer.pad_id}
    done = []
    found = continued(BASE.model, BASE.params, ADAPTERS, prompts, batch_size=2, advance=done.append, **options)
    wanted = [generate(BASE.model, BASE.params, ADAPTERS, [prompt], **options)[0] for prompt in prompts]
    assert found == wanted
    assert done == [2, 2, 1]


def test_every_batch_has_its_own_sampler():
    options = {"max_new_tokens": 8, "end_ids": (), "pad_id": 0, "batch_size": 1}

    def sampled(seed):
        return continued(
            BASE.model,
            BASE.params,
            ADAPTERS,
            [[5, 6], [5, 6]],
            sampler=lambda batch: Nucleus(jax.random.fold_in(jax.random.key(seed), batch)),
            **options,
        )

    assert sampled(0) == sampled(0) != sampled(1)
    assert sampled(0)[0] != sampled(0)[1]


def test_a_row_may_end_at_tokens_that_begin_with_a_stop_text():
    tokenizer = tiny_tokenizer()
    assert {tokenizer.decode([token]) for token in stop_ids(tokenizer, ["e", "\n", "xyz", ""])} == {"e", "\n"}
    ends = {tokenizer.decode([token]) for token in stop_ids(tokenizer, ["<|im_"])}
    assert ends == {"<|im_start|>", "<|im_end|>"}
    assert stop_ids(tokenizer, []) == frozenset()


@pytest.mark.parametrize(
    ("stops", "kept"), [(["b"], "a"), (["c", "bc"], "a"), (["x", ""], "abcbc"), ([], "abcbc"), (["a"], "")]
)
def test_a_text_ends_before_the_first_stop_text(stops, kept):
    assert until_stop("abcbc", stops) == kept
