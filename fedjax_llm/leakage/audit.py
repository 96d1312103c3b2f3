"""Audits: from the scores of canaries to what they show of epsilon.

A canary is a unit of which the auditor knows, by a fair coin of its own, whether it was in the data; its score is the
larger, the more the release looks as if it was. Lower bounds hold with a stated confidence, whatever the scores are. An
estimate is no bound: it says what epsilon would be if the canaries were the worst case, and scores were Gaussian.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, inf, log, sqrt

import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor, Explicit, Split
from scipy.special import ndtr

from fedjax_llm.errors import UserError

CONTRADICTED = 3
"""The exit status of a command whose audit has shown more than is claimed."""
_HALVINGS = 5
"""How often the number of guesses is halved: from a half of the canaries to one in 32."""
_LARGEST = 200.0
"""Epsilons above this are all the same to anybody."""


@dataclass(frozen=True)
class Bound:
    """What an audit shows of epsilon.

    Attributes:
      method: how it was found.
      epsilon: the lower bound; or, where ``confidence`` is ``None``, an estimate.
      delta: for which it holds.
      confidence: with which probability at least the true epsilon is no smaller; ``None``: it is an estimate only.
      canaries: how many there were, in and out.
      assumes: what it rests on beside the mechanism's claim, as a sentence.
      details: further figures, by name.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float | None
    canaries: int
    assumes: str
    details: Mapping[str, float] = field(default_factory=dict)


def beats(bound: Bound, claim: float) -> bool:
    """Whether an audit contradicts a claim: a lower bound is above the claimed epsilon. No estimate contradicts one.

    Args:
      bound: at the delta of the claim.
      claim: the epsilon that is said to hold.
    """
    return bound.confidence is not None and bound.epsilon > claim


def one_run(in_scores: np.ndarray, out_scores: np.ndarray, *, significance: float, delta: float) -> Bound:
    """A lower bound from one run with many canaries (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, theorem 5.2).

    It guesses that the half of the canaries with the highest scores are in, or the best quarter, eighth, and so on, and
    asks how many such guesses (epsilon, delta)-privacy allows to be right. The best of these counts, each at an equal
    part of the significance. How many are guessed is fixed beforehand: a correction for those thresholds alone that
    look good in hindsight would promise too much.

    Args:
      in_scores: of the canaries that were in, [n].
      out_scores: of those that were not, [m - n].
      significance: probability with which the bound may exceed the true epsilon.
      delta: of the claim.

    Raises:
      UserError: there are no canaries on one side, a score is not finite, or a probability is none.
    """
    auditor = _auditor(in_scores, out_scores, significance, delta)
    epsilon = _best_of_ranks(auditor.epsilon_one_run, in_scores, out_scores, significance, delta)
    assumes = "every canary was in by a fair coin of its own"
    return _bound("one run", epsilon, in_scores, out_scores, significance, delta, assumes)


def most_shown(inside: int, outside: int, *, significance: float, delta: float) -> float:
    """The bound of :func:`one_run` if the scores told all canaries apart: a claim above it stands whatever is run.

    Args:
      inside: how many canaries are in.
      outside: how many are not.
      significance: as for :func:`one_run`.
      delta: of the claim.
    """
    scores = np.arange(inside + outside, dtype=np.float64)
    return one_run(scores[outside:], scores[:outside], significance=significance, delta=delta).epsilon


def one_run_gaussian(in_scores: np.ndarray, out_scores: np.ndarray, *, significance: float, delta: float) -> Bound:
    """A sharper bound from one run, of mechanisms that are Gaussian (Mahloujifar et al. 2024, arXiv 2410.22235).

    It contradicts a Gaussian trade-off between false alarms and misses, rather than (epsilon, delta) alone. A mechanism
    with another trade-off, as sampling makes one, may be private and yet be contradicted.

    Args:
      in_scores: of the canaries that were in, [n].
      out_scores: of those that were not, [m - n].
      significance: probability with which the bound may exceed the true epsilon of a Gaussian mechanism.
      delta: of the claim.

    Raises:
      UserError: as for :func:`one_run`.
    """
    auditor = _auditor(in_scores, out_scores, significance, delta)
    epsilon = _best_of_ranks(auditor.epsilon_one_run_fdp, in_scores, out_scores, significance, delta)
    assumes = "every canary was in by a fair coin of its own; the mechanism is Gaussian, without sampling"
    return _bound("one run, Gaussian trade-off", epsilon, in_scores, out_scores, significance, delta, assumes)


def clopper_pearson(in_scores: np.ndarray, out_scores: np.ndarray, *, significance: float, delta: float) -> Bound:
    """A lower bound from the rates of true and false guesses (Nasr et al. 2021, arXiv 2101.04535).

    One half of the canaries chooses the threshold, and the other half is guessed.

    Args:
      in_scores: of canaries that were in, [n].
      out_scores: of canaries that were not, [m - n].
      significance: probability with which the bound may exceed the true epsilon.
      delta: of the claim.

    Raises:
      UserError: as for :func:`one_run`.
    """
    auditor = _auditor(in_scores, out_scores, significance, delta)
    epsilon = auditor.epsilon_clopper_pearson(significance, delta, threshold_strategy=Split(0.5, seed=0))
    assumes = "scores are independent, as those of canaries in runs of their own are"
    return _bound("true and false guesses", epsilon, in_scores, out_scores, significance, delta, assumes)


