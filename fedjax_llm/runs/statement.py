"""A run's privacy in words: what displays, tables and pages say of an epsilon.

Two things are read here, both ``None`` where there is no differential privacy. ``epsilon`` of a line of
``metrics.jsonl`` is what is spent up to and including its round: ``unit, delta, max, accounts ({site: epsilon})``.
``privacy`` of ``summary.json`` is the statement: ``mechanism, unit, adjacency, delta, epsilon, accounts ({site:
{"epsilon", "noise_multiplier", "sampling_probability", "releases", "units"}}), clip_norm, scope, adversary,
assumptions, not_covered, randomness, warning, budget, target, accountant, stopped, line``. An infinite epsilon is
``null`` in these files.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.privacy.statement import bound

_MEANINGLESS = 20.0  # an epsilon above it lets the odds change by a factor of more than 400 million


def terms(privacy: Mapping[str, Any]) -> str:
    """Adjacency, unit and delta as short as can be, such as ``+/-1 record, delta 1e-05``."""
    return f"+/-1 {privacy['unit']}, delta {privacy['delta']:g}"


def spent(epsilon: Mapping[str, Any] | None, budget: float | None = None) -> str:
    """What a metrics line has spent, such as ``epsilon 3.21 of 8 (+/-1 record, delta 1e-05)``; ``epsilon -`` for none.

    Args:
      epsilon: of the line.
      budget: what may be spent.
    """
    if epsilon is None:
        return "epsilon -"
    limit = "" if budget is None else f" of {budget:g}"
    return f"epsilon {bound(epsilon['max'])}{limit} ({terms(epsilon)})"


def worst(accounts: Mapping[str, Mapping[str, Any]], most: int) -> list[tuple[str, Mapping[str, Any]]]:
    """The ``most`` accounts with the largest epsilon, the largest first; equal ones in the order given."""
    return sorted(accounts.items(), key=lambda account: -_value(account[1]["epsilon"]))[:most]


def left_out(accounts: Mapping[str, Any], most: int) -> str:
    """Says how many accounts :func:`worst` leaves out; empty where it is none."""
    return f"... and {len(accounts) - most:,} more, none of a larger epsilon" if len(accounts) > most else ""


def cells(figures: Mapping[str, Any]) -> list[str]:
    """An account's epsilon, noise multiplier, sampling probability, releases and units, ``-`` where there is none."""
    probability = figures["sampling_probability"]
    return [
        bound(figures["epsilon"]),
        f"{figures['noise_multiplier']:.4g}",
        "-" if probability is None else f"{probability:.3g}",
        f"{figures['releases']:,}",
        "-" if figures["units"] is None else f"{figures['units']:,}",
    ]


def headings(statement: Mapping[str, Any]) -> list[str]:
    """What :func:`cells` holds, in its order."""
    return ["epsilon", "noise multiplier", "sampling probability", "releases", f"{statement['unit']}s"]


def meaning(statement: Mapping[str, Any]) -> str:
    """What the epsilon promises, as sentences for somebody who has never seen one."""
    epsilon, delta = _value(statement["epsilon"]), f"delta {statement['delta']:g}"
    change = f"adding or removing {statement['adjacency'].removeprefix('add or remove ')}"
    if not math.isfinite(epsilon):
        return (
            f"That promises nothing: {change} may change the odds of what the run released without limit, at {delta}."
        )
    if epsilon > _MEANINGLESS:
        return (
            f"That is too large to mean anything: {change} may change the odds of what the run released by a factor of "
            f"e^{bound(epsilon)}, at {delta}."
        )
    return (
        f"It says that {change} changes the odds of anything that the run released by a factor of at most "
        f"{bound(math.exp(epsilon))} (e^epsilon), but for a chance of about {delta}. The smaller, the better."
    )


def rounds_done(summary: Mapping[str, Any]) -> str:
    """How many rounds were done, such as ``20 rounds`` or ``9 of 20 rounds (stopped by the privacy budget)``."""
    planned = summary.get("rounds") or 0
    done = summary.get("rounds_done", planned)
    if done == planned:
        return f"{planned:,} round{'' if planned == 1 else 's'}"
    stopped = (summary.get("privacy") or {}).get("stopped")
    return f"{done:,} of {planned:,} rounds" + (" (stopped by the privacy budget)" if stopped else "")


def series(lines: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(round, epsilon) of the worst account and of the best one, for the rounds where they are finite.

    Args:
      lines: of ``metrics.jsonl``.
    """
    high, low = [], []
    for line in lines:
        epsilon = line.get("epsilon")
        if epsilon is None or not math.isfinite(_value(epsilon["max"])):
            continue
        least = min(map(_value, epsilon["accounts"].values()), default=epsilon["max"])
        high.append((line["round"], float(epsilon["max"])))
        low.append((line["round"], least))
    return high, low


def _value(epsilon: float | None) -> float:
    """An epsilon as a number."""
    return math.inf if epsilon is None else float(epsilon)
