"""Label flipping (Tolpegin et al. 2020, arXiv 2007.08432): malicious sites train on wrong answers.

The paper turns one class into another. Free text has no classes, so a site's own answers are dealt out among its
questions: well-formed answers, each to another question. Otherwise the site trains and sends as the others do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedjax_llm.adversaries.attack import Attack
from fedjax_llm.data.records import Example, Record


@dataclass(frozen=True)
class LabelFlip:
    """Malicious sites' answers are dealt out anew, so that no example keeps the answer that it had."""

    def make(self) -> Attack:
        """The attack on records. A site with one answer alone stays as it is."""
        return Attack(poison=_poison)


def _poison(records: Sequence[Record], rng: np.random.Generator) -> tuple[Record, ...]:
    """The records with their examples' answers dealt out."""
    answers = iter(_dealt([example.messages[-1].content for record in records for example in record.examples], rng))

    def wrong(example: Example) -> Example:
        return Example((*example.messages[:-1], replace(example.messages[-1], content=next(answers))))

    return tuple(replace(record, examples=tuple(map(wrong, record.examples))) for record in records)


def _dealt(answers: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The answers in an order in which none is where it was, nor one of the same text, if there are two texts.

    As often as before each; only where one text is more than half of them, others stand in for what is left of it.
    """
    found, counts = list(answers), Counter(answers)
    if len(counts) < 2:
        return found
    rank = dict(zip(counts, rng.permutation(len(counts)), strict=True))
    grouped = sorted(rng.permutation(len(answers)), key=lambda place: rank[answers[place]])
    # With equal texts side by side, a turn by the longest run takes each of them past its own run, and not around.
    turn = max(counts.values())
    for number, place in enumerate(grouped):
        found[place] = answers[grouped[(number + turn) % len(grouped)]]
    for place, answer in enumerate(answers):
        if found[place] == answer:
            others = [other for other in answers if other != answer]
            found[place] = others[rng.integers(len(others))]
    return found
