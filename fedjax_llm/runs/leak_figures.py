"""From the figures of single secrets and attacks to what tables and plots show: means and shares, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from fedjax_llm.leakage.roc import clopper_pearson

_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """Value and interval with so many decimals."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Leak(NamedTuple):
    """What became of secrets that were stated equally often.

    Attributes:
      repetitions: how often each was stated; 0: controls.
      secrets: how many there are, over all models that are taken together.
      exposure: mean bits among the references; ``None`` where it was not measured.
      extrapolated: median of the extrapolated bits.
      greedy: share that greedy decoding gives in full from the site's question.
      foreign: the same from somebody else's question.
      beam: share that is among the beams from either question; ``None`` where no beams were made.
      tries: median number of samples that would contain the value with probability 1/2.
    """

    repetitions: int
    secrets: int
    exposure: Estimate | None
    extrapolated: float | None
    greedy: Estimate
    foreign: Estimate
    beam: Estimate | None
    tries: float

    def point(self, estimate: Estimate) -> tuple[float, float, float, float]:
        """An estimate of this row as a plot takes it."""
        return (self.repetitions, estimate.value, estimate.low, estimate.high)


def extracted(secret: Mapping[str, Any], name: str = "greedy") -> bool:
    """Whether greedy decoding gives the whole value; whether it then ends the turn does not matter."""
    return secret[name] >= secret["tokens"] - 1


def by_repetitions(secrets: Sequence[Mapping[str, Any]]) -> list[Leak]:
    """What became of the secrets that were planted without coins, and of their controls (first).

    Args:
      secrets: from ``leakage.json``, of one model or of several.
    """
    exact = [one for one in secrets if not one["coin"]]
    groups = {count: [one for one in exact if one["repetitions"] == count] for count in _counts(exact)}
    return [_leak(count, own) for count, own in groups.items()]


def _counts(secrets: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of repetitions that there are."""
    return sorted({one["repetitions"] for one in secrets})


def _leak(count: int, own: Sequence[Mapping[str, Any]]) -> Leak:
    """One row."""
    ranked = [one for one in own if one["exposure"] is not None]
    beams = [one for one in own if count and ("beam" in one)]
    return Leak(
        repetitions=count,
        secrets=len(own),
        exposure=mean_of([one["exposure"] for one in ranked]) if ranked else None,
        extrapolated=float(np.median([one["extrapolated_exposure"] for one in ranked])) if ranked else None,
        greedy=share_of([extracted(one) for one in own]),
        foreign=share_of([extracted(one, "foreign_greedy") for one in own]),
        beam=share_of([bool(one["beam"] or one["foreign_beam"]) for one in beams]) if beams else None,
        tries=float(np.median([one["tries"] for one in own])),
    )


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean, with a bootstrap interval over the values (percentiles; a seed of its own)."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high))


def share_of(hits: Sequence[bool]) -> Estimate:
    """The share of hits, with Clopper and Pearson's interval."""
    count, total = sum(hits), len(hits)
    return Estimate(count / total, *clopper_pearson(count, total, 0.95))


def area_of(curve: Mapping[str, Any]) -> Estimate:
    """The area under one curve, from ``Roc.to_json``."""
    return Estimate(curve["auc"], curve["auc_low"], curve["auc_high"])


def auc_of(curves: Sequence[Mapping[str, Any]]) -> Estimate:
    """The mean AUC over models; its interval holds that of each model's candidates and the spread of the models.

    The models share their candidates, so the uncertainty of these does not shrink with their number: the mean of the
    models' own intervals is widened by the standard error over the models.
    """
    values = np.array([curve["auc"] for curve in curves])
    half = np.mean([[curve["auc"] - curve["auc_low"], curve["auc_high"] - curve["auc"]] for curve in curves], axis=0)
    error = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    low, high = np.hypot(half, error)
    mean = float(values.mean())
    return Estimate(mean, max(0.0, mean - float(low)), min(1.0, mean + float(high)))


def tries(count: float) -> str:
    """A number of samples for people."""
    if count >= 1e15:
        return "> 10^15"
    return f"{count:,.0f}" if count < 1e6 else f"10^{np.log10(count):.0f}"


def percent(estimate: Estimate | None) -> str:
    """A share with its interval, in per cent."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"
