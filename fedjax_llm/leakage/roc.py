"""How well scores tell members from others: the ROC curve, its area, and what it gives at few false positives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.errors import UserError


class Rate(NamedTuple):
    """The true-positive rate where few non-members pass for members.

    Attributes:
      tpr: share of the members above the threshold.
      low: lower end of its Clopper-Pearson interval, over the draw of the members; the threshold is given.
      high: upper end.
      allowed: how many non-members may be above the threshold. At 0 there are too few of them to measure the rate that
        was asked for, and this is the rate at no false positive.
    """

    tpr: float
    low: float
    high: float
    allowed: int


@dataclass(frozen=True, eq=False)
class Roc:
    """An attack's ROC curve.

    Attributes:
      name: of the attack.
      auc: probability that a member scores above a non-member; ties count as half.
      auc_low: lower end of its interval.
      auc_high: upper end.
      tpr_at: false-positive rate -> what is found there.
      fpr: f64 [P], ascending from 0 to 1: false-positive rates of all thresholds, from the highest.
      tpr: f64 [P], true-positive rates of the same.
      members: how many.
      non_members: how many.
    """

    name: str
    auc: float
    auc_low: float
    auc_high: float
    tpr_at: Mapping[float, Rate]
    fpr: np.ndarray
    tpr: np.ndarray
    members: int
    non_members: int

    def label(self, fpr: float) -> str:
        """What ``tpr_at[fpr]`` is, for people."""
        if self.tpr_at[fpr].allowed:
            return f"TPR at {100 * fpr:g}% FPR"
        return f"TPR with none of {self.non_members} non-members above"

    def to_json(self) -> dict[str, Any]:
        """Everything in plain values; rates are keyed by the false-positive rate as text."""
        return {
            "name": self.name,
            "auc": self.auc,
            "auc_low": self.auc_low,
            "auc_high": self.auc_high,
            "tpr_at": {str(fpr): rate._asdict() | {"label": self.label(fpr)} for fpr, rate in self.tpr_at.items()},
            "fpr": self.fpr.tolist(),
            "tpr": self.tpr.tolist(),
            "members": self.members,
            "non_members": self.non_members,
        }


def roc(
    name: str,
    members: np.ndarray,
    non_members: np.ndarray,
    *,
    fprs: Sequence[float] = (0.01, 0.001),
    confidence: float = 0.95,
) -> Roc:
    """The ROC curve of an attack's scores, with intervals.

    Args:
      name: of the attack.
      members: [M], scores of members; higher means more likely a member.
      non_members: [N], scores of others.
      fprs: false-positive rates to give the true-positive rate at.
      confidence: of the intervals.

    Raises:
      UserError: fewer than two scores of a kind, a score that is not a number, or a rate outside [0, 1).
    """
    members, non_members = np.asarray(members, np.float64), np.asarray(non_members, np.float64)
    for kind, values in (("members", members), ("non-members", non_members)):
        if len(values) < 2:
            raise UserError(f"attack {name!r} has {len(values)} scores of {kind}; an ROC curve needs at least 2")
        if np.isnan(values).any():
            raise UserError(f"attack {name!r} gives {int(np.isnan(values).sum())} {kind} a score that is not a number")
    for fpr in fprs:
        if not 0 <= fpr < 1:
            raise UserError(f"fprs has {fpr}; a false-positive rate must be at least 0 and below 1")
    auc, low, high = _area(members, non_members, confidence)
    cuts = np.unique(np.concatenate([members, non_members]))
    return Roc(
        name, auc, low, high,
        tpr_at={fpr: _rate(members, non_members, fpr, confidence) for fpr in fprs},
        fpr=_exceed(non_members, cuts), tpr=_exceed(members, cuts),
        members=len(members), non_members=len(non_members),
    )  # fmt: skip


def _exceed(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Shares of values at or above no cut, the highest, ..., the lowest: [P + 1], from 0 to 1."""
    below = np.searchsorted(np.sort(values), cuts[::-1], side="left")
    return np.concatenate([[0.0], 1 - below / len(values)])


def _area(members: np.ndarray, non_members: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """The area under the curve and its interval.

    The variance is that of DeLong, DeLong and Clarke-Pearson (1988, Biometrics 44:837-845), taken to the logit
    scale by the delta method, so that the interval stays within (0, 1) (Pepe 2003, The Statistical
    Evaluation of Medical Tests, chapter 5). Where all members
    score above all non-members, the variance is zero and the interval comes from k = min(M, N) disjoint pairs, which
    are all in order with probability ``auc ** k``: ``[(alpha / 2) ** (1 / k), 1]``; likewise at 0.
    """
    of_member, of_other = _above(members, non_members), 1 - _above(non_members, members)
    auc, alpha = float(of_member.mean()), 1 - confidence
    edge = (alpha / 2) ** (1 / min(len(members), len(non_members)))
    if auc == 1:
        return auc, edge, 1.0
    if auc == 0:
        return auc, 0.0, 1 - edge
    variance = of_member.var(ddof=1) / len(members) + of_other.var(ddof=1) / len(non_members)
    half = NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(variance) / (auc * (1 - auc))
    logit = math.log(auc / (1 - auc))
    return auc, 1 / (1 + math.exp(half - logit)), 1 / (1 + math.exp(-half - logit))


def _above(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value, the share of the others that it exceeds; ties count as half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))


def _rate(members: np.ndarray, non_members: np.ndarray, fpr: float, confidence: float) -> Rate:
    """What exceeds the lowest threshold that at most ``fpr * N`` non-members exceed."""
    allowed = math.floor(fpr * len(non_members) + 1e-9)
    threshold = np.sort(non_members)[len(non_members) - 1 - allowed]
    found = int((members > threshold).sum())
    return Rate(found / len(members), *clopper_pearson(found, len(members), confidence), allowed)


def clopper_pearson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The exact interval of a proportion (Clopper and Pearson 1934, Biometrika 26:404-413).

    Args:
      successes: how many of
      trials: at least one.
      confidence: of the interval.

    Examples:
      >>> [round(end, 3) for end in clopper_pearson(0, 28, confidence=0.95)]
      [0.0, 0.123]
    """
    from scipy.special import betaincinv  # a second to import

    alpha = 1 - confidence
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, alpha / 2))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - alpha / 2))
    return low, high
