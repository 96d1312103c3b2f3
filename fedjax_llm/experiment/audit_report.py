"""The outcome of an audit for people: a table, a picture, and an alarm."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_llm.runs.figures import COLOURS, content, empty, styled

_CLAIM, _OUT, _IN, *_ = COLOURS


def table(found: Mapping[str, Any]) -> str:
    """What was audited, and the bounds beside the claim, in Markdown.

    Args:
      found: the content of ``audit.json``.
    """
    noise = "" if found["noise_factor"] == 1 else f" SABOTAGED: its noise was multiplied by {found['noise_factor']:g}."
    unit, counts = found["unit"], {side: len(scores) for side, scores in found["scores"].items()}
    lines = [
        f"{found['mechanism']}, unit {unit}, {found['rounds']} rounds, {found['trained_values']:,} trained numbers; "
        f"{found['canaries']} {found['kind']} canaries, {counts['in']} in and {counts['out']} out.{noise}",
        "",
        f"| figure | epsilon at delta {found['delta']:g} | confidence | assumes |",
        "|---|---|---|---|",
        f"| the accountant's upper bound | {found['claim']:.3f} | proof | the code does what it says |",
    ]
    for bound in found["bounds"]:
        sure = bound["confidence"]
        kind = "estimate" if sure is None else "lower bound"
        told = "none" if sure is None else f"{sure:.0%}"
        lines.append(f"| {kind}: {bound['method']} | {bound['epsilon']:.3f} | {told} | {bound['assumes']} |")
    weak = found["most_shown"] <= found["claim"]
    lines += [
        "",
        f"So many canaries can show at most epsilon {found['most_shown']:.2f} in one run, if all are told apart.",
    ]
    if weak:
        lines.append("That is no more than the claim: this audit cannot contradict it, whatever the code does.")
    return "\n".join(lines) + "\n"


def alarm(found: Mapping[str, Any]) -> str:
    """What to shout where a lower bound is above the claim.

    Args:
      found: the content of ``audit.json``.
    """
    worst = max((bound for bound in found["bounds"] if bound["confidence"] is not None), key=lambda b: b["epsilon"])
    return (
        f"THE CLAIM IS WRONG: the audit shows epsilon >= {worst['epsilon']:.2f} at delta {found['delta']:g} with "
        f"confidence {worst['confidence']:.0%}, but the run claims epsilon <= {found['claim']:.2f}. Do not release "
        "what it has trained. Look for noise that is missing, added once too few, or smaller than was accounted for; "
        "for gradients that are not clipped; and for randomness that is used twice."
    )


def picture(found: Mapping[str, Any]) -> str:
    """The canaries' scores, in and out, and the bounds beside the claim: the content of an SVG file.

    Args:
      found: the content of ``audit.json``.
    """
    with styled("audit", axes_grid=False):
        figure = empty(9.2, 3.2)
        left, right = figure.subplots(1, 2)
        _scores(left, found["scores"])
        _bounds(right, found)
        return content(figure)


def _scores(axes: Any, scores: Mapping[str, Any]) -> None:
    """Histograms of the scores; the few beyond the range of all others are drawn at its ends."""
    every = np.concatenate([np.asarray(scores["in"], float), np.asarray(scores["out"], float)])
    low, high = np.quantile(every, [0.002, 0.998])
    edges = np.linspace(low, max(high, low + 1e-9), 40)
    for name, colour in (("out", _OUT), ("in", _IN)):
        own = np.clip(np.asarray(scores[name], float), edges[0], edges[-1])
        axes.hist(own, edges, color=colour, alpha=0.55, label=f"{len(own)} canaries {name}")
    axes.set_xlabel("score")
    axes.set_ylabel("canaries")
    axes.grid(axis="y")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])
    axes.legend(loc="upper right", ncols=2)


def _bounds(axes: Any, found: Mapping[str, Any]) -> None:
    """A bar for every lower bound, a dot for an estimate, and a line for the claim."""
    names = [bound["method"] for bound in found["bounds"]]
    for place, bound in enumerate(found["bounds"]):
        if bound["confidence"] is None:
            axes.plot(bound["epsilon"], place, "o", markersize=9, markerfacecolor="none", color=_IN)
            text = f"  {bound['epsilon']:.2f}, an estimate"
        else:
            axes.barh(place, bound["epsilon"], height=0.45, color=_IN)
            text = f"  at least {bound['epsilon']:.2f} ({bound['confidence']:.0%})"
        axes.annotate(text, (bound["epsilon"], place), (8, 0), textcoords="offset points", va="center")
    axes.axvline(found["claim"], color=_CLAIM, linewidth=1.5)
    axes.annotate(
        f"claimed: at most {found['claim']:.2f}", (found["claim"], len(names) - 0.45), (-5, 0),
        textcoords="offset points", ha="right",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlim(0, 1.6 * max(found["claim"], *(bound["epsilon"] for bound in found["bounds"])))
    axes.set_xlabel(f"epsilon at delta {found['delta']:g}, for one {found['unit']}")
    axes.grid(axis="x")
