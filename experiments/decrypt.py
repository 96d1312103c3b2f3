"""Makes a copy in clear of an encrypted run that has ended.

    python -m experiments.decrypt runs/mine /secure/place/mine

Its ``adapter/`` can be used with PEFT, its ``report.html`` opens in a browser.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.runs.directory import refuse_absent
from fedjax_llm.runs.keys import using
from fedjax_llm.runs.plain_copy import plain_copy

Folder = Annotated[Path, tyro.conf.Positional]


def decrypt(
    run: Annotated[Folder, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Folder, tyro.conf.arg(metavar="OUT")],
    key_file: Path | None = None,
) -> None:
    """Copies an encrypted run's files, but for its checkpoints, in clear.

    Args:
      run: the folder of the run.
      out: a new folder. Whoever can read it can read the text: keep it no longer than needed.
      key_file: of the run, if the key is not where the run says.
    """
    refuse_absent(run)
    with using(key_file):
        print(f"In clear: {plain_copy(run, out)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        tyro.cli(decrypt, args=arguments, prog="python -m experiments.decrypt", description=told(__doc__))
    except UserError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
