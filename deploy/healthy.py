"""Whether a container does its work: a SuperLink or a SuperNode runs in it (exit status 0)."""

import sys
from pathlib import Path


def commands() -> str:
    """The command lines of all processes here."""
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() + b"\n"
        except OSError:
            continue  # it has ended meanwhile
    return found.decode("utf-8", "replace")


if __name__ == "__main__":
    running = commands()
    sys.exit(0 if "flower-superlink" in running or "flower-supernode" in running else 1)
