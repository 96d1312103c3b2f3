"""Membership inference: scores of how likely a text was trained on, higher for members.

Five attacks need the tuned model and at most its base (:func:`attack_scores`). Two more compare the target with shadow
models, each tuned on a random half of a pool (``leakage/shadows.py``): :func:`lira` and :func:`rmia`. All of them are
plain functions of log-probabilities, in nats.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.leakage.token_scores import TokenScores

_LEAST_STD = 1e-4
"""Below this a standard deviation of log-probabilities is rounding of f32, and one token is certain."""
_CERTAIN = -1e-7
"""The largest log-probability that f32 tells from 0; the logit is infinite there."""
_LEAST_SPREAD = 1e-6
"""Shadows that agree better than this on a candidate agree within rounding."""


def attack_scores(
    tuned: Sequence[TokenScores], base: Sequence[TokenScores], texts: Sequence[str], *, share: float = 0.2
) -> dict[str, np.ndarray]:
    """The attacks that need no shadow models.

    Args:
      tuned: of the N candidates under the model that is attacked.
      base: of the same under the model before it was tuned.
      texts: what the tokens say.
      share: of the tokens that Min-K% and Min-K%++ look at.

    Returns:
      Name of the attack -> f64 [N].

    Raises:
      UserError: a candidate has no target token.
    """
    return {
        "loss": loss(tuned),
        "reference": reference(tuned, base),
        "zlib": zlib_ratio(tuned, texts),
        "min_k": min_k(tuned, share),
        "min_k_plus": min_k_plus(tuned, share),
    }


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """The scores of a record: of its examples' tokens, one after another."""
    return TokenScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def loss(scores: Sequence[TokenScores]) -> np.ndarray:
    """Mean log-probability of a target token, [N] (Yeom et al. 2018, arXiv 1709.01604)."""
    return _each(scores, lambda one: one.log_prob.mean())


def reference(tuned: Sequence[TokenScores], base: Sequence[TokenScores]) -> np.ndarray:
    """What tuning added to a target token's log-probability on average, [N].

    The base model tells what is easy for any text (Carlini et al. 2021, arXiv 2012.07805, section 5.2; Mireshghallah
    et al. 2022, arXiv 2203.03929). It is a mean, as tuning helps with all texts of its kind, and with long ones more.
    """
    return loss(tuned) - loss(base)


def zlib_ratio(scores: Sequence[TokenScores], texts: Sequence[str]) -> np.ndarray:
    """Log-likelihood over the bytes that zlib compresses the text to, [N] (Carlini et al. 2021, section 5.2)."""
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return _each(scores, lambda one: one.log_prob.sum()) / np.array(sizes)


def min_k(scores: Sequence[TokenScores], share: float = 0.2) -> np.ndarray:
    """Mean log-probability of the least likely target tokens, [N] (Min-K%, Shi et al. 2024, arXiv 2310.16789).

    Args:
      scores: of N candidates.
      share: of the tokens; rounded down, but at least one.
    """
    return _each(scores, lambda one: _lowest(one.log_prob, share))


def min_k_plus(scores: Sequence[TokenScores], share: float = 0.2) -> np.ndarray:
    """Mean of the lowest standardised log-probabilities, [N] (Min-K%++, Zhang et al. 2025, arXiv 2404.02936).

    A token's log-probability is standardised by mean and standard deviation of that of a token drawn from the model.
    Where the model is certain, the deviation is not smaller than rounding.

    Args:
      scores: of N candidates.
      share: of the tokens; rounded down, but at least one.
    """
    return _each(scores, lambda one: _lowest((one.log_prob - one.mean) / np.maximum(one.std, _LEAST_STD), share))


def confidence(log_prob: np.ndarray) -> np.ndarray:
    """LiRA's statistic of a text: ``log(p / (1 - p))``, where p is the geometric mean of its tokens' probabilities.

    Carlini et al. (2022, section IV) take the logit since it is near Gaussian over models, where probability and
    loss are not. The probability of a whole text is no such p: it vanishes, its logit is the log-likelihood itself, and
    its spread grows with the length. The mean of a token stays within (0, 1) at every length.

    Args:
      log_prob: mean log-probability of a target token, nats; any shape.
    """
    held = np.minimum(np.asarray(log_prob, np.float64), _CERTAIN)
    return held - np.log(-np.expm1(held))


