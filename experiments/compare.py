"""Lays finished runs side by side: figures, sites, and paired differences against the first.

    python -m experiments.compare runs/quickstart-federated runs/quickstart-centralised
    python -m experiments.compare runs/a runs/b --names FedAvg FedEx --table build/runs.tex build/runs.csv
    python -m experiments.compare runs/a runs/b --figures=build/figures

Figures are a column wide (3.25 inches), as PDF and as PNG: loss by tokens, by bytes and by epsilon, and final figures.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.runs import compare_tables
from fedjax_llm.runs.compare import compare, named, render
from fedjax_llm.runs.keys import using


def show(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")],
    names: tuple[str, ...] = (),
    table: tuple[Path, ...] = (),
    figures: Path | None = None,
    key_file: Path | None = None,
) -> None:
    """Compares finished runs.

    Args:
      runs: their folders; differences are taken against the first.
      names: of the runs, in their order, instead of their folders' names.
      table: files for a table of the runs, each ending in .tex (LaTeX, booktabs), .md (Markdown) or .csv.
      figures: a folder for figures of the runs.
      key_file: of encrypted runs, if the key is not where they say. Tables and figures are in clear.
    """
    for path in table:
        compare_tables.format_of(path)
    console = Console()
    with using(key_file):
        found = compare(runs, names=names)
        render(console, found)
        compare_tables.write_tables(found, table)
        files, notes = list(table), ()
        if figures is not None:
            from fedjax_llm.runs.compare_figures import write_figures  # matplotlib takes a second

            drawn, notes = write_figures(found, named(runs, names), figures)
            files += drawn
    for note in notes:
        console.print(Text(f"note: {note}"))
    for path in files:
        console.print(Text(f"written: {path}"), soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        tyro.cli(show, args=arguments, prog="python -m experiments.compare", description=told(__doc__))
    except UserError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
