"""How much of a text a model gives back from its beginning: matches, similarity, and how many tries it would take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_llm.leakage.token_scores import TokenScores


@dataclass(frozen=True)
class Discoverable:
    """Whether a continuation is (n, p)-discoverable (Hayes et al. 2024, arXiv 2410.19482, definition 2).

    Attributes:
      log_probability: of the whole continuation under the sampler, nats.
      tries: by probability p, the least n of samples that contain the continuation with that probability at least:
        the n of ``1 - (1 - p_z)^n >= p``; infinite where no number of samples would.
    """

    log_probability: float
    tries: dict[float, float]


def greedy_prefix(scores: TokenScores) -> int:
    """How many tokens greedy decoding gives right before its first wrong one, from one forward pass.

    As long as all tokens before were right, the model has seen the true text: so the likeliest token after it is the
    one that greedy decoding would take.
    """
    wrong = np.flatnonzero(scores.log_prob < scores.best)
    return int(wrong[0]) if len(wrong) else len(scores.log_prob)


def discoverable(log_probs: np.ndarray, levels: Sequence[float] = (0.1, 0.5, 0.9)) -> Discoverable:
    """How many samples it takes to meet a continuation.

    Args:
      log_probs: f64 [T], of its tokens under the sampler (``TokenScores.log_prob``: sampling from all tokens at
        temperature 1); minus infinity where the sampler never gives a token.
      levels: the probabilities p.
    """
    total = float(np.sum(log_probs))
    return Discoverable(total, {level: tries(total, level) for level in levels})


def tries(log_probability: float, level: float) -> float:
    """The least n with ``1 - (1 - p_z)^n >= level``, at least 1; ``p_z`` may be far below the smallest float.

    Args:
      log_probability: log p_z, nats.
      level: p, above 0 and below 1.
    """
    probability = math.exp(log_probability)
    if probability >= level:
        return 1.0
    if log_probability == -math.inf:
        return math.inf
    if probability > 1e-12:
        return math.ceil(math.log1p(-level) / math.log1p(-probability) - 1e-9)
    exponent = math.log(-math.log1p(-level)) - log_probability  # log1p(-x) is -x here
    return math.exp(exponent) if exponent < 700 else math.inf


def common_prefix(made: Sequence[int], true: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for place, (one, other) in enumerate(zip(made, true, strict=False)):
        if one != other:
            return place
    return min(len(made), len(true))


def longest_match(made: Sequence[int], true: Sequence[int]) -> int:
    """Tokens of the longest run that stands in both, wherever."""
    one, other = np.asarray(made), np.asarray(true)
    best, ending = 0, np.zeros(len(other) + 1, np.int64)
    for token in one:
        following = np.zeros_like(ending)
        following[1:] = np.where(other == token, ending[:-1] + 1, 0)
        ending = following
        best = max(best, int(ending.max(initial=0)))
    return best


def edit_similarity(made: Sequence[int], true: Sequence[int]) -> float:
    """One minus Levenshtein's distance over the length of the longer, in tokens (or characters); 1 if both are empty.

    Lee et al. 2022 (arXiv 2107.06499) and Ippolito et al. 2023 (2210.17546) take this measure for near copies.
    """
    longer = max(len(made), len(true))
    if not longer:
        return 1.0
    one, other = np.asarray(made), np.asarray(true)
    steps = np.arange(len(other) + 1)
    row = steps.copy()
    for place in range(len(one)):
        changed = np.minimum(row[1:] + 1, row[:-1] + (other != one[place]))
        # An insertion takes the cell to the left: a running minimum of what is there, less the way to it.
        row = np.minimum.accumulate(np.concatenate([[place + 1], changed]) - steps) + steps
    return 1.0 - float(row[-1]) / longer


def sampled_log_probs(logits: np.ndarray, tokens: np.ndarray, top_k: int | None, temperature: float) -> np.ndarray:
    """Log-probabilities of tokens under a sampler of the ``top_k`` likeliest tokens at a temperature.

    Args:
      logits: [T, V].
      tokens: int [T].
      top_k: how many of the likeliest are sampled from; ``None``: all.
      temperature: the logits are divided by it.

    Returns:
      f64 [T]; minus infinity where the token is not among the ``top_k``.
    """
    scaled = np.asarray(logits, np.float64) / temperature
    chosen = scaled[np.arange(len(tokens)), tokens]
    if top_k is not None and top_k < scaled.shape[1]:
        least = -np.partition(-scaled, top_k - 1, axis=1)[:, top_k - 1]
        scaled = np.where(scaled >= least[:, None], scaled, -np.inf)
        chosen = np.where(chosen >= least, chosen, -np.inf)
    top = scaled.max(axis=1)
    return chosen - top - np.log(np.exp(scaled - top[:, None]).sum(axis=1))
