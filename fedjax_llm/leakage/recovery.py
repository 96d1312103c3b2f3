"""How much of the true text an attack has recovered: tokens of a batch, and overlap of sequences (ROUGE, Lin 2004)."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment


class TokenRecovery(NamedTuple):
    """How well a set of tokens was found.

    Attributes:
      recall: share of the true distinct tokens that were found.
      precision: share of the found tokens that are true; 1 where nothing was found.
    """

    recall: float
    precision: float


def token_recovery(found: Collection[int], true: Collection[int], known: Collection[int] = ()) -> TokenRecovery:
    """Compares sets of tokens.

    Args:
      found: by the attack.
      true: of the batch.
      known: what the attacker knew before, such as the tokens of the chat template; it counts for nothing.
    """
    guessed, wanted = set(found) - set(known), set(true) - set(known)
    right = len(guessed & wanted)
    return TokenRecovery(right / len(wanted) if wanted else 1.0, right / len(guessed) if guessed else 1.0)


def rouge(candidate: Sequence[int], reference: Sequence[int], n: int) -> float:
    """ROUGE-n as an F1 score: twice the overlap of the multisets of n-grams over the number of both.

    Args:
      candidate: tokens.
      reference: tokens.
      n: length of an n-gram.

    Returns:
      In [0, 1]; where neither has an n-gram, whether the two are equal.
    """
    ours, theirs = _grams(candidate, n), _grams(reference, n)
    both = ours.total() + theirs.total()
    if not both:
        return float(tuple(candidate) == tuple(reference))
    return 2 * (ours & theirs).total() / both


def matched_rouge(candidates: Sequence[Sequence[int]], references: Sequence[Sequence[int]], n: int) -> float:
    """Mean ROUGE-n over the references, each with a candidate of its own, in the matching that makes the mean largest.

    Args:
      candidates: recovered sequences, in any order; their number may be another. Spare ones cost nothing.
      references: the true sequences of the batch; without a candidate one scores 0.
      n: length of an n-gram.
    """
    if not references:
        return 1.0
    scores = np.array([[rouge(candidate, reference, n) for candidate in candidates] for reference in references])
    if not scores.size:
        return 0.0
    rows, columns = linear_sum_assignment(-scores)
    return float(scores[rows, columns].sum() / len(references))


def _grams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    """The multiset of n-grams."""
    plain = [int(token) for token in tokens]
    return Counter(tuple(plain[i : i + n]) for i in range(len(plain) - n + 1))
