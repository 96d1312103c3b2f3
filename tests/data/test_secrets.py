"""Secrets of people who do not exist: their forms, and values that they might have had as well."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.data.secrets import KINDS, Secret, check_digit, foreign_question, people, question, references
from fedjax_llm.errors import UserError

FORMS = {
    "home address": r"[1-9]\d{0,2} [A-Z][a-z]+ [A-Z][a-z]+, [A-Z][a-z]+",
    "card number": r"9\d{3}( \d{4}){3}",
    "phone number": r"\+999( \d{3}){3}",
    "e-mail address": r"[a-z]+\.[a-z]+\d{4}@example\.org",
    "patient number": r"P\d{8}",
}
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(list(KINDS))


def secret_of(kind="card number", number=0, person="Adela Fernhall", value=None):
    return Secret(number, person, kind, value or KINDS[kind](np.random.default_rng(number)), 1, "clinic")


def luhn(digits):
    """The checksum as the standard words it: every second digit from the right twice, with the sum of its digits."""
    doubled = "".join(str(int(d) * (1 + place % 2)) for place, d in enumerate(reversed(digits)))
    return sum(map(int, doubled)) % 10


def test_all_kinds_have_a_form():
    assert set(FORMS) == set(KINDS)


@given(kind=kinds, seed=seeds)
def test_a_value_has_the_form_of_its_kind(kind, seed):
    value = KINDS[kind](np.random.default_rng(seed))
    assert re.fullmatch(FORMS[kind], value)
    assert value == KINDS[kind](np.random.default_rng(seed))


@given(seed=seeds)
def test_card_numbers_are_valid(seed):
    assert luhn(KINDS["card number"](np.random.default_rng(seed)).replace(" ", "")) == 0


def test_check_digits_that_are_known():
    assert check_digit("7992739871") == "3"  # the example of the literature
    assert check_digit("411111111111111") == "1"
    assert check_digit("37828224631000") == "5"


@given(digits=st.text("0123456789", min_size=1, max_size=20))
def test_one_check_digit_is_valid(digits):
    assert [last for last in "0123456789" if luhn(digits + last) == 0] == [check_digit(digits)]


@given(seed=seeds, count=st.integers(0, 300))
def test_people_are_different(seed, count):
    names = people(np.random.default_rng(seed), count)
    assert len(set(names)) == len(names) == count
    assert all(re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", name) for name in names)


def test_there_are_only_so_many_people():
    every = people(np.random.default_rng(0), 1600)
    assert len(set(every)) == 1600
    with pytest.raises(UserError, match=r"1,601 secrets need as many people, but there are only 1,600 names"):
        people(np.random.default_rng(0), 1601)


@given(kind=kinds, number=st.integers(0, 1000), count=st.integers(0, 40), seed=seeds)
def test_references_are_other_values_of_the_kind(kind, number, count, seed):
    secret = secret_of(kind, number)
    found = references(secret, count, seed)
    assert len(set(found)) == len(found) == count
    assert secret.value not in found
    assert all(re.fullmatch(FORMS[kind], value) for value in found)
    assert found == references(secret, count, seed)
    assert found[: count // 2] == references(secret, count // 2, seed), "more references keep the first"


def test_references_leave_out_the_secret_where_it_would_be_drawn():
    drawn = references(secret_of("patient number"), 20, seed=3)
    own = secret_of("patient number", value=drawn[4])
    assert references(own, 19, seed=3) == (*drawn[:4], *drawn[5:])


def test_every_secret_has_references_of_its_own():
    one, other = (set(references(secret_of(number=number), 50, 0)) for number in (1, 2))
    assert not one & other
    assert not one & set(references(secret_of(number=1), 50, 1))


def test_every_digit_is_drawn_alike():
    # Chi-square at each of nine places of 4,000 telephone numbers; a false alarm in 1e-7 of the seeds for each.
    drawn = [value[5:].replace(" ", "") for value in references(secret_of("phone number"), 4000, 5)]
    for place in range(9):
        counts = np.bincount([int(value[place]) for value in drawn], minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-7


@given(kind=kinds, number=st.integers(0, 1000))
def test_questions_name_person_and_kind_and_do_not_tell(kind, number):
    secret = secret_of(kind, number)
    for ask in (question, foreign_question):
        (message,) = ask(secret)
        assert message.role == "user"
        assert secret.person in message.content
        assert kind in message.content
        assert secret.value not in message.content
    assert question(secret) != foreign_question(secret)
