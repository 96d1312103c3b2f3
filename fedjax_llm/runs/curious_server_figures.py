"""The table and the figure of what a curious server recovered, from the cases of ``curious_server.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fedjax_llm.runs.figures import COLOURS, content, empty, label_log, styled

Found = Mapping[str, Any]


def title_of(case: Found) -> str:
    """What a case varies, for people."""
    start = "" if case["later_round"] else ", first round"
    trained = "" if case["train"] == "both" else ", b alone"
    noise = "" if case["clip_norm"] is None else f", clipped, noise {case['noise_multiplier']:g}"
    steps = "" if case["steps"] == 1 else f", {case['steps']} steps"
    adam = ", Adam" if case["optimizer"] == "adam" else ""
    clients = "" if case["clients"] == 1 else f", sum of {case['clients']} clients"
    attack = "search: " if case["attack"] == "inversion" else ""
    count = "1 example" if case["examples"] == 1 else f"{case['examples']} examples"
    return f"{attack}rank {case['rank']}, {count}{steps}{adam}{clients}{noise}{start}{trained}"


def over_seeds(cases: Sequence[Found]) -> list[dict[str, Any]]:
    """The cases with figures as means over the seeds, in their first order; ``verdict`` names all that came up."""
    groups: dict[str, list[Found]] = {}
    for case in cases:
        groups.setdefault(f"{case['group']}: {title_of(case)}", []).append(case)
    merged = []
    for own in groups.values():
        mean = dict(own[0]) | {"verdict": "/".join(sorted({one["verdict"] for one in own})), "seeds": len(own)}
        for name in ("tokens", "recall", "precision", "ranked", "rouge1", "rouge2", "distance"):
            values = [one[name] for one in own if one.get(name) is not None]
            mean[name] = float(np.mean(values)) if values else None
        merged.append(mean)
    return merged


def table(cases: Sequence[Found]) -> str:
    """A Markdown table, a row a case, means over seeds."""
    heads = ("case", "distinct tokens", "columns", "verdict", "recall", "precision", "nearest", "ROUGE-1", "ROUGE-2")
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|---:|---|" + "---:|" * 5]
    for case in over_seeds(cases):
        shares = [_share(case[name]) for name in ("recall", "precision", "ranked", "rouge1", "rouge2")]
        cells = [title_of(case), f"{case['tokens']:.0f}", str(case.get("columns", "-")), case["verdict"], *shares]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def drawn(cases: Sequence[Found]) -> str:
    """Three panels as the content of an SVG file.

    Recovery of tokens against distinct tokens a column of the update; against local steps; and in sums and under noise.
    """
    merged = over_seeds(cases)
    with styled("curious"):
        figure = empty(12.6, 3.7)
        panels = figure.subplots(1, 3, width_ratios=(1.25, 0.8, 1.25))
        _by_load(panels[0], [case for case in cases if case["group"] == "rank"])
        _by_steps(panels[1], merged)
        _by_protection(panels[2], merged)
        return content(figure)


def _by_load(panel: Axes, cases: Sequence[Found]) -> None:
    """Every case of every seed: exact recovery filled, what stands among the nearest as rings."""
    for colour, rank in zip(COLOURS[1:], sorted({case["rank"] for case in cases}), strict=False):
        own = sorted((c for c in cases if c["rank"] == rank), key=lambda c: c["tokens"])
        load = [case["tokens"] / case["columns"] for case in own]
        panel.plot(load, [case["recall"] for case in own], "o", color=colour, label=f"rank {rank}")
        panel.plot(load, [case["ranked"] for case in own], "o", color=colour, fillstyle="none")
    panel.axvline(1.0, color="#67625a", linewidth=0.8, linestyle="--")
    panel.set(xscale="log", ylim=(-0.04, 1.04), xlabel="distinct tokens a column of the update")
    label_log(panel.xaxis, lambda value: f"{value:g}")
    panel.set_ylabel("share of private tokens")
    panel.set_title("found in the span (dots); among the nearest (rings)", loc="left", fontsize=10)
    if cases:
        panel.legend(fontsize=9)


def _by_steps(panel: Axes, merged: Sequence[Found]) -> None:
    """Tokens and order against the local steps."""
    own = sorted((case for case in merged if case["group"] == "steps"), key=lambda case: case["steps"])
    for colour, name, label in ((COLOURS[1], "recall", "tokens"), (COLOURS[2], "rouge2", "order (ROUGE-2)")):
        panel.plot([case["steps"] for case in own], [case[name] for case in own], "o-", color=colour, label=label)
    panel.set(ylim=(-0.04, 1.04), xlabel="local steps of SGD on one batch")
    panel.set_title("local steps do not hide tokens", loc="left", fontsize=10)
    if own:
        panel.legend(fontsize=9)


def _by_protection(panel: Axes, merged: Sequence[Found]) -> None:
    """A bar a case: one update, sums, Adam, clipping and noise, the first round."""
    own = [case for case in merged if case["group"] in ("clients", "adam", "noise", "first round")]
    places = np.arange(len(own))
    panel.barh(places - 0.19, [case["recall"] for case in own], 0.36, color=COLOURS[1], label="found in the span")
    panel.barh(places + 0.19, [case["ranked"] for case in own], 0.36, color=COLOURS[6], label="among the nearest")
    panel.set_yticks(places, [_short(case) for case in own])
    ranks = "/".join(str(rank) for rank in sorted({case["rank"] for case in own}))
    panel.set(xlim=(0, 1.04), xlabel=f"share of private tokens (rank {ranks})")
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    if own:
        panel.legend(fontsize=9, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, borderaxespad=0)


def _short(case: Found) -> str:
    """A case's name in the last panel."""
    if case["group"] == "clients":
        return "one update" if case["clients"] == 1 else f"sum of {case['clients']} clients"
    if case["group"] == "noise":
        return f"noise {case['noise_multiplier']:g}" if case["noise_multiplier"] else "clipped"
    if case["group"] == "adam":
        return "a step of Adam"
    return "first round" + (", b alone" if case["train"] == "b" else "")


def _share(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "-" if value is None else f"{value:.2f}"
