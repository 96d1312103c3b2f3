"""Fair four-option questions: definition -> name, with distractors that matching words cannot tell from the key.

With random distractors a guesser that knows nothing, but picks the option whose words stand in the definition, scores
far above chance. Here distractors are *matched*: their names are about as long as the key's, and two of the three (one
where there are no two) overlap the definition at least as much as the key does. What guessers still score is kept with
every question, to be published beside a model's accuracy.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_llm.data.records import ChoiceQuestion, Message

BLANK = "___"
OPTIONS = 4
LENGTHS = (0.7, 1.45)

_WORD = re.compile(r"[^\W\d_]{3,}")
_STOP_WORDS = frozenset(
    _WORD.findall(
        "about above after all also although among and another any are because been before being below between both "
        "but can could does due during each either for from had has have having her here his how into its itself less "
        "like may more most much must neither non nor not off one only onto other our out over own per same she should "
        "since some such than that the their them then there these they this those through thus too toward two under "
        "until upon use used very via was way were what when where whether which while who whom whose will with within "
        "without would you"
    )
)


@dataclass(frozen=True)
class Clue:
    """What a question is asked about: a record, its name (the key), and its definition with the name masked."""

    record_id: str
    name: str
    text: str


def stems(text: str) -> frozenset[str]:
    """The words that count for overlap: three letters or more, lower-cased, cut to six, stop words left out."""
    return frozenset(word[:6] for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS)


def overlap(option: str, text: str) -> float:
    """The share of an option's words that are found in a text, in [0, 1]; 0 for an option without words."""
    words = stems(option)
    return len(words & stems(text)) / len(words) if words else 0.0


def mask(text: str, names: Iterable[str]) -> str:
    """Replaces every name in a text by ``___``, longest names first, whole words only (a plural ``s`` goes too).

    Case is ignored, but not for abbreviations (up to three characters, or all in capitals): ``AS`` is not ``as``.
    """
    lowered = text.lower()
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        if len(name) < 2 or name.lower() not in lowered:
            continue
        exact = len(name) <= 3 or name.isupper()
        pattern = rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)"
        text = re.sub(pattern, BLANK, text, flags=re.NOFLAG if exact else re.IGNORECASE)
    return text


def guesses(options: Sequence[str], answer: int, text: str) -> dict[str, float]:
    """The expected scores of two guessers that know nothing: the option with most ``overlap``, and the ``longest``."""
    return {
        "overlap": _share_of_best([overlap(option, text) for option in options], answer),
        "longest": _share_of_best([len(option) for option in options], answer),
    }


def _share_of_best(scores: Sequence[float], answer: int) -> float:
    """The chance that a guesser who takes the best score, ties at random, takes ``answer``."""
    best = max(scores)
    return 1.0 / sum(score == best for score in scores) if scores[answer] == best else 0.0


def matched_questions(
    pool: Mapping[str, str],
    clues: Sequence[Clue],
    related: Callable[[str, str], bool],
    prompt: Callable[[str], tuple[Message, ...]],
    seed: int,
) -> tuple[ChoiceQuestion, ...]:
    """Makes one question for each clue that admits three matched distractors; the others are left out.

    A question is a function of its clue, the pool and the seed, whatever other clues are asked for and in whatever
    order the pool comes.

    Args:
      pool: name by record id: where distractors are drawn from.
      clues: what is asked.
      related: whether two records are the same, or one an ancestor of the other: such pairs are never options together.
      prompt: the messages for a clue's text.
      seed: decides distractors and the place of the key.
    """
    names = _Names(pool)
    questions = []
    for clue in clues:
        digest = hashlib.sha256(f"{seed}:{clue.record_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        distractors = _distractors(names, clue, related, rng)
        if distractors is None:
            continue
        answer = int(rng.integers(OPTIONS))
        options = (*distractors[:answer], clue.name, *distractors[answer:])
        scores = guesses(options, answer, clue.text)
        questions.append(ChoiceQuestion(clue.record_id, prompt(clue.text), options, answer, scores))
    return tuple(questions)


class _Names:
    """The pool's names with an index from word to name: a clue then meets only the names that share words with it."""

    def __init__(self, pool: Mapping[str, str]):
        self.ids = sorted(pool)
        self.names = [pool[key] for key in self.ids]
        self.lengths = np.array([len(name) for name in self.names])
        words = [stems(name) for name in self.names]
        self.counts = np.array([max(1, len(of_name)) for of_name in words])
        self.index: dict[str, list[int]] = {}
        for position, of_name in enumerate(words):
            for word in of_name:
                self.index.setdefault(word, []).append(position)

    def overlaps(self, text: str) -> np.ndarray:
        """``overlap(name, text)`` for every name of the pool."""
        found = np.zeros(len(self.names), np.int64)
        for word in stems(text):
            found[self.index.get(word, [])] += 1
        return found / self.counts


def _distractors(
    pool: _Names, clue: Clue, related: Callable[[str, str], bool], rng: np.random.Generator
) -> list[str] | None:
    """Three matched names in random order, or ``None`` where the pool does not hold them.

    Two that overlap at least as much as the key are preferred to one: "take the highest overlap" and "take the second
    highest" then both score less than they would (on the flashcards 0.28 and 0.39, where a fair coin between one and
    two gives 0.34 and 0.50).
    """
    low, high = (factor * len(clue.name) for factor in LENGTHS)
    fits = (pool.lengths >= low) & (pool.lengths <= high)
    at_least = pool.overlaps(clue.text) >= overlap(clue.name, clue.text)
    chosen: list[tuple[str, str]] = [(clue.record_id, clue.name)]

    def take(candidates: np.ndarray, count: int) -> int:
        """Adds up to ``count`` candidates that may stand beside those chosen; says how many it added."""
        before = len(chosen)
        for position in rng.permutation(candidates):
            if len(chosen) - before == count:
                break
            one, name = pool.ids[position], pool.names[position]
            if not any(related(one, other) or name.lower() == taken.lower() for other, taken in chosen):
                chosen.append((one, name))
        return len(chosen) - before

    taken = take(np.flatnonzero(fits & at_least), 2)
    if not taken or take(np.flatnonzero(fits & ~at_least), OPTIONS - 1 - taken) < OPTIONS - 1 - taken:
        return None
    distractors = [name for _, name in chosen[1:]]
    return [distractors[position] for position in rng.permutation(OPTIONS - 1)]
