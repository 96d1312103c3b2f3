"""From the configuration of an attack to what carries it out: a frozen dataclass each, and a function beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_llm.config import from_file
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.audit_run import Audit, run_audit
from fedjax_llm.experiment.course import Course, run_course
from fedjax_llm.experiment.curious_server import CuriousServer, run_curious_server
from fedjax_llm.experiment.memorisation import Memorisation, run_memorisation
from fedjax_llm.experiment.open_model import OpenModel, run_open_model

RUNNERS: tuple[tuple[type, Callable[[Any, Path, Console], int]], ...] = (
    (Audit, run_audit),
    (Course, run_course),
    (CuriousServer, run_curious_server),
    (Memorisation, run_memorisation),
    (OpenModel, run_open_model),
)


def load(path: Path) -> Any:
    """The attack of a Python file with ``get_attack()``.

    Raises:
      UserError: as for ``config.load``.
    """
    return from_file(path, "get_attack", object)


def run_attack(attack: Any, folder: Path, console: Console) -> int:
    """Carries out an attack, or what is left of it.

    Args:
      attack: one of the dataclasses above.
      folder: for its results.
      console: where to show progress.

    Returns:
      The exit status.

    Raises:
      UserError: it is none of them, or what they raise.
    """
    for kind, runner in RUNNERS:
        if isinstance(attack, kind):
            return runner(attack, folder, console)
    known = ", ".join(kind.__name__ for kind, _ in RUNNERS)
    raise UserError(f"get_attack() gave a {type(attack).__name__}; it must give one of {known}")
