"""Masking, overlap and matched distractors."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.data.choice import LENGTHS, Clue, guesses, mask, matched_questions, overlap, stems
from fedjax_llm.data.records import Message

WORDS = ("amber", "beige", "coral", "denim", "ebony", "green", "hazel", "ivory", "khaki", "lilac")


def test_stems():
    assert stems("The Cerebellar-vermis of an eye, which is HYPOPLASTIC in 12 ways") == {
        "cerebe",
        "vermis",
        "eye",
        "hypopl",
        "ways",
    }


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("Green cloud", "a green thing", 0.5),
        ("Green cloud", "clouds, greenish", 0.0),
        ("Wobbling hands", "hand that wobbles", 0.0),
        ("Cerebellar atrophy", "of the cerebellum, atrophic", 1.0),
        ("Green green", "green", 1.0),
        ("A of", "green", 0.0),
    ],
)
def test_overlap(option, text, expected):
    assert overlap(option, text) == expected


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("A Bent feeler is bent.", ["bent feeler"], "A ___ is bent."),
        ("Bent feelers bend.", ["Bent feeler"], "___ bend."),
        ("Bent feeler, a feeler.", ["feeler", "Bent feeler"], "___, a ___."),
        ("As such, AS is rare.", ["AS"], "As such, ___ is rare."),
        ("Unbent feelerous", ["bent feeler"], "Unbent feelerous"),
        ("The (x+y) sign.", ["(x+y) sign"], "The ___."),
        ("a b", ["a", ""], "a b"),
    ],
)
def test_mask(text, names, expected):
    assert mask(text, names) == expected


def test_guesses_split_ties():
    # Overlaps with the text: 1/2, 1/2, 0, 0; lengths 10, 9, 9, 4.
    options = ("green moon", "green sun", "other sun", "moon")
    assert guesses(options, 0, "something green") == {"overlap": 0.5, "longest": 1.0}
    assert guesses(options, 1, "something green") == {"overlap": 0.5, "longest": 0.0}
    assert guesses(options, 2, "something green") == {"overlap": 0.0, "longest": 0.0}
    assert guesses(options, 3, "nothing") == {"overlap": 0.25, "longest": 0.0}


def ask(pool, clues, related=lambda one, other: one == other, seed=0):
    return matched_questions(pool, clues, related, lambda text: (Message("user", text),), seed)


names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(names, min_size=4, max_size=25),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join),
    st.integers(0, 2**32),
)
def test_distractors_are_matched(pool_names, text, seed):
    pool = {f"r{i:02d}": name for i, name in enumerate(pool_names)}
    clues = [Clue(key, name, text) for key, name in pool.items()]

    def related(one, other):  # neighbours are kin
        return abs(int(one[1:]) - int(other[1:])) <= 1

    questions = ask(pool, clues, related, seed)
    for question in questions:
        key = question.options[question.answer]
        assert key == pool[question.record_id]
        assert len(set(question.options)) == len(question.options) == 4
        others = [option for place, option in enumerate(question.options) if place != question.answer]
        low, high = (factor * len(key) for factor in LENGTHS)
        assert all(low <= len(option) <= high for option in others)
        assert sum(overlap(option, text) >= overlap(key, text) for option in others) in (1, 2)
    # The same whatever the order of the pool and whatever else is asked.
    assert ask(dict(reversed(pool.items())), clues[::-1], related, seed) == questions[::-1]
    for question in questions:
        assert ask(pool, [clue for clue in clues if clue.record_id == question.record_id], related, seed) == (question,)


POOL = {
    "key": "green moon",  # overlaps "green" by 1/2, as do the next two
    "same1": "green suns",
    "same2": "green mars",
    "low1": "amber suns",
    "low2": "beige mars",
    "long": "green moons of far planets",
}
CLUE = Clue("key", "green moon", "something green")


def test_two_that_overlap_are_preferred():
    for seed in range(20):
        (question,) = ask(POOL, [CLUE], seed=seed)
        assert {"green suns", "green mars"} < set(question.options)
        assert question.guesses == {"overlap": pytest.approx(1 / 3), "longest": 0.25}


def test_kin_are_never_options_together():
    kin = {frozenset(("key", "same1")), frozenset(("low1", "low2"))}
    assert ask(POOL, [CLUE], lambda one, other: frozenset((one, other)) in kin) == ()
    (question,) = ask(POOL | {"low3": "coral suns"}, [CLUE], lambda one, other: frozenset((one, other)) in kin)
    assert "green suns" not in question.options
    assert not {"amber suns", "beige mars"} <= set(question.options)


def test_without_an_overlapping_or_a_low_distractor_there_is_no_question():
    no_high = {key: name for key, name in POOL.items() if not key.startswith("same")}
    assert ask(no_high, [CLUE]) == ()
    assert ask(POOL, [Clue("key", "green moon", "no word in common")]) == ()


def test_a_record_outside_the_pool_can_be_asked():
    pool = {key: name for key, name in POOL.items() if key != "key"}
    (question,) = ask(pool, [CLUE])
    assert question.options[question.answer] == "green moon"


def test_the_key_stands_anywhere():
    places = Counter(ask(POOL, [CLUE], seed=seed)[0].answer for seed in range(200))
    assert min(places[place] for place in range(4)) > 25
