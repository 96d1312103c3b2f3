"""Texts that a model may have met, and controls that it cannot have."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.data import known_texts as module
from fedjax_llm.data.known_texts import PUBLIC_DOMAIN, KnownText, known_texts, words_replaced, written_now

WORDS = re.compile(r"[A-Za-z]+")
PASSAGES = [one for one in PUBLIC_DOMAIN if one.name != "digits of pi"]
POOL = tuple(PASSAGES)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Folders of licences and of packages' copyrights, both empty."""
    for name in ("_LICENCES", "_COPYRIGHTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name, tmp_path / name)
    monkeypatch.setattr(module, "_package_licences", lambda: sorted((tmp_path / "_COPYRIGHTS").glob("*.txt")))
    return tmp_path


def test_texts_have_names_and_room_for_prefix_and_continuation():
    found = known_texts()
    assert len({one.name for one in found}) == len(found)
    assert found[-len(PUBLIC_DOMAIN) :] == PUBLIC_DOMAIN
    for one in found:
        assert len(one.text) >= 300
        assert one.text.strip() == " ".join(one.text.split())
        assert one.group in ("licence", "public domain")


def test_the_digits_of_pi():
    # Machin's formula in integers: pi / 4 = 4 arctan(1 / 5) - arctan(1 / 239).
    def arctan(inverse, unit):
        total = term = unit // inverse
        number, sign = 3, -1
        while term:
            term //= inverse * inverse
            total += sign * (term // number)
            number, sign = number + 2, -sign
        return total

    (text,) = (one.text for one in PUBLIC_DOMAIN if one.name == "digits of pi")
    unit = 10 ** (len(text) + 10)
    digits = str(4 * (4 * arctan(5, unit) - arctan(239, unit)))
    assert text == f"{digits[0]}.{digits[1 : len(text) - 1]}"


def test_without_files_the_built_in_passages_are_left(system):
    assert known_texts() == PUBLIC_DOMAIN


def test_a_licence_is_read_from_its_first_words_on(system):
    lines = ["Copyright (c) 1999", " .", *(["  Redistribution and use in source and binary forms, line  1", " ."] * 60)]
    (system / "_LICENCES" / "BSD").write_text("\n".join(lines))
    found = {one.name: one for one in known_texts() if one.group == "licence"}
    assert set(found) == {"BSD, conditions"}
    one = found["BSD, conditions"]
    assert len(one.text) == 2000
    assert one.text.startswith("Redistribution and use in source and binary forms, line 1 Redistribution and")
    assert one.source == str(system / "_LICENCES" / "BSD")


def test_a_text_that_is_too_short_or_not_to_be_read_is_left_out(system):
    (system / "_LICENCES" / "BSD").write_text("Redistribution and use in source and binary forms")
    (system / "_LICENCES" / "GPL-2").mkdir()
    assert known_texts() == PUBLIC_DOMAIN


def test_a_licence_of_packages_comes_from_the_first_file_that_holds_it(system):
    body = "Permission is hereby granted, free of charge, to any person. " * 20
    for name, text in (("a", "nothing"), ("b", f"Copyright B\n{body}"), ("c", f"Copyright C\n{body}")):
        (system / "_COPYRIGHTS" / f"{name}.txt").write_text(text)
    (found,) = (one for one in known_texts() if one.group == "licence")
    assert (found.name, found.source) == ("MIT, permission", "b.txt")


@given(number=st.integers(0, len(PASSAGES) - 1), seed=seeds, every=st.integers(1, 6))
def test_replaced_words_keep_their_places_and_capitals(number, seed, every):
    text = PASSAGES[number]
    control = words_replaced(text, POOL, seed, every)
    assert control == words_replaced(text, POOL, seed, every)
    assert (control.name, control.group, control.source) == (text.name, "words replaced", text.source)
    assert WORDS.sub("-", control.text) == WORDS.sub("-", text.text)
    known = {word for one in POOL for word in re.findall(r"[a-z]{4,}", one.text)}
    for new, old in zip(WORDS.findall(control.text), WORDS.findall(text.text), strict=True):
        assert new == old or new.lower() in known
        assert new[0].isupper() == old[0].isupper()
        assert len(old) == 1 or new.isupper() == old.isupper()


@pytest.mark.parametrize("every", [1, 4])
def test_about_as_many_words_as_wanted_are_replaced(every):
    # A word may come in for itself, which is rare among some hundreds. A false alarm in 1e-6 of the seeds.
    changed = total = 0
    for seed in range(8):
        for text in PASSAGES:
            old, new = (WORDS.findall(one.text) for one in (text, words_replaced(text, POOL, seed, every)))
            changed, total = changed + sum(a != b for a, b in zip(old, new, strict=True)), total + len(old)
    known = len({word for one in POOL for word in re.findall(r"[a-z]{4,}", one.text)})
    low, high = stats.binom.interval(1 - 1e-6, total, 1 / every)
    assert low - 3 * total / known <= changed <= high


def test_texts_of_other_names_have_draws_of_their_own():
    one, other = (words_replaced(KnownText(name, "", "one two three four " * 50, ""), POOL, 0) for name in "ab")
    assert one.text != other.text


def test_every_control_differs_from_its_text():
    texts = known_texts()
    assert all(words_replaced(text, texts, 0).text != text.text for text in texts)


def test_letters_are_drawn_anew_for_every_seed():
    one, other = written_now(12, 3), written_now(12, 4)
    assert one == written_now(12, 3)
    assert len({letter.text for letter in (*one, *other)}) == 24
    assert len({letter.name for letter in one}) == 12
    for letter in one:
        assert letter.group == "written now"
        assert len(letter.text) > 400
    numbers = [re.findall(r"P\d{8}", letter.text) for letter in (*one, *other)]
    assert len(np.unique(numbers)) == 24
