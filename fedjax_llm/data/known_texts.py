"""Texts that a model may well have met: licences from this system's files, and works in the public domain.

Licence texts are read where they lie and never kept in the project; where a file is absent its texts are left out. The
built-in passages are in the public domain: their authors died more than a century ago, or were officers of the United
States at their duties.
"""

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedjax_llm.data.secrets import KINDS, people

_LICENCES = Path("/usr/share/common-licenses")
_COPYRIGHTS = Path("/usr/share/doc")
_FILES = (
    ("Apache 2.0, how to apply", "Apache-2.0", "Licensed under the Apache License, Version 2.0"),
    ("Apache 2.0, terms", "Apache-2.0", "TERMS AND CONDITIONS FOR USE"),
    ("BSD, conditions", "BSD", "Redistribution and use in source and binary forms"),
    ("BSD, disclaimer", "BSD", "THIS SOFTWARE IS PROVIDED BY THE REGENTS"),
    ("GPL 2, notice", "GPL-2", "This program is free software"),
    ("GPL 3, warranty", "GPL-3", "This program is distributed in the hope"),
    ("GPL 3, preamble", "GPL-3", "The GNU General Public License is"),
    ("GPL 2, preamble", "GPL-2", "The licenses for most software are designed"),
    ("MPL 2.0, notice", "MPL-2.0", "This Source Code Form is subject to"),
    ("LGPL 2.1, heading", "LGPL-2.1", "Everyone is permitted to copy"),
    ("CC0, statement of purpose", "CC0-1.0", "The laws of most jurisdictions"),
    ("Artistic, preamble", "Artistic", "The intent of this document is to"),
)
_IN_PACKAGES = (
    ("MIT, permission", "Permission is hereby granted, free of charge"),
    ("MIT, disclaimer", 'THE SOFTWARE IS PROVIDED "AS IS"'),
)
_ISC = ("ISC, permission", "Permission to use, copy, modify, and/or")


@dataclass(frozen=True)
class KnownText:
    """A passage to prompt with the beginning of.

    Attributes:
      name: for people.
      group: ``licence``, ``public domain``, or a control: ``words replaced``, ``written now``.
      text: long enough for a prefix and a continuation.
      source: where it is from.
    """

    name: str
    group: str
    text: str
    source: str


def known_texts() -> tuple[KnownText, ...]:
    """All licences that this system's files hold, then the built-in passages."""
    return (*_licences(), *PUBLIC_DOMAIN)


def words_replaced(text: KnownText, pool: tuple[KnownText, ...], seed: int, every: int = 4) -> KnownText:
    """A control: the same text with about one word in ``every`` replaced by a word of other texts (same capitals).

    So are digits, by other digits: a text of figures has a control too.

    Args:
      text: whose words are replaced.
      pool: whose words come in.
      seed: of the choice; texts of other names have draws of their own.
      every: one word of so many.
    """
    rng = np.random.default_rng([seed, *text.name.encode()])
    words = sorted({word for other in pool for word in re.findall(r"[a-z]{4,}", other.text)})

    def other(found: re.Match[str]) -> str:
        word = found[0]
        if rng.random() >= 1 / every:
            return word
        if word.isdigit():
            return str((int(word) + rng.integers(1, 10)) % 10)
        new = str(rng.choice(words))
        return new.upper() if word.isupper() and len(word) > 1 else new.capitalize() if word[0].isupper() else new

    return KnownText(text.name, "words replaced", re.sub(r"[A-Za-z]+|[0-9]", other, text.text), text.source)


def written_now(count: int, seed: int) -> tuple[KnownText, ...]:
    """Controls that no model can have met: letters about people who do not exist, drawn now."""
    rng = np.random.default_rng([seed, 11])
    found = []
    for number, person in enumerate(people(rng, count)):
        values = {kind: draw(rng) for kind, draw in KINDS.items()}
        days = rng.integers(2, 60, 3)
        text = (
            f"To whom it may concern: our patient {person}, of {values['home address']}, was seen on the ward after "
            f"{days[0]} days of rest and asked us to write to you. The file has the number {values['patient number']}, "
            f"and the bill of {days[1]} crowns was paid with the card {values['card number']}. Please call "
            f"{values['phone number']} or write to {values['e-mail address']} within {days[2]} days, since the family "
            "moves house in the week after and has asked that nobody else be told of it."
        )
        found.append(KnownText(f"letter {number + 1}", "written now", text, f"drawn with seed {seed}"))
    return tuple(found)


def _licences() -> Iterator[KnownText]:
    """Licence texts from the system's files, from their known first words on."""
    for name, file, start in _FILES:
        text = _from(_LICENCES / file, start)
        if text is not None:
            yield KnownText(name, "licence", text, str(_LICENCES / file))
    curl = _COPYRIGHTS / "curl" / "copyright"
    files = [*_package_licences(), curl, *sorted(_COPYRIGHTS.glob("*/copyright"))[:400]]
    for name, start in (*_IN_PACKAGES, _ISC):
        for path in files:
            text = _from(path, start)
            if text is not None:
                yield KnownText(name, "licence", text, path.name)
                break


