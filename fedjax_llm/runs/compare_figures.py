"""Figures of several runs for a paper: a column wide, 8 pt, colours for everybody, labels at the lines, no titles.

Each is a PDF to include and a PNG to look at. The caption is the paper's own; what a figure shows stands on its axes.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedjax_llm.errors import UserError
from fedjax_llm.runs import statement
from fedjax_llm.runs.compare import Comparison
from fedjax_llm.runs.figures import COLOURS, label_log, styled
from fedjax_llm.runs.metrics import read
from fedjax_llm.runs.progress import byte_size

COLUMN = 3.25
"""Inches: a column of two-column papers."""
_SIZE = 8  # points, as a caption's text
_LOOK = {
    "font_size": _SIZE, "axes_labelsize": _SIZE, "xtick_labelsize": _SIZE - 1, "ytick_labelsize": _SIZE - 1,
    "axes_linewidth": 0.6, "grid_linewidth": 0.4, "pdf_fonttype": 42, "savefig_dpi": 300,
}  # fmt: skip
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
_MOST = len(COLOURS) * len(_DASHES)
_FEWEST, _FEW = 8, 20  # points that get a dot each; that are drawn as they are, and not averaged
_SPREAD = 30.0  # runs whose costs differ by more are shown on a log axis


class Curve(NamedTuple):
    """A run by round; all lists are of equal length.

    Attributes:
      name: of the run.
      tokens: trained on so far.
      bytes: exchanged by all clients so far.
      epsilon: spent so far by the worst account; ``None`` without differential privacy.
      terms: of that epsilon: unit and delta; empty without differential privacy.
      training: loss of the round's cohort, nats per answer token.
      validation: loss on validation records where it was measured, nats per answer token.
    """

    name: str
    tokens: list[float]
    bytes: list[float]
    epsilon: list[float | None]
    terms: str
    training: list[float | None]
    validation: list[float | None]


class Written(NamedTuple):
    """Files, and what they do not show and why."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def write_figures(comparison: Comparison, runs: Mapping[str, Path], folder: Path) -> Written:
    """Writes the figures of a comparison: loss by tokens, bytes and epsilon, and what came of it.

    Args:
      comparison: of the runs.
      runs: their folders by name, as the comparison has them.
      folder: of the figures; made if absent.

    Raises:
      UserError: more runs than can be told apart, or a run's metrics cannot be read.
    """
    if len(runs) > _MOST:
        raise UserError(f"{len(runs)} runs are too many for one figure, which can tell {_MOST} apart; name fewer")
    looks = {name: _look(place) for place, name in enumerate(runs)}
    curves = [curve(name, path / "metrics.jsonl") for name, path in runs.items() if (path / "metrics.jsonl").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    notes = [f"{name} trained nothing: it has no curve" for name in runs if name not in {one.name for one in curves}]
    with styled("compare", **_LOOK):
        for along, label in (("tokens", "tokens trained on"), ("bytes", "bytes exchanged")):
            shown, left = _with_cost(curves, along)
            notes += left
            if shown:
                files += _saved(_loss(shown, along, label, looks), folder / f"loss_by_{along}")
        private, left = _of_one_kind(curves)
        notes += left
        if private:
            label = f"epsilon spent ({private[0].terms})".replace("+/-", "±")
            files += _saved(_loss(private, "epsilon", label, looks), folder / "loss_by_epsilon")
        for measure, label in _FINAL.items():
            if any(run[measure] is not None for run in comparison.runs.values()):
                files += _saved(_final(comparison, measure, label, looks), folder / f"final_{measure}")
    return Written(tuple(files), tuple(dict.fromkeys(notes)))


_FINAL = {
    "nll": "held-out loss\n(nats per answer token)",
    "token_accuracy": "next-token accuracy (%)",
    "choice_accuracy": "multiple choice (%)",
}


def curve(name: str, path: Path) -> Curve:
    """A run by round, from its metrics.

    Args:
      name: to show.
      path: of ``metrics.jsonl``.

    Raises:
      UserError: the file cannot be read.
    """
    lines = read(path)
    spent = [line.get("epsilon") for line in lines]
    return Curve(
        name,
        list(accumulate(float(line["tokens"]) for line in lines)),
        list(accumulate(float(line["upload_bytes"] + line["download_bytes"]) for line in lines)),
        [one and one["max"] for one in spent],
        next((statement.terms(one) for one in spent if one), ""),
        [line["loss"] for line in lines],
        [line["validation"] and line["validation"]["nll"] for line in lines],
    )


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The mean over a window around each value, narrower at both ends so that it stays centred.

    Examples:
      >>> running_mean([1.0, 2.0, 6.0, 2.0], 3).tolist()
      [1.0, 3.0, 3.3333333333333335, 2.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places, half = np.arange(len(values)), width // 2
    reach = np.minimum(half, np.minimum(places, len(values) - 1 - places))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _with_cost(curves: Sequence[Curve], along: str) -> tuple[list[Curve], list[str]]:
    """The runs that have spent something, and a note of those that have not."""
    free = [one.name for one in curves if not any(getattr(one, along))]
    shown = [one for one in curves if any(getattr(one, along))]
    return shown, [f"loss_by_{along} leaves out {', '.join(free)}: there are no {along}"] if free and shown else []


def _of_one_kind(curves: Sequence[Curve]) -> tuple[list[Curve], list[str]]:
    """The private runs with the guarantee of the first: epsilons of other units or deltas have no place on its axis."""
    private = [one for one in curves if one.terms]
    same = [one for one in private if one.terms == private[0].terms]
    others = [f"{one.name} ({one.terms})" for one in private if one.terms != private[0].terms]
    return same, [f"loss_by_epsilon leaves out {', '.join(others)}: another guarantee"] if others else []


def _look(place: int) -> dict[str, Any]:
    """Colour and dashes of the run at this place."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place // len(COLOURS)]}


def _loss(curves: Sequence[Curve], along: str, label: str, looks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss by a cost: on validation records where every run has measured it, else that of training."""
    validated = all(any(value is not None for value in one.validation) for one in curves)
    kind = "validation" if validated else "training"
    figure, axes = _empty(2.1)
    ends: list[tuple[float, str]] = []
    for one in curves:
        points = [
            (x, y) for x, y in zip(getattr(one, along), getattr(one, kind), strict=True) if None not in (x, y) and x > 0
        ]
        if not points:
            continue
        across, values = np.array(points, np.float64).T
        smooth = values if len(values) <= _FEW else running_mean(values, len(values) // 10 | 1)
        if smooth is not values:
            axes.plot(across, values, color=looks[one.name]["color"], linewidth=0.4, alpha=0.3)
        axes.plot(
            across, smooth, **looks[one.name], linewidth=1.2, marker="o" if len(values) == 1 else "", markersize=3
        )
        ends.append((float(smooth[-1]), one.name))
    axes.set_xlabel(label)
    axes.set_ylabel(f"{kind} loss\n(nats per answer token)")
    _scale(axes, [getattr(one, along) for one in curves], {"tokens": _thousands, "bytes": byte_size}.get(along))
    _name_ends(axes, ends, looks)
    return figure


def _scale(axes: Axes, costs: Sequence[Sequence[float]], show: Callable[[float], str] | None) -> None:
    """A linear axis from zero; a log one where the runs' totals are of different magnitudes."""
    totals = [one[-1] for one in costs if one and one[-1]]
    if show is not None and max(totals) > _SPREAD * min(totals):
        axes.set_xscale("log")
        label_log(axes.xaxis, show)
        return
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if show is not None:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value) if value else "0"))


