"""The figures of an evaluation, with bootstrap intervals (percentile method, Efron 1979) over records.

An evaluation ``E`` is what ``evaluation.json`` holds: ``{"sites": {site: {"records": [id], "nll": [nats summed over the
record's answer tokens], "tokens": [int], "correct": [int], "choice_records": [id], "choice_correct": [0 or 1]}},
"guessers": {name: score}}``.

A site's figure is a token-weighted mean over its records; the macro figure is the plain mean over sites, so a small
site counts as much as a large one. Records are drawn with replacement within each site. The interval says how much the
figure would vary with other held-out records of the same sites, not with other sites or another training seed. With a
single record it has no width, and with few records it is too narrow.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError

MEASURES = ("nll", "perplexity", "token_accuracy", "choice_accuracy")
LEVEL = 0.95
_BLOCK = 2_000_000  # draws held at once: 16 MB


def summarise_evaluation(evaluation: Mapping[str, Any], seed: int, resamples: int = 2000) -> dict[str, Any]:
    """Macro and per-site figures with 95% bounds.

    Args:
      evaluation: ``E`` as described above.
      seed: of the resampling; equal seeds draw equal records, whatever other sites there are.
      resamples: bootstrap replicates.

    Returns:
      ``nll`` (nats per answer token), ``perplexity`` (its exponential), ``token_accuracy`` and ``choice_accuracy``,
      each with ``_low`` and ``_high``; ``sites``, the same for every site; ``guessers`` as given. A figure without
      data (a site without multiple choice) is ``None`` and is left out of the macro mean.

    Raises:
      UserError: a site has no record, no token, or lists of unequal length.
    """
    parts: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    for site, results in evaluation["sites"].items():
        parts[site] = _site_figures(site, results, seed, resamples)
    macro = {}
    for measure in ("nll", "token_accuracy", "choice_accuracy"):
        found = [figures[measure] for figures in parts.values() if measure in figures]
        if found:
            points, replicates = zip(*found, strict=True)
            macro[measure] = _mean_over_sites(points, replicates, seed)
    sites = {site: _bounded(figures) for site, figures in parts.items()}
    return _bounded(macro) | {"sites": sites, "guessers": dict(evaluation.get("guessers", {}))}


def paired_difference(
    base: Mapping[str, Any], final: Mapping[str, Any], seed: int, resamples: int = 2000
) -> dict[str, dict[str, float]]:
    """By site: final minus base nll per token, over the same records, with a paired bootstrap's 95% bounds.

    Below zero the final model is better; with ``high`` below zero, by more than the choice of records explains.

    Args:
      base: an evaluation ``E``.
      final: another one, of the same records.
      seed: of the resampling.
      resamples: bootstrap replicates.

    Returns:
      ``{site: {"difference", "low", "high"}}`` in nats per answer token.

    Raises:
      UserError: the two are not over the same sites, records and numbers of tokens.
    """
    return {site: _interval(*figure) for site, figure in _differences(base, final, seed, resamples).items()}


def macro_paired_difference(
    base: Mapping[str, Any], final: Mapping[str, Any], seed: int, resamples: int = 2000
) -> dict[str, float]:
    """The mean over sites of what :func:`paired_difference` gives, with its own bounds: ``difference, low, high``.

    Raises:
      UserError: the two are not over the same sites, records and numbers of tokens.
    """
    figures = _differences(base, final, seed, resamples).values()
    points, replicates = zip(*figures, strict=True)
    return _interval(*_mean_over_sites(points, replicates, seed))


def restrict(evaluation: Mapping[str, Any], records: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The evaluation's per-token part on some records only, in their order; for comparing what two runs share.

    Args:
      evaluation: ``E``.
      records: record ids by site, each of them in the evaluation.
    """
    sites = {}
    for site, wanted in records.items():
        results = evaluation["sites"][site]
        place = {record: index for index, record in enumerate(results["records"])}
        rows = [place[record] for record in wanted]
        sites[site] = {name: [results[name][row] for row in rows] for name in ("records", "nll", "tokens", "correct")}
    return {"sites": sites}


def _site_figures(site: str, results: Mapping[str, Any], seed: int, resamples: int) -> dict[str, Any]:
    """The measures of one site, each a point and its replicates."""
    columns = ("nll", "correct", "tokens")
    sums = _columns(site, results, "records", columns)
    if not len(sums) or not np.all(sums[:, 2] > 0):
        raise UserError(f"site {site!r}: a held-out record without answer tokens, or no record at all, was evaluated")
    drawn = _resampled_sums(sums, _generator(seed, site, "tokens"), resamples)
    total = sums.sum(axis=0)
    figures = {
        "nll": (float(total[0] / total[2]), drawn[:, 0] / drawn[:, 2]),
        "token_accuracy": (float(total[1] / total[2]), drawn[:, 1] / drawn[:, 2]),
    }
    choices = _columns(site, results, "choice_records", ("choice_correct",))
    if len(choices):
        drawn = _resampled_sums(choices, _generator(seed, site, "choice"), resamples)[:, 0] / len(choices)
        figures["choice_accuracy"] = (float(choices.mean()), drawn)
    return figures


