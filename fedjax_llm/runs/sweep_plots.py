"""The curves of a sweep as SVG files: a panel for each data skew, a line for each algorithm, a band over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedjax_llm.runs.figures import COLOURS, content, empty, label_log, styled
from fedjax_llm.runs.progress import byte_size

LEAST = 1e-8
"""Aggregation errors below what f32 can tell are drawn here, so that a log axis can show exact algorithms."""
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_PANEL, _ACROSS = (4.2, 3.3), 3  # inches; panels side by side


def loss_by_round(cells: Sequence[Mapping[str, Any]]) -> str:
    """Validation loss against the round.

    Args:
      cells: of a sweep, as ``sweep.json`` holds them; those that are not finished are left out.

    Returns:
      The content of an SVG file.
    """
    return _drawn(cells, "validation", "round", "validation loss (nats per answer token)")


def loss_by_bytes(cells: Sequence[Mapping[str, Any]]) -> str:
    """Validation loss against the bytes that all clients have sent and received so far, on a log scale.

    Args:
      cells: as for :func:`loss_by_round`. Runs that exchange nothing have no line.
    """
    return _drawn(cells, "validation", "bytes", "validation loss (nats per answer token)")


def error_by_round(cells: Sequence[Mapping[str, Any]]) -> str:
    """Aggregation error against the round, on a log scale.

    Args:
      cells: as for :func:`loss_by_round`. Algorithms whose error is not measured have no line.
    """
    return _drawn(cells, "aggregation_error", "round", "aggregation error (relative)")


def over_seeds(curves: Sequence[Mapping[str, Sequence[Any]]], across: str, along: str) -> np.ndarray:
    """Mean over seeds, lowest and highest, at the rounds that have a value in every seed.

    Args:
      curves: of the cells of one algorithm and data skew.
      across: the horizontal quantity, ``round`` or ``bytes``.
      along: the vertical one.

    Returns:
      [points, 4]: horizontal mean, vertical mean, lowest, highest.
    """
    seen = [
        {
            number: (x, y)
            for number, x, y in zip(curve["round"], curve[across], curve[along], strict=True)
            if y is not None
        }
        for curve in curves
    ]
    shared = [number for number in (seen[0] if seen else {}) if all(number in one for one in seen)]
    points = np.array([[one[number] for one in seen] for number in shared], np.float64).reshape(
        len(shared), len(seen), 2
    )
    if not len(shared):
        return np.zeros((0, 4))
    values = points[:, :, 1]
    return np.stack([points[:, :, 0].mean(axis=1), values.mean(axis=1), values.min(axis=1), values.max(axis=1)], axis=1)


def _drawn(cells: Sequence[Mapping[str, Any]], along: str, across: str, label: str) -> str:
    """A figure with all panels, and one legend for them."""
    skews = list(dict.fromkeys(cell["data"] for cell in cells))
    algorithms = list(dict.fromkeys(cell["algorithm"] for cell in cells))
    wide = min(len(skews), _ACROSS)
    high = -(-len(skews) // wide)
    columns = 2 * wide + 1
    legend_lines = -(-len(algorithms) // columns)
    with styled("sweep"):
        figure = empty(_PANEL[0] * wide, _PANEL[1] * high + 0.22 * legend_lines)
        panels = figure.subplots(high, wide, squeeze=False).flat
        lines: dict[str, Any] = {}
        for panel, data in zip(panels, skews, strict=False):
            for number, algorithm in enumerate(algorithms):
                curves = [
                    cell["curve"]
                    for cell in cells
                    if (cell["data"], cell["algorithm"], cell["status"]) == (data, algorithm, "finished")
                ]
                line = _line(panel, over_seeds(curves, across, along), number, along)
                if line is not None:
                    lines.setdefault(algorithm, line)
            _dress(panel, data, along, across, label)
        for panel in list(figure.axes)[len(skews) :]:
            panel.set_visible(False)
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, handlelength=2.6)
        return content(figure)


def _line(panel: Axes, points: np.ndarray, number: int, along: str) -> Any:
    """Draws the mean and its band; gives the line, or nothing where there are no points."""
    if along == "aggregation_error":
        points[:, 1:] = np.maximum(points[:, 1:], LEAST)
    points = points[points[:, 0] > 0]
    if not len(points):
        return None
    colour = COLOURS[number % len(COLOURS)]
    dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
    if np.any(points[:, 2] < points[:, 3]):
        panel.fill_between(points[:, 0], points[:, 2], points[:, 3], color=colour, alpha=0.13, linewidth=0)
    marker = "o" if len(points) == 1 else ""
    (line,) = panel.plot(
        points[:, 0], points[:, 1], color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=4
    )
    return line


def _dress(panel: Axes, data: str, along: str, across: str, label: str) -> None:
    """Title, scales and labels of a panel."""
    panel.set_title(data, loc="left", fontsize=10, fontweight="bold")
    panel.set_ylabel(label)
    if along == "aggregation_error" and panel.lines:
        panel.set_yscale("log")
        label_log(panel.yaxis, lambda value: f"{value:.0e}")
    if across == "bytes":
        panel.set_xlabel("bytes exchanged by all clients so far")
        if panel.lines:
            panel.set_xscale("log")
            label_log(panel.xaxis, byte_size)
    else:
        panel.set_xlabel("round")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
