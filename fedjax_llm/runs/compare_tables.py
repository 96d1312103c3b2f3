"""A comparison of runs as a table for a paper (LaTeX with booktabs), a page (Markdown) or a spreadsheet (CSV)."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_llm.errors import UserError
from fedjax_llm.runs import statement
from fedjax_llm.runs.compare import Comparison
from fedjax_llm.runs.directory import write_text
from fedjax_llm.runs.progress import byte_size

_ESCAPES = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}",
} | {sign: "\\" + sign for sign in "&%$#_{}"}  # fmt: skip


class Figure(NamedTuple):
    """A number with its 95% interval as a cell shows it; one without a width has no bounds."""

    point: str
    bounds: str


Cell = str | Figure


def write_tables(comparison: Comparison, paths: Sequence[Path]) -> None:
    """Writes a comparison into files, each in the format that its name ends in.

    Args:
      comparison: of runs.
      paths: with names that end in ``.tex``, ``.md`` or ``.csv``; what stood there is replaced.

    Raises:
      UserError: a name ends in something else, or a file cannot be written.
    """
    for path, form in [(path, format_of(path)) for path in paths]:  # all are known before the first is written
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, form(comparison))


def format_of(path: Path) -> Callable[[Comparison], str]:
    """The format that a file's name ends in.

    Raises:
      UserError: it ends in none that is known.
    """
    formats = {".tex": latex, ".md": markdown, ".csv": spreadsheet}
    if path.suffix not in formats:
        raise UserError(f"--table {path}: a table's file ends in {', '.join(formats)}, which says its format")
    return formats[path.suffix]


def latex(comparison: Comparison) -> str:
    """A ``tabular`` for a table of one's own, which has the caption; it needs the package booktabs."""
    heads, rows = _grid(comparison)
    lines = [
        "% Needs \\usepackage{booktabs}. Macro means over sites, with 95% bootstrap intervals over held-out records.",
        *(f"% {warning}" for warning in comparison.warnings),
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        "\\toprule",
        _latex_line(heads),
        "\\midrule",
        *map(_latex_line, rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def markdown(comparison: Comparison) -> str:
    """A table of runs, what its figures are, and what is not fair about it."""
    heads, rows = _grid(comparison)
    lines = [_markdown_line(heads), _markdown_line(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_markdown_line(row) for row in rows]
    lines += ["", "Macro means over sites, with 95% bootstrap intervals over held-out records."]
    lines += [f"\nWarning: {warning}." for warning in comparison.warnings]
    return "\n".join(lines) + "\n"


def spreadsheet(comparison: Comparison) -> str:
    """Every figure of every run in full precision, a row each; bytes, seconds and nats, empty where there is none."""
    first = next(iter(comparison.runs))
    rows = []
    for name, run in comparison.runs.items():
        privacy = run["privacy"] or dict.fromkeys(("epsilon", "delta", "unit", "adjacency"))
        paired = comparison.differences.get(name, {}).get("macro") or dict.fromkeys(("difference", "low", "high"))
        plain = {key: value for key, value in run.items() if key != "privacy"}
        minus = {f"nll_minus_{first}{end}": paired[key] for key, end in _BOUNDS.items()}
        rows.append({"run": name} | plain | privacy | minus)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


_BOUNDS = {"difference": "", "low": "_low", "high": "_high"}


def _grid(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """Headings and a row for each run; columns that no run has a figure for are left out."""
    first = next(iter(comparison.runs))
    guarantees = [statement.terms(run["privacy"]) for run in comparison.runs.values() if run["privacy"]]
    columns: dict[str, list[Cell]] = {
        "run": list(comparison.runs),
        "rounds": [f"{run['rounds']:,}" for run in comparison.runs.values()],
        "tokens": [_count(run["tokens"]) for run in comparison.runs.values()],
        "bytes": [byte_size(run["bytes"]) if run["bytes"] else "" for run in comparison.runs.values()],
    }
    for terms in dict.fromkeys(guarantees):  # an epsilon means nothing without its unit and delta
        columns[f"epsilon ({terms})"] = [_epsilon(run["privacy"], terms) for run in comparison.runs.values()]
    for name, (measure, digits, scale) in _MEASURES.items():
        columns[name] = [_figure(run, measure, digits, scale) for run in comparison.runs.values()]
    paired = [comparison.differences.get(name, {}).get("macro") for name in comparison.runs]
    columns[f"nats minus {first}"] = [_difference(one) for one in paired]
    kept = {head: cells for head, cells in columns.items() if any(cells)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


_MEASURES = {
    "nats per answer token": ("nll", 3, 1.0),
    "next-token accuracy (%)": ("token_accuracy", 1, 100.0),
    "multiple choice (%)": ("choice_accuracy", 1, 100.0),
}
"""Measure, digits and scale by heading; perplexity is the loss once more."""


def _epsilon(privacy: Mapping[str, Any] | None, terms: str) -> str:
    """A run's epsilon in the column of its own kind of guarantee."""
    if privacy is None:
        return "none"
    return statement.bound(privacy["epsilon"]) if statement.terms(privacy) == terms else ""


def _figure(run: Mapping[str, Any], measure: str, digits: int, scale: float) -> Cell:
    """A measure with its bounds, or nothing."""
    values = [run[f"{measure}{end}"] for end in _BOUNDS.values()]
    if values[0] is None:
        return ""
    point, low, high = (f"{scale * value:.{digits}f}" for value in values)
    return Figure(point, f"[{low}, {high}]")


def _difference(paired: Mapping[str, float] | None) -> Cell:
    """A paired difference with signs, or nothing for the first run."""
    if paired is None:
        return ""
    point, low, high = (f"{paired[key]:+.3f}" for key in _BOUNDS)
    return Figure(point, f"[{low}, {high}]")


def _count(number: float) -> str:
    """A count in thousands or millions: ``192k``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:,.0f}{unit}"
    return f"{number:g}" if number else ""


def _latex_line(cells: Sequence[Cell]) -> str:
    """A line of a tabular."""
    return " & ".join(map(_latex_cell, cells)) + r" \\"


def _latex_cell(cell: Cell) -> str:
    """A cell with true minus signs, its interval smaller."""
    if isinstance(cell, Figure):
        return f"{_minus(cell.point)} {{\\scriptsize {_minus(cell.bounds)}}}"
    text = "".join(_ESCAPES.get(letter, letter) for letter in cell)
    return text.replace("+/-", r"$\pm$").replace("epsilon (", r"$\varepsilon$ (").replace("delta ", r"$\delta$ ")


def _minus(text: str) -> str:
    """Signs as mathematics has them."""
    return text.replace("-", "$-$").replace("+", "$+$")


def _markdown_line(cells: Sequence[Cell]) -> str:
    """A line of a Markdown table."""
    texts = [f"{cell.point} {cell.bounds}" if isinstance(cell, Figure) else cell.replace("|", r"\|") for cell in cells]
    return "| " + " | ".join(texts) + " |"