def canary_clients(cosines: np.ndarray, dimension: int, *, delta: float) -> Bound:
    """An estimate of epsilon from one run, with canaries in random directions (Andrew et al. 2024, arXiv 2302.03098).

    The cosines of the release with the directions of canaries that were in are taken to be N(mu, s^2), fitted; with
    directions that had nothing to do with it they would be N(0, 1/d). Epsilon is that of telling the two apart. Small
    errors of s weigh much where epsilon is small; ``details`` has what comes out with s^2 = 1/d, too.

    Args:
      cosines: of the canaries that were in, [n]; many, but far fewer than ``dimension``.
      dimension: d, how many numbers are released.
      delta: of the estimate.

    Raises:
      UserError: there are fewer than two cosines, or they are not in [-1, 1].
    """
    cosines = np.asarray(cosines, np.float64)
    if cosines.size < 2 or not np.all(np.abs(cosines) <= 1 + 1e-6):
        raise UserError(f"{cosines.size} cosines were given; the estimate needs two or more, in [-1, 1]")
    mean, spread = float(cosines.mean()), float(cosines.std(ddof=1))
    epsilon = gaussian_epsilon(max(mean, 0.0) * sqrt(dimension), spread * sqrt(dimension), delta)
    plain = gaussian_epsilon(max(mean, 0.0) * sqrt(dimension), 1.0, delta)
    details = {"mean cosine": mean, "deviation": spread, "dimension": float(dimension), "with deviation of d": plain}
    assumes = "cosines are Gaussian, and random directions the worst case: an estimate, not a bound"
    return Bound("canary directions", epsilon, delta, None, cosines.size, assumes, details)


def gaussian_epsilon(mean: float, deviation: float, delta: float) -> float:
    """The least epsilon for which N(mean, deviation^2) and N(0, 1) are (epsilon, delta)-indistinguishable.

    That is, both of their hockey-stick divergences are at most delta (Balle and Wang 2018, arXiv 1805.06530, for
    variances that may differ). At most 200 is told.

    Args:
      mean: of the one.
      deviation: of the one, positive.
      delta: of the claim.
    """

    def excess(epsilon: float) -> float:
        there = hockey_stick(mean, deviation, epsilon)
        back = hockey_stick(mean / deviation, 1 / deviation, epsilon)  # N(0, 1) against it, after an affine map
        return max(there, back) - delta

    if excess(0.0) <= 0:
        return 0.0
    if excess(_LARGEST) > 0:
        return _LARGEST
    low, high = 0.0, _LARGEST
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def hockey_stick(mean: float, deviation: float, epsilon: float) -> float:
    """P(A) - e^epsilon Q(A) for P = N(mean, deviation^2), Q = N(0, 1), and the event A that makes it largest.

    Args:
      mean: of P.
      deviation: of P, positive.
      epsilon: not negative.
    """
    # The logarithm of p / q is a x^2 + b x + c; A is where it is above epsilon.
    a, b = 0.5 * (1 - deviation**-2), mean * deviation**-2
    c = -log(deviation) - 0.5 * (mean / deviation) ** 2 - epsilon
    if abs(a) < 1e-9:
        edges = [(-c / b, inf)] if b > 0 else [(-inf, -c / b)] if b < 0 else [(-inf, inf)] if c > 0 else []
    elif b * b - 4 * a * c <= 0:
        edges = [(-inf, inf)] if a > 0 else []
    else:
        root = sqrt(b * b - 4 * a * c)
        low, high = sorted(((-b - root) / (2 * a), (-b + root) / (2 * a)))
        edges = [(-inf, low), (high, inf)] if a > 0 else [(low, high)]
    under_p = sum(_mass((low - mean) / deviation, (high - mean) / deviation) for low, high in edges)
    under_q = sum(_mass(low, high) for low, high in edges)
    return max(0.0, under_p - exp(epsilon) * under_q)


def _mass(low: float, high: float) -> float:
    """The probability of an interval under N(0, 1), without cancellation in the tails."""
    if low > 0:
        low, high = -high, -low
    return float(ndtr(high) - ndtr(low))


def _best_of_ranks(
    method: Callable[..., float], in_scores: np.ndarray, out_scores: np.ndarray, significance: float, delta: float
) -> float:
    """The largest bound of those from guessing the best half, quarter, eighth, ... of all scores to be in."""
    every = np.sort(np.concatenate([in_scores, out_scores]).astype(np.float64))[::-1]
    guesses = [len(every) >> halvings for halvings in range(1, _HALVINGS + 1) if len(every) >> halvings]
    each = significance / max(1, len(guesses))
    return max((method(each, delta, threshold_strategy=Explicit(every[r - 1])) for r in guesses), default=0.0)


def _auditor(in_scores: np.ndarray, out_scores: np.ndarray, significance: float, delta: float) -> CanaryScoreAuditor:
    """The scores, checked."""
    inside, outside = np.asarray(in_scores, np.float64), np.asarray(out_scores, np.float64)
    if not (inside.size and outside.size):
        raise UserError(
            f"{inside.size} canaries were in and {outside.size} were not: an audit needs both; use more canaries"
        )
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise UserError("a canary's score is not finite; an audit compares numbers")
    for name, value in (("significance", significance), ("delta", delta)):
        if not 0 < value < 0.5:
            raise UserError(f"{name} is {value}; it must be between 0 and 0.5")
    return CanaryScoreAuditor(inside, outside)


def _bound(
    method: str,
    epsilon: float,
    in_scores: np.ndarray,
    out_scores: np.ndarray,
    significance: float,
    delta: float,
    assumes: str,
) -> Bound:
    """A lower bound on epsilon."""
    details = {"in": float(len(in_scores)), "out": float(len(out_scores))}
    canaries = len(in_scores) + len(out_scores)
    return Bound(method, float(epsilon), delta, 1 - significance, canaries, assumes, details)
