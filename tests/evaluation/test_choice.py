"""Options scored as branches of one row, against each option in a row of its own."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_model, tiny_tokenizer

from fedjax_llm import lora
from fedjax_llm.data.chat import encode_example, with_system
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import ChoiceQuestion, Example, Message
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.choice import chosen, lay_out, score_options, tree_mask

SCALING = 0.5
TOKENIZER = tiny_tokenizer()
KINDS = {"plain": {}, "window": {"window": 7}, "a window in one layer": {"window": (7, None)}}


def ask(*options, text="Which?", answer=0):
    return ChoiceQuestion("r", (Message("user", text),), options, answer)


QUESTIONS = (
    ask("hand", "foot and more", "e", "hand and"),
    ask("aa", "ab", "b", "é", text="Which finding is described: small?", answer=2),
    ask("yes", "no", text="?"),
)


def alone(model, params, adapters, question, option, system):
    """The mean log-likelihood of an option in a row of its own, from all logits."""
    example = with_system(Example((*question.messages, Message("assistant", option))), system)
    encoded = encode_example(example, TOKENIZER, "r")
    hidden = _hidden(model, params, lora.scaled(adapters, SCALING), np.pad(encoded.tokens, (0, 128))[None, :128])
    logits = np.asarray(model.logits(params, hidden[0]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(encoded.prompt_length, len(encoded.tokens) - 1)  # without the end of turn
    assert TOKENIZER.decode(encoded.tokens[places]) == option
    return logs[places - 1, encoded.tokens[places]].mean()


_hidden = jax.jit(lambda model, *given: model.hidden(*given), static_argnums=0)


@pytest.mark.parametrize(
    ("kind", "system"), [("plain", None), ("plain", "Be brief."), ("window", None), ("a window in one layer", None)]
)
def test_a_branch_scores_as_the_option_alone(kind, system):
    model, params = tiny_model(vocab_size=TOKENIZER.vocab_size, **KINDS[kind])
    adapters = tiny_adapters(model)
    rows = [lay_out(question, TOKENIZER, system) for question in QUESTIONS]
    shapes = choose_shapes([row.encoded for row in rows], tokens_per_microbatch=200, buckets=2)
    seen = []
    found = score_options(model, SCALING, params, adapters, rows, shapes=shapes, advance=seen.append)
    assert sum(seen) == len(QUESTIONS)
    for question, scores in zip(QUESTIONS, found, strict=True):
        expected = [alone(model, params, adapters, question, option, system) for option in question.options]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_rows_of_padding_stand_for_a_question_that_may_be_longer_than_they_are():
    model, params = tiny_model(vocab_size=TOKENIZER.vocab_size)
    questions = [ask("hand", "foot", text="Which? " * 8), *(ask("yes", "no", text=str(i)) for i in range(9))]
    rows = [lay_out(question, TOKENIZER, None) for question in questions]
    shapes = choose_shapes([row.encoded for row in rows], tokens_per_microbatch=160, buckets=2)
    assert shapes[0].length < len(rows[0].encoded.tokens)
    assert 9 % shapes[0].rows, "the last microbatch must have rows to spare"
    together = score_options(model, SCALING, params, {}, rows, shapes=shapes, advance=lambda count: None)
    longest = shapes[-1:]
    for row, scores in zip(rows, together, strict=True):
        (alone,) = score_options(model, SCALING, params, {}, [row], shapes=longest, advance=lambda count: None)
        np.testing.assert_allclose(scores, alone, atol=1e-5)


def test_the_order_of_the_options_changes_no_score():
    model, params = tiny_model(vocab_size=TOKENIZER.vocab_size)
    forwards, backwards = QUESTIONS[0].options, QUESTIONS[0].options[::-1]
    rows = [lay_out(ask(*options), TOKENIZER, None) for options in (forwards, backwards)]
    shapes = choose_shapes([row.encoded for row in rows], tokens_per_microbatch=200, buckets=1)
    one, two = score_options(model, SCALING, params, {}, rows, shapes=shapes, advance=lambda count: None)
    np.testing.assert_allclose(one, two[::-1], atol=1e-5)
    assert len(set(one.round(4))) == 4


def test_the_layout_of_a_row():
    row = lay_out(ask("ab", "c", "ab"), TOKENIZER, None)
    length = row.encoded.prompt_length
    assert TOKENIZER.decode(row.encoded.tokens[:length]).endswith("assistant\n")
    assert TOKENIZER.decode(row.encoded.tokens[length:]) == "abcab"
    assert row.branch.tolist() == [-1] * length + [0, 0, 1, 2, 2]
    assert row.position.tolist() == [*range(length), length, length + 1, length, length, length + 1]
    assert row.parent[length:].tolist() == [length - 1, length, length - 1, length - 1, length + 3]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4))
def test_a_token_sees_its_past_in_the_tree_and_nothing_else(sizes, shared):
    branch = np.array([-1] * shared + [n for n, size in enumerate(sizes) for _ in range(size)])
    position = np.array([*range(shared), *(shared + k for size in sizes for k in range(size))])
    mask = tree_mask(branch[None])[0]
    for query in range(len(branch)):
        own = [*range(shared), *np.flatnonzero(branch == branch[query])] if branch[query] >= 0 else range(shared)
        past = [key for key in own if position[key] <= position[query]]
        assert np.flatnonzero(mask[query]).tolist() == past


def test_nothing_asked_nothing_scored():
    model, params = tiny_model(vocab_size=TOKENIZER.vocab_size)
    assert score_options(model, SCALING, params, {}, [], shapes=(), advance=print) == []


def test_an_option_without_a_token_is_named():
    with pytest.raises(UserError, match="option '' of the question about record 'r'"):
        lay_out(ask("a", ""), TOKENIZER, None)


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_best_is_chosen_and_among_equals_always_the_same_text(options):
    question = ask(*options)
    assert chosen(question, np.array([-3.0, -1.0, -2.0, -1.5])) == 1
    tied = options[chosen(question, np.zeros(4))]
    assert tied == chosen_text_of_sorted()
    low_first = chosen(question, np.where(np.array(options) == tied, -1.0, 0.0))
    assert options[low_first] != tied


def chosen_text_of_sorted():
    """What is taken of four equal options in alphabetic order."""
    return "abcd"[chosen(ask(*"abcd"), np.zeros(4))]


def test_ties_favour_no_place():
    places = [chosen(ask(*(f"{number} {letter}" for letter in "abcd")), np.zeros(4)) for number in range(2000)]
    assert np.all(np.abs(np.bincount(places, minlength=4) / 2000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000))
