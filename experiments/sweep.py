"""Compares algorithms over data skews and seeds: a grid of runs in one process, one table, and curves.

    python -m experiments.sweep --config=configs/sweeps/aggregation_small.py
    python -m experiments.sweep --config=configs/sweeps/aggregation_small.py --seeds 0 --out=runs/one-seed

The same command again goes on where it ended: finished runs stay, one that was stopped continues. ``table.md``,
``table.csv``, ``sweep.json`` and the curves are in the sweep's folder, every run with all its files in one of its own
(``<algorithm>/<data>/seed-<n>``), which ``experiments.compare`` can lay side by side.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell


@dataclass(frozen=True)
class Command:
    """Runs a sweep, or what is left of it.

    Attributes:
      config: a Python file with ``get_sweep() -> Sweep``.
      out: the sweep's folder; ``runs/<name of the sweep>`` if not given.
      seeds: instead of those of the file; more can be added later.
    """

    config: str
    out: Path | None = None
    seeds: tuple[int, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if a run of the sweep failed, 2 if there can be no sweep."""
    command = tyro.cli(Command, args=arguments, prog="python -m experiments.sweep", description=told(__doc__))
    console = Console()
    try:
        from fedjax_llm.experiment import sweep

        wanted = sweep.load(command.config)
        if command.seeds:
            wanted = dataclasses.replace(wanted, seeds=command.seeds)
        folder = command.out or Path("runs") / sweep.folder_name(wanted.name)
        return sweep.run_sweep(wanted, folder, console=console)
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
