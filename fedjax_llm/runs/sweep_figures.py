"""The figures of a sweep: those of each run (a cell), and of each algorithm and data skew over its seeds.

A cell is what ``sweep.json`` holds of one: ``{"algorithm", "data", "seed", "status", "reason", "figures", "curve"}``.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.runs import metrics
from fedjax_llm.runs.directory import read_json

LEVEL = 0.95
FEWEST = 3
"""Seeds that an interval takes; fewer are shown as they range."""
PLAIN = (
    "nll",
    "token_accuracy",
    "aggregation_error",
    "aggregation_error_last",
    "upload_bytes",
    "download_bytes",
    "client_seconds",
)
"""Figures of a row that are means of the cells' own."""


def read_cell(folder: Path) -> dict[str, Any]:
    """Figures and curve of a finished run, from its files.

    Args:
      folder: of the run.

    Returns:
      ``figures``: ``nll`` (nats per answer token of the test records), ``base_nll`` (of the untrained model),
      ``token_accuracy``, ``aggregation_error`` (mean over the rounds) and ``aggregation_error_last``, ``validation``
      (nats after the last round), ``upload_bytes`` and ``download_bytes`` of all clients and rounds, ``client_seconds``
      (time of the rounds without compilation, by client and round), ``seconds`` of all rounds, ``rounds``,
      ``excluded`` updates; ``None`` where there is no such figure. ``curve``: lists by round, ``round``, ``bytes``
      (both ways, so far), ``validation`` and ``aggregation_error``.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    summary, log = read_json(folder / "summary.json"), folder / "metrics.jsonl"
    lines = metrics.read(log) if log.exists() else []
    validation = [line["validation"]["nll"] if line["validation"] else None for line in lines]
    errors = [line["aggregation_error"] for line in lines]
    measured = [error for error in errors if error is not None]
    seconds = sum(line["timing"]["seconds"] - line["timing"]["compile_seconds"] for line in lines)
    client_rounds = sum(len(line["cohort"]) for line in lines)
    figures = {
        "nll": summary["final"]["nll"],
        "base_nll": summary["base"]["nll"],
        "token_accuracy": summary["final"]["token_accuracy"],
        "aggregation_error": float(np.mean(measured)) if measured else None,
        "aggregation_error_last": measured[-1] if measured else None,
        "validation": next((value for value in reversed(validation) if value is not None), None),
        "upload_bytes": summary["upload_bytes"],
        "download_bytes": summary["download_bytes"],
        "client_seconds": seconds / client_rounds if client_rounds else None,
        "seconds": seconds,
        "rounds": len(lines),
        "excluded": summary["excluded_updates"],
    }
    curve = {
        "round": [line["round"] for line in lines],
        "bytes": list(accumulate(line["upload_bytes"] + line["download_bytes"] for line in lines)),
        "validation": validation,
        "aggregation_error": errors,
    }
    return {"figures": figures, "curve": curve}


def estimate(values: Sequence[float]) -> dict[str, Any] | None:
    """The mean over seeds, and how sure it is.

    Args:
      values: one a seed.

    Returns:
      ``{"mean", "low", "high", "n", "interval"}``: from :data:`FEWEST` seeds on the two-sided 95% interval of Student's
      t (``"t"``), which takes seeds for independent and their figures for normal; with fewer the lowest and the highest
      (``"range"``). ``None`` without values.
    """
    if not values:
        return None
    count, mean = len(values), float(np.mean(values))
    if count < FEWEST:
        return {"mean": mean, "low": min(values), "high": max(values), "n": count, "interval": "range"}
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": count, "interval": "t"}


def first_reached(curve: Mapping[str, Sequence[Any]], target: float) -> tuple[int, int] | None:
    """The first validated round at or below a target, and the bytes until then; ``None``: it was never reached.

    Args:
      curve: of a cell.
      target: nats per answer token on validation records.
    """
    for number, spent, value in zip(curve["round"], curve["bytes"], curve["validation"], strict=True):
        if value is not None and value <= target:
            return number, spent
    return None


def rows(cells: Sequence[Mapping[str, Any]], target: float | None) -> list[dict[str, Any]]:
    """One row for each algorithm and data skew, in the order of the cells.

    Args:
      cells: of a sweep, finished or not. The first cell's algorithm is what the others are compared with.
      target: nats per answer token on validation records; ``None``: what the first algorithm has after its last round
        with the same data and seed.

    Returns:
      Rows ``{"data", "algorithm", "seeds", "failed", "unfinished"}`` (finished seeds; reason by seed; seeds not yet
      run) with an :func:`estimate` or ``None`` under each name of :data:`PLAIN` and under ``base_nll``, ``difference``
      (of ``nll`` from the first algorithm's, paired by seed; ``None`` for itself), ``rounds_to_target`` and
      ``bytes_to_target`` (``None`` unless every finished seed reached it: a mean over those that did would flatter),
      and ``reached``, in how many seeds it was, ``None`` where there is no target.
    """
    first = cells[0]["algorithm"]
    done = {(cell["data"], cell["algorithm"], cell["seed"]): cell for cell in cells if cell["status"] == "finished"}
    found = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
            own = [cell for cell in cells if (cell["data"], cell["algorithm"]) == (data, algorithm)]
            finished = {cell["seed"]: cell for cell in own if cell["status"] == "finished"}
            reference = {seed: done[data, first, seed] for seed in finished if (data, first, seed) in done}
            row = {
                "data": data,
                "algorithm": algorithm,
                "seeds": list(finished),
                "failed": {str(cell["seed"]): cell["reason"] for cell in own if cell["status"] == "failed"},
                "unfinished": [cell["seed"] for cell in own if cell["status"] == "unfinished"],
            }
            row |= {name: estimate(_column(finished.values(), name)) for name in (*PLAIN, "base_nll")}
            row["difference"] = None if algorithm == first else _difference(finished, reference)
            found.append(row | _to_target(finished, reference, target))
    return found


def _column(cells: Any, name: str) -> list[float]:
    """A figure of the cells that have it."""
    return [cell["figures"][name] for cell in cells if cell["figures"][name] is not None]


def _difference(finished: Mapping[int, Any], reference: Mapping[int, Any]) -> dict[str, Any] | None:
    """The mean difference of loss from the first algorithm over the seeds that both finished."""
    return estimate([finished[seed]["figures"]["nll"] - other["figures"]["nll"] for seed, other in reference.items()])


def _to_target(finished: Mapping[int, Any], reference: Mapping[int, Any], target: float | None) -> dict[str, Any]:
    """Rounds and bytes to the target, and in how many seeds it was reached."""
    targets = dict.fromkeys(finished, target)
    if target is None:
        targets = {seed: other["figures"]["validation"] for seed, other in reference.items()}
    wanted = {seed: value for seed, value in targets.items() if value is not None}
    hits = [first_reached(finished[seed]["curve"], value) for seed, value in wanted.items()]
    reached = [hit for hit in hits if hit is not None]
    every = len(reached) == len(finished)
    return {
        "rounds_to_target": estimate([hit[0] for hit in reached]) if every else None,
        "bytes_to_target": estimate([hit[1] for hit in reached]) if every else None,
        "reached": len(reached) if wanted else None,
    }
