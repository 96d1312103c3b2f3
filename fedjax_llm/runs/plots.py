"""A run's figures as inline SVG: text stays text in the reader's fonts, colours are the page's CSS variables.

Figures are 460 px wide, which a phone shows at nearly full size and a desktop two abreast.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedjax_llm.runs.progress import byte_size

MOST_SITES = 40  # in one figure; the table has them all

# Matplotlib wants colours; these stand for the page's, which differ between light and dark.
_INK, _MUTED, _RULE, _BASE, _TUNED = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _BASE: "--base", _TUNED: "--tuned"}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a site may be called "$5 clinic$"
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}
_WIDTH = 6.4  # inches of 72 px


def curves(mean: Sequence[tuple[int, float]], sites: Mapping[str, Sequence[tuple[int, float]]], ylabel: str) -> str:
    """A bold line for the mean over a thin one for each site, by round.

    Args:
      mean: (round, value) of the macro or cohort mean.
      sites: the same by site. With few sites the lines are named at their ends.
      ylabel: what the values are, with the unit.
    """
    with _styled():
        figure, axes = _figure(3.6)
        for points in sites.values():
            dot = "." if len(points) == 1 else ""
            axes.plot(*_columns(points), color=_BASE, linewidth=0.9, alpha=0.6, marker=dot)
        axes.plot(*_columns(mean), color=_TUNED, linewidth=2.2, marker="o" if len(mean) == 1 else "")
        ends = sorted((points[-1][1], name) for name, points in sites.items() if points)
        if 0 < len(ends) <= 8:
            _name_lines(axes, ends)
        elif ends:
            _name_lines(axes, [ends[0], ends[-1]])
        axes.set_xlabel("round")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _svg(figure, f"{ylabel} by round: the mean over sites, and each of {len(sites)} sites")


def site_sizes(sites: Mapping[str, Mapping[str, int]]) -> str:
    """Records by site, held-out beside training ones where both are known.

    Args:
      sites: counts by site, with ``train_records`` and perhaps ``held_out_records``.
    """
    names = list(sites)
    train = np.array([sites[name].get("train_records", 0) for name in names])
    held = np.array([sites[name].get("held_out_records", 0) for name in names])
    with _styled():
        figure, axes = _rows(names)
        places = np.arange(len(names))
        axes.barh(places, train, height=0.55, color=_BASE, label="training")
        if held.any():
            axes.barh(places, held, height=0.55, left=train, color=_INK, label="held out")
            _legend_above(axes)
        for place, total in zip(places, train + held, strict=True):
            axes.annotate(f"{total:,}", (total, place), (4, 0), textcoords="offset points", va="center", size=10)
        axes.set_xlabel("records")
        axes.set_xlim(0, 1.15 * max(1, *(train + held)))
        return _svg(figure, f"Records held by each of {len(names)} sites")


def communication(adapters: Sequence[float], full_model: Sequence[float]) -> str:
    """Bytes sent up and down so far, by round, on a log scale.

    Args:
      adapters: cumulative bytes after each round, as sent.
      full_model: the same if whole models had been exchanged.
    """
    with _styled():
        figure, axes = _figure(3.6)
        rounds = range(1, len(adapters) + 1)
        for values, colour, label in ((full_model, _BASE, "full model"), (adapters, _TUNED, "adapters")):
            thin = _columns(list(zip(rounds, values, strict=True)))
            axes.plot(*thin, color=colour, linewidth=2.2, marker="o" if len(rounds) == 1 else "")
            axes.annotate(
                f"{label}, {byte_size(values[-1])}", (rounds[-1], values[-1]), (0, 6), textcoords="offset points",
                ha="right", size=10.5,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(top=6 * max(full_model[-1], adapters[-1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_size(value)))
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _svg(figure, "Bytes exchanged so far, adapters against full models, by round, log scale")


def base_and_tuned(base: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Held-out loss of each site with its 95% interval, before and after.

    Args:
      base: by site, ``nll, nll_low, nll_high`` (nats per answer token).
      tuned: likewise, or ``None`` for the base alone.
    """
    names = list(base)
    with _styled():
        figure, axes = _rows(names)
        shift = 0.14 if tuned else 0.0
        for figures, colour, label, offset in ((base, _BASE, "base", -shift), (tuned, _TUNED, "tuned", shift)):
            if figures:
                values = [[figures[name][f"nll{end}"] for name in names] for end in ("", "_low", "_high")]
                _dots(axes, values, colour, label, offset)
        _legend_above(axes)
        axes.set_xlabel("held-out loss (nats per answer token)")
        return _svg(figure, f"Held-out loss with 95% intervals, base and tuned, for each of {len(names)} sites")


def differences(paired: Mapping[str, Mapping[str, float]]) -> str:
    """The paired difference of each site with its 95% interval, against zero.

    Args:
      paired: by site, ``difference, low, high`` (nats per answer token).
    """
    names = list(paired)
    with _styled():
        figure, axes = _rows(names)
        values = [[paired[name][end] for name in names] for end in ("difference", "low", "high")]
        axes.axvline(0, color=_INK, linewidth=1)
        _dots(axes, values, _TUNED, "", 0.0)
        axes.set_xlabel("tuned minus base (nats per answer token)")
        return _svg(figure, f"Paired difference of held-out loss with 95% intervals for each of {len(names)} sites")


