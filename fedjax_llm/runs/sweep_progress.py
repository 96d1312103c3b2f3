"""What the user sees while a sweep goes on: a line a run when it has ended, and in a terminal a bar over the runs."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from fedjax_llm.runs.progress import duration


class SweepProgress:
    """The display of a sweep, as a context manager.

    Args:
      total: how many runs are left.
      console: where to print.
    """

    def __init__(self, total: int, console: Console):
        self._total, self._ended, self._console = total, 0, console
        self._began = self._run_began = time.monotonic()
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._live.add_task("Sweep", total=total, note="")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._live.stop()

    def begin(self, name: str) -> None:
        """Shows which run is going on."""
        self._run_began = time.monotonic()
        self._live.update(self._task, description=name)

    def done(self, name: str, loss: float) -> None:
        """Shows a run that has ended: its held-out loss in nats per answer token, its seconds, the time left."""
        self._line(f"{name}: {loss:.4f} nats per token")

    def failed(self, name: str, reason: str) -> None:
        """Shows a run that has failed, and why."""
        self._line(f"{name}: failed: {reason}")

    def refused(self, name: str, reason: str) -> None:
        """Shows a run that cannot be, and why."""
        self._console.print(Text(f"{name}: failed: {reason}"), soft_wrap=True)

    def _line(self, what: str) -> None:
        """Prints a line for a run that has ended, and moves the bar."""
        now = time.monotonic()
        self._ended += 1
        left = duration((now - self._began) / self._ended * (self._total - self._ended))
        count = f"{self._ended}/{self._total}, {left} left"
        self._console.print(Text(f"{what}  {duration(now - self._run_began)}  ({count})"), soft_wrap=True)
        self._live.update(self._task, advance=1, note=f"{left} left")
