"""Chat template, answer mask and length limits, with a small tokenizer: a token a character."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fedjax_llm.data.chat import encode_example, encode_prompt, encode_records, with_system
from fedjax_llm.data.records import Example, Message, Record
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

LETTERS = "abcdefghij :?.\n"
TEMPLATE = (
    "{% if messages[0].role != 'system' %}s:helpful<end>\n{% endif %}"
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(template=TEMPLATE, merged=()):
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<end>", "<eos>", *LETTERS, "u", "s", "l", "p", "f", *merged])
    }
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    pieces = "|".join([*merged, r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    backend.add_special_tokens(["<end>", "<eos>"])
    return Tokenizer(backend, eos_id=2, pad_id=2, bos_id=None, end_ids=frozenset((1, 2)), chat_template=template)


TOKENIZER = tokenizer()


def text_of(ids, of=TOKENIZER):
    return "".join(of.backend.id_to_token(int(i)) for i in ids)


def example(question="b?", answer="cab"):
    return Example((Message("user", question), Message("assistant", answer)))


def halves(encoded, of=TOKENIZER):
    return text_of(encoded.tokens[: encoded.prompt_length], of), text_of(encoded.tokens[encoded.prompt_length :], of)


words = st.text(LETTERS, min_size=1, max_size=20)


@given(words, words)
def test_targets_decode_to_the_answer_and_the_prompt_is_that_of_generation(question, answer):
    encoded = encode_example(example(question, answer), TOKENIZER, "r")
    assert encoded.tokens.dtype == np.int32
    prompt, target = halves(encoded)
    assert prompt == f"s:helpful<end>\nu:{question}<end>\na:"
    assert target == f"{answer}<end>"
    assert encode_prompt((Message("user", question),), TOKENIZER) == list(encoded.tokens[: encoded.prompt_length])


def test_earlier_answers_are_prompt():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    assert halves(encode_example(Example(turns), TOKENIZER, "r")) == (
        "s:helpful<end>\nu:a<end>\na:b<end>\nu:c<end>\na:",
        "d<end>",
    )


def test_end_of_text_is_added_where_the_template_has_none():
    bare = tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    assert halves(encode_example(example(), bare, "r"), bare) == ("b?\n", "cab\n<eos>")


def test_a_template_that_rewrites_earlier_turns_is_not_followed():
    rewriting = tokenizer("{% if messages[-1].role == 'assistant' %}j{% endif %}{{ messages[0].content }}:")
    assert halves(encode_example(example(), rewriting, "r"), rewriting) == ("b?:", "cab<eos>")


def test_an_answer_ends_with_its_first_end_of_turn():
    assert halves(encode_example(example(answer="a<end>b"), TOKENIZER, "r"))[1] == "a<end>"


def test_tokens_across_the_seam_are_not_used():
    seam = tokenizer(merged=[":c"])
    assert ":c" in text_of(seam.encode("a:cab"), seam)
    assert seam.backend.token_to_id(":c") in seam.encode("a:cab")
    encoded = encode_example(example(), seam, "r")
    assert list(encoded.tokens[: encoded.prompt_length]) == encode_prompt(example().messages[:-1], seam)
    assert halves(encoded, seam) == ("s:helpful<end>\nu:b?<end>\na:", "cab<end>")


def test_system_message():
    assert with_system(example(), None) == example()
    added = with_system(example(), "d")
    assert added.messages[0] == Message("system", "d")
    assert with_system(added, "other") == added
    (encoded,), _ = encode_records([Record("r", (example(),))], TOKENIZER, 100, "drop", system="d")
    assert halves(encoded)[0] == "s:d<end>\nu:b?<end>\na:"


lengths = st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), max_size=8)


@given(lengths, st.integers(2, 60), st.sampled_from(["truncate", "drop"]))
def test_limits(lengths, max_length, too_long):
    records = [Record(f"r{i}", (example("a" * q, "b" * a),)) for i, (q, a) in enumerate(lengths)]
    whole, free = encode_records(records, TOKENIZER, 10_000, too_long)
    assert (free.kept, free.truncated, free.dropped) == (len(records), 0, 0)
    got, report = encode_records(records, TOKENIZER, max_length, too_long)
    wanted = {}
    for one in whole:
        fits = len(one.tokens) <= max_length
        if fits or (too_long == "truncate" and one.prompt_length < max_length):
            wanted[one.record_id] = replace(one, tokens=one.tokens[:max_length])
    assert [one.record_id for one in got] == list(wanted)
    for one in got:
        assert one.prompt_length == wanted[one.record_id].prompt_length < len(one.tokens)
        np.testing.assert_array_equal(one.tokens, wanted[one.record_id].tokens)
    shortened = sum(len(one.tokens) > max_length for one in whole if one.record_id in wanted)
    assert (report.kept, report.truncated, report.dropped) == (
        len(wanted) - shortened,
        shortened,
        len(records) - len(wanted),
    )
    assert report.longest == free.longest == max((len(one.tokens) for one in whole), default=0)


def test_all_examples_of_a_record_carry_its_id():
    record = Record("r", (example("a", "b"), example("c", "d")))
    encoded, report = encode_records([record], TOKENIZER, 100, "drop")
    assert [one.record_id for one in encoded] == ["r", "r"]
    assert report.kept == 2


def test_impossible_limits():
    with pytest.raises(UserError, match="max_length is 1"):
        encode_records([], TOKENIZER, 1, "drop")
    with pytest.raises(UserError, match="too_long is 'cut'"):
        encode_records([], TOKENIZER, 10, "cut")
