"""How time and memory of a round grow: a column of panels for each thing that grows, time above and memory below."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedjax_llm.runs.figures import COLOURS, content, empty, label_log, styled

_PANEL = (2.5, 2.3)  # inches


def write_growth(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the growth into two files, ``.svg`` and ``.png``, whatever the ending of ``path``.

    Args:
      cases: points, each with ``axis``, ``value``, ``real_tokens``, ``seconds`` and ``peak_rss_bytes`` (or ``None``).
      path: of the files.
    """
    with styled("growth", font_size=9):
        figure = growth_figure(cases)
        path.with_suffix(".svg").write_text(content(figure), encoding="utf-8")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150, facecolor="white")
        path.with_suffix(".png").write_bytes(picture.getvalue())


def growth_figure(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of :func:`write_growth`, of points in any order."""
    axes = list(dict.fromkeys(case["axis"] for case in cases))
    figure = empty(_PANEL[0] * len(axes), 2 * _PANEL[1])
    panels = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for column, axis in enumerate(axes):
        points = sorted((case for case in cases if case["axis"] == axis), key=lambda case: case["value"])
        _time(panels[0, column], points)
        _memory(panels[1, column], points)
        panels[1, column].set_xlabel(axis)
    panels[0, 0].set_ylabel("seconds a round")
    panels[1, 0].set_ylabel("peak memory (GB)")
    return figure


def _time(panel: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Seconds on log axes, and those of the largest point in proportion to the work of the others."""
    values, seconds = ([point[name] for point in points] for name in ("value", "seconds"))
    panel.plot(values, seconds, "o-", color=COLOURS[1], markersize=4)
    work = np.array([point["work"] for point in points], float)
    panel.plot(values, seconds[-1] * work / work[-1], ":", color=COLOURS[0], linewidth=1, label="in proportion")
    panel.set(xscale="log", yscale="log", ylim=(min(seconds) / 2, 3 * max(seconds)))  # room for the legend
    panel.legend(loc="upper left", fontsize=8)
    label_log(panel.xaxis, lambda value: f"{value:g}")
    label_log(panel.yaxis, lambda value: f"{value:g}")


def _memory(panel: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Peak memory, from zero, so that what is flat looks flat."""
    known = [point for point in points if point["peak_rss_bytes"] is not None]
    sizes = [point["peak_rss_bytes"] / 1e9 for point in known]
    panel.plot([point["value"] for point in known], sizes, "o-", color=COLOURS[2], markersize=4)
    panel.set_ylim(0, 1.15 * max(sizes, default=1.0))
    label_log(panel.xaxis, lambda value: f"{value:g}")
