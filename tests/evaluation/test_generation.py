"""Held-out questions chosen in turn, and their answers with shared and with own adapters."""

import pytest
from tiny import tiny_adapters, tiny_base

from fedjax_llm import lora
from fedjax_llm.data.records import Example, Message, Record
from fedjax_llm.evaluation import generation
from fedjax_llm.evaluation.generation import answers, choose_prompts, side_by_side
from fedjax_llm.models.decoding import generate

SCALING = 0.5


def record(name, questions=2):
    asked = (
        Example((Message("user", f"{name}{number}?"), Message("assistant", f"{name}{number}!")))
        for number in range(questions)
    )
    return Record(name, tuple(asked))


SITES = {"x": [record("a"), record("b"), record("c")], "y": [record("d")], "z": []}


def chosen(total, longest=999, system=None, sites=SITES):
    return choose_prompts(sites, total, tiny_base(layers=1).tokenizer, longest=longest, system=system)


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (0, []),
        (1, [("x", "a0?")]),
        (3, [("x", "a0?"), ("x", "b0?"), ("y", "d1?")]),
        (99, [("x", "a0?"), ("x", "b0?"), ("x", "c1?"), ("y", "d1?")]),
    ],
)
def test_sites_and_examples_take_turns(total, expected):
    assert [(prompt.site, prompt.text) for prompt in chosen(total)] == expected


def test_a_prompt_is_the_templated_question_with_its_reference():
    (prompt,) = chosen(1, system="Be brief.")
    assert (prompt.record, prompt.reference) == ("a", "a0!")
    assert tiny_base(layers=1).tokenizer.decode(prompt.tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na0?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_prompts_that_are_too_long_are_passed_over():
    sites = {"x": [record("a very long name"), record("b")]}
    length = len(chosen(1, sites={"x": [record("b")]})[0].tokens)
    assert [prompt.record for prompt in chosen(2, longest=length, sites=sites)] == ["b"]
    assert chosen(2, longest=length - 1, sites=sites) == ()


@pytest.mark.parametrize("shared", [True, False])
def test_each_question_is_answered_with_its_sites_adapters(shared, monkeypatch):
    monkeypatch.setattr(generation, "_ROWS", 3)  # so that there are several batches
    base = tiny_base(layers=1)
    one = tiny_adapters(base.model)
    adapters = {site: one if shared else tiny_adapters(base.model, seed=seed) for seed, site in enumerate(SITES)}
    prompts = chosen(4)
    found = answers(base, SCALING, adapters, prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, found, strict=True):
        own = lora.scaled(adapters[prompt.site], SCALING)
        settings = {"max_new_tokens": 8, "end_ids": base.tokenizer.end_ids, "pad_id": 0}
        (tokens,) = generate(base.model, base.params, own, [prompt.tokens], **settings)
        assert answer == base.tokenizer.decode(tokens)
    assert len(set(found)) > 1
    assert answers(base, SCALING, adapters, (), max_new_tokens=8) == []


def test_rows_of_the_evaluation_file():
    assert side_by_side(chosen(1), ["before"], ["after"]) == [
        {"site": "x", "record": "a", "prompt": "a0?", "reference": "a0!", "base": "before", "final": "after"}
    ]