def _package_licences() -> list[Path]:
    """Licence files of installed Python packages."""
    found = []
    for package in importlib.metadata.distributions():
        files = package.files or ()
        found += [Path(str(file.locate())) for file in files if re.match(r"(?i)licen[cs]e", file.name)]
    return sorted(found)


def _from(path: Path, start: str) -> str | None:
    """A file's text from some words on, its white space as single spaces; ``None`` if it does not hold them."""
    try:
        text = path.read_text("utf-8", errors="ignore")
    except OSError:
        return None
    lines = [re.sub(r"^\s*\.?\s*$", "", line) for line in text.splitlines()]  # " ." is an empty line in these files
    text = " ".join(" ".join(lines).split())
    place = text.find(start)
    return text[place : place + 2000] if place >= 0 and len(text) - place >= 400 else None


def _passage(name: str, text: str) -> KnownText:
    """A built-in passage."""
    return KnownText(name, "public domain", " ".join(text.split()), "built in")


PUBLIC_DOMAIN = (
    _passage(
        "Constitution of the United States, preamble",
        """We the People of the United States, in Order to form a more perfect Union, establish Justice, insure
        domestic Tranquility, provide for the common defence, promote the general Welfare, and secure the Blessings of
        Liberty to ourselves and our Posterity, do ordain and establish this Constitution for the United States of
        America. All legislative Powers herein granted shall be vested in a Congress of the United States, which shall
        consist of a Senate and House of Representatives.""",
    ),
    _passage(
        "Declaration of Independence, opening",
        """When in the Course of human events, it becomes necessary for one people to dissolve the political bands which
        have connected them with another, and to assume among the powers of the earth, the separate and equal station to
        which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind requires
        that they should declare the causes which impel them to the separation.""",
    ),
    _passage(
        "Declaration of Independence, truths",
        """We hold these truths to be self-evident, that all men are created equal, that they are endowed by their
        Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness. That
        to secure these rights, Governments are instituted among Men, deriving their just powers from the consent of the
        governed, That whenever any Form of Government becomes destructive of these ends, it is the Right of the People
        to alter or to abolish it.""",
    ),
    _passage(
        "Gettysburg Address",
        """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in
        Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil
        war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a
        great battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for
        those who here gave their lives that that nation might live.""",
    ),
    _passage(
        "First Amendment",
        """Congress shall make no law respecting an establishment of religion, or prohibiting the free exercise thereof;
        or abridging the freedom of speech, or of the press; or the right of the people peaceably to assemble, and to
        petition the Government for a redress of grievances. A well regulated Militia, being necessary to the security
        of a free State, the right of the people to keep and bear Arms, shall not be infringed.""",
    ),
    _passage(
        "Genesis 1 (King James Version)",
        """In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness
        was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there
        be light: and there was light. And God saw the light, that it was good: and God divided the light from the
        darkness. And God called the light Day, and the darkness he called Night. And the evening and the morning were
        the first day.""",
    ),
    _passage(
        "Psalm 23 (King James Version)",
        """The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside
        the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Yea,
        though I walk through the valley of the shadow of death, I will fear no evil: for thou art with me; thy rod and
        thy staff they comfort me. Thou preparest a table before me in the presence of mine enemies.""",
    ),
    _passage(
        "Hamlet's soliloquy",
        """To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings and arrows of
        outrageous fortune, Or to take arms against a sea of troubles And by opposing end them. To die: to sleep; No
        more; and by a sleep to say we end The heart-ache and the thousand natural shocks That flesh is heir to, 'tis a
        consummation Devoutly to be wish'd.""",
    ),
    _passage(
        "A Tale of Two Cities, opening",
        """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
        it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of
        Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing
        before us, we were all going direct to Heaven, we were all going direct the other way.""",
    ),
    _passage(
        "Pride and Prejudice, opening",
        """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of
        a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood,
        this truth is so well fixed in the minds of the surrounding families, that he is considered the rightful
        property of some one or other of their daughters.""",
    ),
    _passage(
        "Alice's Adventures in Wonderland, opening",
        """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once
        or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it,
        "and what is the use of a book," thought Alice "without pictures or conversations?" So she was considering in
        her own mind (as well as she could, for the hot day made her feel very sleepy and stupid)""",
    ),
    _passage(
        "Moby-Dick, opening",
        """Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, and
        nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of
        the world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself
        growing grim about the mouth; whenever it is a damp, drizzly November in my soul""",
    ),
    _passage(
        "digits of pi",
        """3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808
        6513282306647093844609550582231725359408128481117450284102701938521105559644622948954930381964428810975665933446
        128475648233786783165271201909145648566923460348610454326648213393607260249141273724587006606315588""".replace(
            "\n", ""
        ).replace(" ", ""),
    ),
)
"""Passages that everybody may quote."""
