"""Errors for people: what is wrong, with which value or file, and what to do.

The mains in ``experiments/`` print a :class:`UserError` as one plain message and exit with status 2;
anything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message says what, where, and how."""


def nearest(name: str, options: Iterable[str], most: int = 3) -> str:
    """A clause such as ``"; did you mean 'q_proj'?"``, or the known options where nothing is near.

    Args:
      name: what the user wrote.
      options: what would have been accepted.
      most: how many near names to show.

    Examples:
      >>> nearest("adamm", ["adam", "sgd"])
      "; did you mean 'adam'?"
    """
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=most, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(option) for option in close) + "?"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"; known: {shown}" if options else ""


def tell(error: UserError) -> int:
    """Prints the message on standard error, as it stands; returns the exit status of a main that ends with it."""
    from rich.console import Console

    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2
