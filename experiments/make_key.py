"""Makes the key of encrypted runs.

    python -m experiments.make_key ~/keys/ward.key

Keep it apart from the runs, and a second copy of it in a safe place: nothing opens a run without its key.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.runs import keys


def make_key(path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]) -> None:
    """Writes a new key into a file that only its owner may read.

    Args:
      path: of the file; one that exists is never overwritten.
    """
    keys.make_key(path)
    print(f"{path}: a new key. Use it with output.encryption=Encryption(key_file={str(path)!r})")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        tyro.cli(make_key, args=arguments, prog="python -m experiments.make_key", description=told(__doc__))
    except UserError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
