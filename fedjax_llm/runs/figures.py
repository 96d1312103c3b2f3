"""The look of figures that are files of their own, and what such a file holds (``plots.py`` draws a report's own)."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Colours by Okabe and Ito, which people with colour blindness can tell apart.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may be "$5"
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def styled(salt: str, **changes: Any) -> Any:
    """The look, for the time of drawing.

    Args:
      salt: makes the ids in a file the same each time it is drawn.
      changes: Matplotlib's parameters, with underscores for dots: ``legend_fontsize=9``.
    """
    more = {name.replace("_", "."): value for name, value in changes.items()}
    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt, **more})


def empty(width: float, height: float) -> Figure:
    """A figure without axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def content(figure: Figure) -> str:
    """The content of a figure's SVG file."""
    out = io.StringIO()
    figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})
    return out.getvalue()


def label_log(axis: Axis, show: Callable[[float], str]) -> None:
    """Labels a log axis in plain text: its decades, and where these are fewer than two what lies between.

    Args:
      axis: whose view is set.
      show: a value as text.
    """
    low, high = axis.get_view_interval()
    decades = FuncFormatter(lambda value, _: show(value))
    between = FuncFormatter(lambda value, _: show(value) if f"{value:e}"[0] in "25" else "")
    axis.set_major_formatter(decades)
    axis.set_minor_formatter(between if high < 100 * low else NullFormatter())