def epsilon_by_round(
    most: Sequence[tuple[int, float]], least: Sequence[tuple[int, float]], limit: tuple[str, float] | None, terms: str
) -> str:
    """Epsilon spent so far, by round: a line for the worst account, a band down to the best one where they differ.

    Args:
      most: (round, epsilon) of the worst account.
      least: the same of the best account.
      limit: its name and epsilon, such as ``("budget", 8.0)``; drawn as a line.
      terms: unit, adjacency and delta in short.
    """
    with _styled():
        figure, axes = _figure(3.6)
        rounds, high = _columns(most)
        low = _columns(least)[1]
        if low != high:
            axes.fill_between(rounds, low, high, color=_BASE, alpha=0.3, linewidth=0, label="down to the least")
        marker = "o" if len(rounds) == 1 else ""
        axes.plot(rounds, high, color=_TUNED, linewidth=2.2, marker=marker, label="the most of any site")
        if limit:
            axes.axhline(limit[1], color=_INK, linewidth=1, linestyle="--", label=f"{limit[0]}, {limit[1]:g}")
        axes.set_ylim(0, 1.08 * max(high[-1], limit[1] if limit else 0))
        axes.set_xlabel("round")
        axes.set_ylabel(f"epsilon ({terms})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend_above(axes, 3)
        return _svg(figure, f"Epsilon spent so far by round, {terms}")


def loss_by_epsilon(losses: Mapping[str, Sequence[tuple[float, float]]], terms: str) -> str:
    """Losses against the epsilon that they cost.

    Args:
      losses: (epsilon, nats per token) by what they are of, such as ``training``; the last stands out.
      terms: unit, adjacency and delta in short.
    """
    with _styled():
        figure, axes = _figure(3.6)
        for name, points in losses.items():
            last = name == list(losses)[-1]
            axes.plot(
                *_columns(points), color=_TUNED if last else _BASE, linewidth=2.2, label=name,
                marker="o" if len(points) <= 12 else "", markersize=4,
            )  # fmt: skip
        axes.set_xlabel(f"epsilon spent so far ({terms})")
        axes.set_ylabel("loss (nats per answer token)")
        axes.set_xlim(left=0)
        _legend_above(axes)
        return _svg(figure, f"Loss by epsilon spent, {terms}: {', '.join(losses)}")


def _styled() -> Any:
    """The look of all figures, for the time of drawing one."""
    return matplotlib.rc_context(_STYLE)


def aggregation_error(points: Sequence[tuple[int, float]]) -> str:
    """What averaging the factors loses, by round, on a log scale.

    Args:
      points: (round, relative Frobenius distance); zeros are drawn at the least that f32 can tell.
    """
    with _styled():
        figure, axes = _figure(3.6)
        least = 1e-8
        thin = _columns([(number, max(error, least)) for number, error in points])
        axes.plot(*thin, color=_TUNED, linewidth=2.2, marker="o" if len(points) == 1 else "")
        axes.axhline(1e-6, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate("rounding of float32", (1, 1e-6), (0, 4), textcoords="offset points", size=10, color=_MUTED)
        axes.set_yscale("log")
        axes.set_ylim(least / 2, max(10.0 * max(thin[1]), 1e-4))
        axes.set_xlabel("round")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axes.set_ylabel("aggregation error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _svg(figure, "Relative distance of the server's weights from the clients' mean, by round, log scale")


def _figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    return figure, axes


def _rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with a row for each name, the first at the top."""
    figure, axes = _figure(1.1 + 0.29 * len(names))
    axes.set_yticks(range(len(names)), [_short(name) for name in names], color=_INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _dots(axes: Axes, values: Sequence[Sequence[float]], colour: str, label: str, offset: float) -> None:
    """A dot and its interval on every row; ``values`` are points, lows and highs."""
    places = np.arange(len(values[0])) + offset
    axes.hlines(places, values[1], values[2], color=colour, linewidth=1.6)
    axes.plot(values[0], places, "o", color=colour, markersize=5, label=label)


def _legend_above(axes: Axes, columns: int = 2) -> None:
    """A legend in one line above the axes, out of the data's way."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=columns, borderaxespad=0, handletextpad=0.4)


def _name_lines(axes: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """Names at the right of the axes, spread so that they do not cover each other; ``ends`` rise."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    places: list[float] = []
    for value, _ in ends:
        places.append(max(value, places[-1] + gap) if places else value)
    places = [place - max(0.0, places[-1] - high) for place in places]
    for place, (_, name) in zip(places, ends, strict=True):
        axes.annotate(
            _short(name, 20), (1.01, place), xycoords=("axes fraction", "data"), va="center", size=9.5, color=_MUTED
        )


def _columns(points: Sequence[tuple[float, float]], most: int = 300) -> tuple[list[float], list[float]]:
    """Rounds and values, evenly thinned to what a figure can show; the last is kept."""
    step = max(1, -(-len(points) // most))
    kept = list(points[::-1][::step])[::-1]
    return [x for x, _ in kept], [y for _, y in kept]


def _short(name: str, most: int = 26) -> str:
    """A name that fits beside a figure: names tend to differ at the end, so the middle goes."""
    head = most // 3
    return name if len(name) <= most else name[:head].rstrip() + "…" + name[head + 1 - most :].lstrip()


def _svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element for inlining, with ids of its own and a description for screen readers."""
    out, ids = io.StringIO(), "f" + hashlib.sha256(description.encode()).hexdigest()[:6]
    with matplotlib.rc_context({"svg.hashsalt": ids}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts have it, only its width is guessed
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{ids}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib writes a viewBox"
    opening = f'<svg {view[0]} role="img" aria-label="{escape(description)}">'
    return opening + text[text.index(">", view.start()) + 1 :].rstrip()