def _differences(
    base: Mapping[str, Any], final: Mapping[str, Any], seed: int, resamples: int
) -> dict[str, tuple[float, np.ndarray]]:
    """By site: the difference of the per-token nll, and its replicates under a resampling that both share."""
    if set(base["sites"]) != set(final["sites"]) or not base["sites"]:
        both = [sorted(evaluation["sites"]) for evaluation in (base, final)]
        raise UserError(f"a paired difference needs the same sites in both evaluations; got {both[0]} and {both[1]}")
    figures = {}
    for site in base["sites"]:
        if set(base["sites"][site]["records"]) != set(final["sites"][site]["records"]):
            raise UserError(f"site {site!r}: a paired difference needs the same records in both evaluations")
        order = {site: base["sites"][site]["records"]}
        before = _columns(site, base["sites"][site], "records", ("nll", "tokens"))
        after = _columns(site, restrict(final, order)["sites"][site], "records", ("nll", "tokens"))
        if not len(before) or np.any(before[:, 1] != after[:, 1]):
            raise UserError(f"site {site!r}: the two evaluations count different answer tokens; same tokenizer?")
        sums = np.stack([after[:, 0] - before[:, 0], before[:, 1]], axis=1)
        drawn = _resampled_sums(sums, _generator(seed, site, "tokens"), resamples)
        total = sums.sum(axis=0)
        figures[site] = (float(total[0] / total[1]), drawn[:, 0] / drawn[:, 1])
    return figures


def _resampled_sums(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Column sums ``[resamples, k]`` over rows of ``values`` ``[n, k]`` drawn n times with replacement."""
    rows = len(values)
    block = max(1, _BLOCK // rows)
    parts = []
    for start in range(0, resamples, block):
        drawn = rng.integers(0, rows, (min(block, resamples - start), rows))
        parts.append(np.stack([column[drawn].sum(axis=1) for column in values.T], axis=1))
    return np.concatenate(parts)


def _mean_over_sites(points: Sequence[float], replicates: Sequence[np.ndarray], seed: int) -> tuple[float, np.ndarray]:
    """The macro mean with its replicates: records drawn anew within the sites.

    Where every site has a single record there is nothing to draw within; then the sites themselves are drawn.
    """
    if len(points) > 1 and all(np.ptp(own) == 0 for own in replicates):
        drawn = _generator(seed, "", "sites").integers(0, len(points), (len(replicates[0]), len(points)))
        return float(np.mean(points)), np.asarray(points)[drawn].mean(axis=1)
    return float(np.mean(points)), np.mean(replicates, axis=0)


def _columns(site: str, results: Mapping[str, Any], ids: str, names: Sequence[str]) -> np.ndarray:
    """Columns of a site's results as float64 ``[n, len(names)]``."""
    count = len(results.get(ids, ()))
    for name in names:
        if len(results.get(name, ())) != count:
            raise UserError(f"site {site!r}: {name} has {len(results.get(name, ()))} entries for {count} {ids}")
    return np.array([results.get(name, ()) for name in names], np.float64).reshape(len(names), count).T


def _generator(seed: int, site: str, purpose: str) -> np.random.Generator:
    """A generator of the site's own, whatever other sites there are and in whichever order."""
    name = int.from_bytes(hashlib.sha256(f"{purpose}/{site}".encode()).digest()[:8], "big")
    return np.random.default_rng([seed, name])


def _interval(point: float, replicates: np.ndarray) -> dict[str, float]:
    """A difference with its percentile bounds."""
    low, high = _bounds(replicates)
    return {"difference": point, "low": low, "high": high}


def _bounds(replicates: np.ndarray) -> tuple[float, float]:
    """The percentile interval."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _bounded(figures: Mapping[str, tuple[float, np.ndarray]]) -> dict[str, Any]:
    """The measures as flat keys: ``nll``, ``nll_low``, ``nll_high``, ..."""
    flat: dict[str, Any] = dict.fromkeys(f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high"))
    for measure, (point, replicates) in figures.items():
        low, high = _bounds(replicates)
        flat |= {measure: point, f"{measure}_low": low, f"{measure}_high": high}
    if "nll" in figures:
        for end in ("", "_low", "_high"):
            with np.errstate(over="ignore"):
                flat[f"perplexity{end}"] = min(float(np.exp(flat[f"nll{end}"])), float(np.finfo(np.float64).max))
    return flat
