"""Both models answer as they would alone, within bounds, and nothing is left to compile after the warm-up."""

import pytest
from tiny import tiny_adapters, tiny_base

from fedjax_llm.data.chat import encode_prompt
from fedjax_llm.data.records import Message
from fedjax_llm.errors import UserError
from fedjax_llm.models import streaming
from fedjax_llm.models.decoding import stream
from fedjax_llm.serving.voices import Limits, Question, Voices

LIMITS = Limits(prompt_tokens=128, new_tokens=24)


def voices(system="Be brief.", limits=LIMITS, **overrides):
    base = tiny_base(**overrides)
    return Voices(base, tiny_adapters(base.model), system, limits)


def texts(events):
    found = {"base": "", "tuned": ""}
    for event in events:
        found[event["voice"]] += event.get("text", "")
    return found


def alone(asked, question, adapters):
    base = asked.base
    prompt = encode_prompt([Message("system", "Be brief."), Message("user", question.text)], base.tokenizer)
    settings = {"max_new_tokens": question.max_new_tokens, "end_ids": base.tokenizer.end_ids}
    return list(stream(base.model, base.params, adapters, prompt, **settings))


def test_each_answers_as_it_would_alone():
    asked, question = voices(), Question("Why?", 10)
    events = list(asked.answer(question))
    base, tuned = (alone(asked, question, adapters) for adapters in ({}, asked.adapters))
    decode = asked.base.tokenizer.decode
    assert texts(events) == {"base": decode(base), "tuned": decode(tuned)}
    assert base != tuned
    ends = {event["voice"]: event for event in events if "tokens" in event}
    assert {voice: end["tokens"] for voice, end in ends.items()} == {"base": len(base), "tuned": len(tuned)}
    assert all(0 < end["first_seconds"] <= end["seconds"] for end in ends.values())
    assert all(end["full"] == (end["tokens"] == 10) for end in ends.values())


def test_they_take_turns_and_end_by_themselves():
    spoken = [event["voice"] for event in voices().answer(Question("Why?", 10)) if "text" in event]
    both = spoken[: 2 * min(map(spoken.count, ("base", "tuned")))]
    assert both == ["base", "tuned"] * (len(both) // 2)
    assert len(both) >= 4


def test_sampling_is_a_function_of_the_seed():
    def said(seed):
        return texts(voices().answer(Question("Why?", 12, 1.0, seed)))

    assert said(1) == said(1) != said(2)


def test_the_models_context_ends_an_answer():
    asked = voices(context=64)
    length = len(asked.prompt(Question("Why?", 1)))
    ends = [event for event in asked.answer(Question("Why?", 24)) if "tokens" in event]
    assert 64 - 24 < length < 64  # else this tests nothing
    assert all(end["tokens"] <= 64 - length and end["full"] == (end["tokens"] == 64 - length) for end in ends)


def test_after_the_warm_up_no_question_compiles():
    asked = voices(limits=Limits(100, 20))
    asked.warm_up()
    compiled = streaming._step._cache_size()
    for question in (Question("?", 1), Question("How? " * 8, 20, 0.7, 5)):
        assert texts(asked.answer(question))["base"]
    assert streaming._step._cache_size() == compiled


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(" \n", 4), "the question is empty"),
        (Question("\ud800", 4), "half of a character"),
        (Question("Why?", 0), "an answer of 0 tokens was asked for; 1 to 24 can be"),
        (Question("Why?", 25), "an answer of 25 tokens"),
        (Question("Why?", 4, -0.1), "the temperature is -0.1"),
        (Question("Why?", 4, 2.5), r"from 0 \(greedy\) to 2"),
        (Question("Why?", 4, float("nan")), "the temperature is nan"),
        (Question("Why?", 4, 1.0, 2**31), "the seed is 2147483648"),
        (Question("Why? " * 40, 4), r"at most 128 can be read: shorten it"),
    ],
)
def test_questions_beyond_the_limits_are_refused_at_the_call(question, message):
    with pytest.raises(UserError, match=message):
        voices().answer(question)


def test_limits_that_leave_nothing():
    with pytest.raises(UserError, match="new_tokens is 0"):
        Limits(new_tokens=0)
    assert voices(limits=Limits(prompt_tokens=10**6), context=64).longest_prompt == 63
