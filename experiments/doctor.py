"""Checks this computer: whether experiments can run here, and what to do where they cannot.

    python -m experiments.doctor
    python -m experiments.doctor --offline --out=/data/runs

Python and packages, devices, memory, disk, downloads and their hashes, the network, the clock, optional extras. The
exit status is 1 if something must be fixed.
"""

import sys
from pathlib import Path

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.experiment import doctor


def check(out: Path = Path("runs"), offline: bool = False) -> int:
    """Checks this computer.

    Args:
      out: the folder in which runs are to be written.
      offline: leave the network alone.
    """
    console = Console()
    findings = doctor.examine(out, offline=offline)
    console.print(doctor.table(findings))
    wrong = [one.what for one in findings if one.must]
    console.print(f"To be fixed: {', '.join(wrong)}." if wrong else "Nothing must be fixed.", highlight=False)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return tyro.cli(check, args=arguments, prog="python -m experiments.doctor", description=told(__doc__))


if __name__ == "__main__":
    sys.exit(main())