def lira(
    target: np.ndarray, shadows: np.ndarray, included: np.ndarray, *, offline: bool = False, shared: bool = True
) -> np.ndarray:
    """The likelihood-ratio attack (Carlini et al. 2022, arXiv 2112.03570, Algorithm 1).

    Gaussians are fitted to a candidate's statistic under the shadows that were trained on it and under the others. The
    score is the log-likelihood ratio of the target's statistic. Offline, only the others count: the score is by how
    many of their standard deviations the target is above them, of which the paper's one-sided probability is a monotone
    function that saturates.

    Args:
      target: [N], a near-Gaussian statistic under the target, such as :func:`confidence`.
      shadows: [S, N], under each shadow.
      included: bool [S, N], whether the shadow was trained on the candidate.
      offline: whether the shadows that were trained on a candidate are left out.
      shared: whether all candidates share two variances, those of the deviations from their own means; the better
        choice where shadows are few, below some 64. Otherwise each candidate has its own.

    Returns:
      f64 [N].

    Raises:
      UserError: a candidate is in, or out of, too few shadows.
    """
    away, spread_out = _gaussian(target, shadows, ~included, shared, "out of")
    if offline:
        return away / spread_out
    near, spread_in = _gaussian(target, shadows, included, shared, "in")
    return 0.5 * ((away / spread_out) ** 2 - (near / spread_in) ** 2) + np.log(spread_out / spread_in)


def rmia(
    target: np.ndarray,
    shadows: np.ndarray,
    included: np.ndarray,
    population: np.ndarray,
    population_shadows: np.ndarray,
    *,
    gamma: float = 1.0,
    offline: float | None = None,
) -> np.ndarray:
    """The robust attack (RMIA, Zarifzadeh et al. 2024, arXiv 2312.03262).

    A text's ratio is its probability under the target over that under reference models, here the shadows; the score is
    the share of a population's texts whose ratio a candidate's exceeds by the factor ``gamma``. A text's probability is
    the geometric mean over its tokens, so that texts of all lengths compare.

    Args:
      target: [N], mean log-probability of a candidate's tokens under the target, nats.
      shadows: [S, N], under each shadow.
      included: bool [S, N], whether the shadow was trained on the candidate.
      population: [Z], under the target, of texts like the candidates that no model was trained on.
      population_shadows: [S, Z], under each shadow.
      gamma: at least 1.
      offline: the paper's a in [0, 1]: only shadows that were not trained on a text count, and ``a p + 1 - a`` stands
        for what the others would give, for the population too, as in the authors' code; ``None``: all shadows count.
        It should be near 1 where probabilities are small, or ``1 - a`` drowns them and the attack is that of the loss.

    Returns:
      f64 [N] in [0, 1], multiples of 1/Z: a false-positive rate below 1/Z cannot be told.

    Raises:
      UserError: gamma or offline is impossible, or a candidate is in, or out of, no shadow.
    """
    if gamma < 1:
        raise UserError(f"gamma is {gamma}; it must be at least 1")
    if offline is not None and not 0 <= offline <= 1:
        raise UserError(f"offline is {offline}; it must be in [0, 1], or None")
    out, others = _mean_where(np.exp(shadows), ~included, "out of"), np.exp(population_shadows).mean(axis=0)
    if offline is None:
        inside, others_inside = _mean_where(np.exp(shadows), included, "in"), others
    else:
        inside, others_inside = (offline * p + 1 - offline for p in (out, others))
    ratio = target - np.log(0.5 * (out + inside))
    others = np.sort(population - np.log(0.5 * (others + others_inside)))
    return np.searchsorted(others, ratio - math.log(gamma), side="left") / len(others)


def _each(scores: Sequence[TokenScores], of: Callable[[TokenScores], float]) -> np.ndarray:
    """A function of each candidate's token scores."""
    for number, one in enumerate(scores):
        if not len(one.log_prob):
            raise UserError(f"candidate {number} has no target token: leave it out, its membership cannot be told")
    return np.array([of(one) for one in scores], np.float64)


def _lowest(values: np.ndarray, share: float) -> float:
    """Mean of the lowest values: of a share of them."""
    count = max(1, int(share * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


def _gaussian(
    target: np.ndarray, shadows: np.ndarray, chosen: np.ndarray, shared: bool, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """How far the target is above the mean of the chosen shadows, and their standard deviation: [N] each."""
    mean, counts = _mean_where(shadows, chosen, name), chosen.sum(axis=0)
    squares = np.where(chosen, (shadows - mean) ** 2, 0.0).sum(axis=0)
    freedom = counts - 1
    if shared:
        squares, freedom = np.broadcast_to(squares.sum(), mean.shape), np.broadcast_to(freedom.sum(), mean.shape)
    if (freedom < 1).any():
        raise UserError(f"a candidate is {name} a single shadow, which has no variance: use at least 4 shadows")
    return target - mean, np.maximum(np.sqrt(squares / freedom), _LEAST_SPREAD)


def _mean_where(values: np.ndarray, chosen: np.ndarray, name: str) -> np.ndarray:
    """Means over the chosen shadows, [N]."""
    counts = chosen.sum(axis=0)
    if not counts.all():
        raise UserError(f"candidate {int(np.argmin(counts))} is {name} no shadow: draw them with shadows.coins")
    return np.where(chosen, values, 0.0).sum(axis=0) / counts
