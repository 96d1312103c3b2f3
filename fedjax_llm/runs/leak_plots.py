"""Figures about leaks, as the content of SVG files that also stand alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fedjax_llm.runs.figures import COLOURS, content, empty, label_log, styled

_MARKS = "osD^vP*X"
Points = Sequence[tuple[float, float, float, float]]
"""(x, value, low, high)."""


def roc_curves(curves: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> str:
    """ROC curves on two log axes, where an attack that is sure of few members shows (Carlini et al. 2022).

    Args:
      curves: from ``leakage.roc.Roc.to_json``.
      labels: in place of their names.
    """
    with styled("leakage", legend_fontsize=9):
        figure, axes = _figure(4.8, 4.4)
        least = min(0.5 / curve["non_members"] for curve in curves)
        for number, curve in enumerate(curves):
            name = labels[number] if labels else curve["name"].replace("_", " ")
            fpr, tpr = np.maximum(curve["fpr"], least), np.maximum(curve["tpr"], least)
            label = f"{name}: AUC {curve['auc']:.3f}"
            axes.step(fpr, tpr, where="post", color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=label)
        axes.plot([least, 1], [least, 1], color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.05))
        for axis in (axes.xaxis, axes.yaxis):
            label_log(axis, lambda value: f"{value:g}")
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
        axes.legend(loc="lower right")
        return _svg(figure)


def by_repetitions(series: Mapping[str, Points], ylabel: str, *, level: tuple[float, str] | None = None) -> str:
    """Something against how often a secret was stated, on a base-2 log axis; 0 stands at its left end.

    Args:
      series: by name, points whose x is the number of repetitions.
      ylabel: what the values are.
      level: a value to compare with, and what it is.
    """
    with styled("leakage", legend_fontsize=9):
        figure, axes = _figure(5.6, 3.6)
        every = sorted({point[0] for points in series.values() for point in points})
        for number, (name, points) in enumerate(series.items()):
            at = [every.index(x) + 0.06 * (number - len(series) / 2) for x, *_ in points]
            values, low, high = (np.array([point[part] for point in points]) for part in (1, 2, 3))
            colour = COLOURS[number % len(COLOURS)]
            axes.vlines(at, low, high, color=colour, linewidth=1.1)
            axes.plot(at, values, color=colour, linewidth=1.4, marker=_MARKS[number % len(_MARKS)], ms=4.5, label=name)
        if level is not None:
            axes.axhline(level[0], color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(level[1], (0, level[0]), (0, 3), textcoords="offset points", size=9, color="#666666")
        axes.xaxis.set_major_locator(FixedLocator(range(len(every))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{x:g}" if x else "never" for x in every])
        axes.set(xlabel="times that a secret was stated in training", ylabel=ylabel)
        _legend(axes)
        return _svg(figure)


def intervals(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], xlabel: str, *, at: float | None) -> str:
    """A dot with its interval for each name and group: models down the side, attacks by colour.

    Args:
      rows: name -> group -> (value, low, high).
      xlabel: what the values are.
      at: where nothing would be found, such as an AUC of 0.5.
    """
    with styled("leakage", legend_fontsize=9):
        groups = list(dict.fromkeys(group for own in rows.values() for group in own))
        figure, axes = _figure(5.8, 1.1 + 0.16 * len(rows) * (len(groups) + 1))
        for number, group in enumerate(groups):
            held = [(place, own[group]) for place, own in enumerate(rows.values()) if group in own]
            places = [place + 0.75 * ((number + 0.5) / len(groups) - 0.5) for place, _ in held]
            colour = COLOURS[number % len(COLOURS)]
            axes.hlines(places, [low for _, (_, low, _) in held], [high for _, (_, _, high) in held], color=colour)
            mark = _MARKS[number % len(_MARKS)]
            axes.plot([value for _, (value, _, _) in held], places, mark, color=colour, ms=4.5, label=group)
        if at is not None:
            axes.axvline(at, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel)
        _legend(axes)
        return _svg(figure)


def paths(series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> str:
    """Lines with a mark at every point; the x axis falls, as a loss does in training.

    Args:
      series: by name, (x, y) in the order of training.
      xlabel: what x is.
      ylabel: what y is.
    """
    with styled("leakage", legend_fontsize=9):
        figure, axes = _figure(5.2, 3.6)
        for number, (name, points) in enumerate(series.items()):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKS[number % len(_MARKS)], "label": name}
            axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.4, markersize=4.5, **look)
        axes.invert_xaxis()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(axes)
        return _svg(figure)


def matches(groups: Mapping[str, Mapping[str, int]], wanted: int) -> str:
    """How many tokens of each text a model gives back, a bar a text, group by group.

    Args:
      groups: group -> text -> tokens.
      wanted: tokens of a full match.
    """
    with styled("leakage", legend_fontsize=9):
        count = sum(map(len, groups.values())) + len(groups)
        figure, axes = _figure(6.4, 1.0 + 0.17 * count)
        place, ticks = 0, []
        for number, (group, texts) in enumerate(groups.items()):
            own = sorted(texts.items(), key=lambda pair: -pair[1])
            places = [place + i for i in range(len(own))]
            colour = COLOURS[1:][number % (len(COLOURS) - 1)]
            axes.barh(places, [value for _, value in own], color=colour, height=0.7, label=group)
            ticks += list(zip(places, [name for name, _ in own], strict=True))
            place += len(own) + 1
        axes.axvline(wanted, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
        axes.set_ylim(place - 0.5, -1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens given back before the first that differs")
        _legend(axes)
        return _svg(figure)


def bounds(rows: Mapping[str, tuple[float, float | None]]) -> str:
    """Empirical lower bounds on epsilon beside the accountant's upper bounds, a row each.

    Args:
      rows: name -> (lower bound, claimed epsilon or ``None``).
    """
    with styled("leakage", legend_fontsize=9):
        figure, axes = _figure(5.6, 1.1 + 0.32 * len(rows))
        first = next((place for place, (_, claimed) in enumerate(rows.values()) if claimed is not None), None)
        for place, (low, claimed) in enumerate(rows.values()):
            if claimed is not None:
                axes.hlines(place, low, claimed, color="#bbbbbb", linewidth=3)
                label = "claimed" if place == first else None
                axes.plot(claimed, place, "|", color=COLOURS[0], ms=14, mew=2, label=label)
            axes.plot(low, place, "o", color=COLOURS[1], ms=6, label="shown by the audit" if not place else None)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("epsilon")
        _legend(axes)
        return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes; sizes in inches."""
    figure = empty(width, height)
    axes = figure.add_subplot()
    axes.tick_params(length=2)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Above the axes, out of the data's way."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(len(handles), 3 if max(map(len, labels)) < 20 else 2)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns, borderaxespad=0.2, handletextpad=0.5)


def _svg(figure: Figure) -> str:
    """The figure as the content of a file, from its ``<svg>`` element on."""
    text = content(figure)
    return text[text.index("<svg") :]