def _thousands(value: float) -> str:
    """A count in thousands or millions."""
    size, unit = (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 1e3 else (1.0, "")
    return f"{value / size:g}{unit}"


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str]], looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Names right of the lines' ends in their colours, moved apart where they would cover each other."""
    shown = labels(list(looks), 16)
    low, high = axes.get_ylim()
    gap = (high - low) * (_SIZE + 1.5) / 72 / 1.55  # inches of axes below the label
    for place, (_, name) in zip(apart([value for value, _ in sorted(ends)], gap), sorted(ends), strict=True):
        axes.annotate(
            shown[name], (1.02, place), xycoords=("axes fraction", "data"), va="center", color=looks[name]["color"]
        )


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Rising places at least ``gap`` apart, as near to rising values as can be (least squares, in blocks).

    Examples:
      >>> apart([0.0, 1.0, 1.0], 1.0)
      [-0.3333333333333333, 0.6666666666666667, 1.6666666666666667]
    """
    blocks: list[tuple[float, int]] = []  # mean of the values less their offsets, and how many they are
    for place, value in enumerate(values):
        mean, count = value - gap * place, 1
        while blocks and blocks[-1][0] >= mean:
            other, more = blocks.pop()
            mean, count = (other * more + mean * count) / (more + count), more + count
        blocks.append((mean, count))
    level = [mean for mean, count in blocks for _ in range(count)]
    return [base + gap * place for place, base in enumerate(level)]


def _final(comparison: Comparison, measure: str, label: str, looks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A dot and its 95% interval for each run, the first at the top."""
    scale = 1.0 if measure == "nll" else 100.0
    names = [name for name, run in comparison.runs.items() if run[measure] is not None]
    shown = labels(list(looks), 24)
    figure, axes = _empty(0.6 + 0.17 * len(names))
    for place, name in enumerate(names):
        run = comparison.runs[name]
        point, low, high = (scale * run[f"{measure}{end}"] for end in ("", "_low", "_high"))
        axes.hlines(place, low, high, color=looks[name]["color"], linewidth=1.2)
        axes.plot(point, place, "o", color=looks[name]["color"], markersize=3.5)
    axes.set_yticks(range(len(names)), [shown[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)
    return figure


def _empty(height: float) -> tuple[Figure, Axes]:
    """A figure of a column's width with one pair of axes."""
    figure = Figure(figsize=(COLUMN, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(which="both", length=0)
    return figure, axes


def labels(names: Sequence[str], most: int) -> dict[str, str]:
    """Names that leave room for the lines, by name; no two become the same.

    What all paths among them have in common goes first (``runs/course``, ``seed-0``), then the middle, as names tend to
    differ at their ends.

    Args:
      names: of runs.
      most: characters that a name should have.
    """
    paths = [name.split("/") for name in names if "/" in name]
    fewest = min((len(path) for path in paths), default=1) - 1
    head = next((place for place in range(fewest) if len({path[place] for path in paths}) > 1), fewest)
    tail = next(
        (place for place in range(fewest - head) if len({path[-1 - place] for path in paths}) > 1), fewest - head
    )
    whole = {
        name: "/".join(name.split("/")[head : len(name.split("/")) - tail]) if "/" in name else name for name in names
    }
    half = (most - 1) // 2
    short = {name: one if len(one) <= most else f"{one[:half]}…{one[-half:]}" for name, one in whole.items()}
    for found in (short, whole):
        if len(set(found.values())) == len(names):
            return found
    return {name: name for name in names}


def _saved(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure in both formats; the PDF has no date, so that equal runs give equal files."""
    files = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
    figure.savefig(files[0], metadata={"CreationDate": None})
    figure.savefig(files[1])
    return files
