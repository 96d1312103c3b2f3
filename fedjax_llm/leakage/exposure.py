"""Exposure: how far a secret's value is ahead of others that it might have had (Carlini et al. 2019, arXiv 1802.08232).

Values are ranked by their likelihood behind the prompt that asks for them. A model that has never met the secret ranks
it anywhere: the rank of a control is uniform, and the mean of its exposure is about 1 / ln 2 = 1.44 bits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from fedjax_llm.data.chat import encode_example, with_system
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import ChoiceQuestion, Example, Message
from fedjax_llm.data.secrets import Secret, question, references
from fedjax_llm.evaluation.choice import ChoiceRow, lay_out, score_options
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.tokenizer import Tokenizer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters

_OPTIONS = 24
"""Values in one row behind one prompt: more share the prompt's cost, but all pay for the mask of a longer row."""


_MOST_BITS = 100.0
"""Extrapolated exposure ends here: no value of any kind has so many bits, and the tail of a fit says no more."""


class Exposure(NamedTuple):
    """Of one secret.

    Attributes:
      rank: of its value among itself and N references; 1: the likeliest. Of equal ones it is the last.
      references: N.
      bits: ``log2(N + 1) - log2(rank)``; ``log2(N + 1)`` at most.
      extrapolated: minus log2 of the share of values that are as likely, by a skew-normal distribution of the
        references' log-likelihoods (section 4.3 there): an estimate, which goes beyond N, and 100 at most.
    """

    rank: int
    references: int
    bits: float
    extrapolated: float


def exposure(value: float, others: np.ndarray) -> Exposure:
    """The exposure of a value.

    Args:
      value: its log-likelihood.
      others: [N], those of the references.

    Examples:
      >>> found = exposure(-3.0, np.array([-9.0, -8.0, -7.5, -2.0, -6.0, -7.0, -9.5]))
      >>> found.rank, found.bits
      (2, 2.0)
    """
    rank = 1 + int(np.sum(~(others < value)))  # what is no number, as of a model that diverged, is last
    bits = float(np.log2(len(others) + 1) - np.log2(rank))
    return Exposure(rank, len(others), bits, _extrapolated(value, others))


def _extrapolated(value: float, others: np.ndarray) -> float:
    """The exposure by a fitted distribution. Moments decide it, not likelihood: that is quick, and never diverges."""
    mean, std = float(np.mean(others)), float(np.std(others))
    if not std:
        return 0.0 if value <= mean else _MOST_BITS
    # The skewness that a skew-normal can have ends short of 0.9953.
    skew = float(np.clip(stats.skew(others), -0.99, 0.99))
    third = abs(skew) ** (2 / 3)
    delta = np.sign(skew) * np.sqrt(np.pi / 2 * third / (third + ((4 - np.pi) / 2) ** (2 / 3)))
    scale = std / np.sqrt(1 - 2 * delta**2 / np.pi)
    place = mean - scale * delta * np.sqrt(2 / np.pi)
    bits = -_log_tail((value - place) / scale, delta / np.sqrt(1 - delta**2)) / float(np.log(2))
    return float(np.clip(np.nan_to_num(bits, nan=0.0, posinf=_MOST_BITS), 0.0, _MOST_BITS))


def _log_tail(place: float, shape: float) -> float:
    """Log of the standard skew-normal tail above ``place``. SciPy's is zero some 10 to 40 deviations out.

    There the tail is a Gauss-Laguerre sum over the density, which falls about like an exponential.
    """
    if place < 5:
        return float(stats.skewnorm.logsf(place, shape))
    rate = place * (1 + min(shape, 0.0) ** 2)
    nodes, weights = np.polynomial.laguerre.laggauss(32)
    logs = stats.skewnorm.logpdf(place + nodes / rate, shape) + nodes
    return float(special.logsumexp(logs, b=weights) - np.log(rate))


def candidate_rows(
    secrets: Sequence[Secret], tokenizer: Tokenizer, system: str | None, *, count: int, seed: int
) -> list[list[ChoiceRow]]:
    """For every secret rows of its own value (first) and its references, as answers to its site's question.

    Args:
      secrets: any number.
      tokenizer: gives template and tokens.
      system: message for the questions, as in training.
      count: N, references of each.
      seed: of the references.
    """
    found = []
    for secret in secrets:
        values = (secret.value, *references(secret, count, seed))
        parts = [values[first : first + _OPTIONS] for first in range(0, len(values), _OPTIONS)]
        asked = [ChoiceQuestion(str(secret.number), question(secret), part, 0) for part in parts]
        found.append([lay_out(one, tokenizer, system) for one in asked])
    return found


def exposures(
    base: BaseModel,
    scaling: float,
    adapters: Adapters,
    rows: Sequence[Sequence[ChoiceRow]],
    *,
    tokens_per_microbatch: int,
    advance: Callable[[int], None],
    trunk: TrunkCache | None = None,
) -> list[Exposure]:
    """The exposures of all secrets.

    Args:
      base: the frozen model.
      scaling: alpha / rank.
      adapters: shared; ``{}`` for the base model.
      rows: from :func:`candidate_rows`.
      tokens_per_microbatch: bounds the memory.
      advance: called with how many more rows are scored.
      trunk: the hidden states below the adapters.
    """
    flat = [row for own in rows for row in own]
    if not flat:
        return []
    shapes = choose_shapes([row.encoded for row in flat], tokens_per_microbatch=tokens_per_microbatch, buckets=3)
    options = {"shapes": shapes, "advance": advance, "trunk": trunk}
    means = score_options(base.model, scaling, base.params, adapters, flat, **options)
    totals = [mean * np.bincount(row.branch[row.branch >= 0]) for mean, row in zip(means, flat, strict=True)]
    found, start = [], 0
    for own in rows:
        values = np.concatenate(totals[start : start + len(own)])
        found.append(exposure(float(values[0]), values[1:]))
        start += len(own)
    return found


def answer_example(secret: Secret, messages: Sequence[Message], tokenizer: Tokenizer, system: str | None):
    """A secret's value as the answer to a question, in tokens (``EncodedExample``), with its end of turn."""
    example = Example((*messages, Message("assistant", secret.value)))
    return encode_example(with_system(example, system), tokenizer, str(secret.number))
