"""Lays runs side by side: figures, sites, and paired differences against the first.

python -m experiments.compare runs/quickstart-federated runs/quickstart-centralised
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fedjax_llm.errors import UserError, tell
from fedjax_llm.runs.compare import compare, render
from fedjax_llm.runs.keys import using


def show(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], key_file: Path | None = None) -> None:
    """Compares finished runs.

    Args:
      runs: their folders; differences are taken against the first.
      key_file: of encrypted runs, if the key is not where they say.
    """
    with using(key_file):
        render(Console(), compare(runs))


def main() -> int:
    """Runs the command line; returns the exit status."""
    try:
        tyro.cli(show, prog="python -m experiments.compare")
    except UserError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
