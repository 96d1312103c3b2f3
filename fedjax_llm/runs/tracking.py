"""What trackers are told of a run (``wandb_tracker.py``, ``mlflow_tracker.py``), so that none can stop or slow it.

Every tracker works in a thread of its own: a service that hangs holds up nothing, and one that fails is given up, with
a warning, while the run goes on. ``metrics.jsonl`` and the TensorBoard scalars have everything in any case.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from fedjax_llm.errors import UserError
from fedjax_llm.runs import directory
from fedjax_llm.runs.tensorboard import scalars

MEMORY = "tracking.json"
"""The file in a run's folder with each tracker's own id of the run, so that a resume goes on with it."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for its trackers."""
_LONGEST = 200  # characters of a failure
_BY_SITE = ("sites", "accounts")  # what these hold is of single sites


class Run(NamedTuple):
    """What a tracker begins with.

    Attributes:
      config: what ``config.json`` holds.
      folder: of the run.
      name: to show.
      known: the tracker's id of the same run, where it was begun earlier.
    """

    config: Mapping[str, Any]
    folder: Path
    name: str
    known: str | None


class Tracked(NamedTuple):
    """A run as one tracker has begun it; all of it is called in one thread.

    Attributes:
      id: to go on with after a resume.
      scalars: takes a round and its numbers by path.
      finish: takes the summary, flat as scalars are and with texts beside numbers; ``None``: the run has not ended yet.
    """

    id: str
    scalars: Callable[[int, Mapping[str, float]], None]
    finish: Callable[[Mapping[str, float | str] | None], None]


@runtime_checkable
class Tracker(Protocol):
    """A frozen dataclass of a configuration."""

    @property
    def sites(self) -> bool:
        """Whether it is told the figures of single sites, as far as ``metrics.jsonl`` has them."""
        ...

    def check(self) -> None:
        """Refuses what cannot work, before anything is computed.

        Raises:
          UserError: such as a package that is not installed.
        """
        ...

    def begin(self, run: Run) -> Tracked:
        """Begins to track a run, or goes on with it."""
        ...


def refuse(trackers: Any, encrypted: bool) -> None:
    """Refuses what a configuration cannot have as ``output.tracking``.

    Args:
      trackers: the field.
      encrypted: whether the run's folder is encrypted.

    Raises:
      UserError: not a tuple of trackers; or any where nothing of the run may be in clear.
    """
    if not isinstance(trackers, tuple):
        raise UserError(f"output.tracking is {trackers!r}; it must be a tuple, such as (Wandb(project='hospitals'),)")
    for place, tracker in enumerate(trackers):
        if isinstance(tracker, type) or not isinstance(tracker, Tracker):
            raise UserError(
                f"output.tracking[{place}] is {tracker!r}; it must be a tracker, such as Wandb(project='hospitals') or "
                "MLflow()"
            )
    if trackers and encrypted:
        raise UserError(
            "output.tracking and output.encryption do not go together: trackers keep configuration and metrics in "
            "clear, outside of the encrypted folder. Set tracking to (), or encryption to None"
        )


def check(trackers: Sequence[Tracker]) -> None:
    """Refuses trackers that cannot work here, before anything is computed.

    Raises:
      UserError: such as a package that is not installed.
    """
    for tracker in trackers:
        tracker.check()


class Trackers:
    """All trackers of a run; a context manager.

    Args:
      trackers: from the configuration.
      config: what ``config.json`` holds.
      folder: of the run.
      say: is told, once for each tracker, that it was given up.
      patience: seconds to wait for them in the end.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        config: Mapping[str, Any],
        folder: Path,
        say: Callable[[str], None],
        patience: float = PATIENCE,
    ):
        self._say, self._patience, self._folder = say, patience, folder
        known = directory.read_json(folder / MEMORY) if trackers and (folder / MEMORY).exists() else {}
        name = _name(folder)
        self._workers = [_Worker(one, Run(config, folder, name, known.get(repr(one)))) for one in trackers]
        self._summary: Mapping[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end(self._summary)
        for worker in self._workers:
            worker.join(self._patience)
        self._remember()
        self._tell()

    def round(self, line: Mapping[str, Any]) -> None:
        """Hands on a line of metrics; returns at once."""
        for worker in self._workers:
            worker.scalars(line)
        self._remember()
        self._tell()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Says that the run has ended, with what ``summary.json`` holds."""
        self._summary = summary

    def _remember(self) -> None:
        """Keeps the ids that have become known."""
        found = {repr(worker.tracker): worker.id for worker in self._workers if worker.id is not None}
        path = self._folder / MEMORY
        before = directory.read_json(path) if found and path.exists() else {}
        if found.items() - before.items():
            directory.write_json(path, before | found)

    def _tell(self) -> None:
        """Warns of every tracker that was given up since the last time."""
        for worker in self._workers:
            if (why := worker.news()) is not None:
                self._say(
                    f"Warning: tracking by {type(worker.tracker).__name__} is given up, the run goes on: {why} "
                    "(metrics.jsonl has every figure)."
                )


class _Worker:
    """One tracker in its thread."""

    def __init__(self, tracker: Tracker, run: Run):
        self.tracker, self.id = tracker, run.known
        self._orders: SimpleQueue[Callable[[Tracked], None] | None] = SimpleQueue()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True, name=type(tracker).__name__)
        self._thread.start()

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Orders a round to be tracked."""
        numbers = dict(scalars(line if self.tracker.sites else aggregate(line)))
        self._orders.put(lambda tracked: tracked.scalars(line["round"], numbers))

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Orders the end."""
        told = None if summary is None else table(summary if self.tracker.sites else aggregate(summary))
        self._orders.put(lambda tracked: tracked.finish(told))
        self._orders.put(None)

    def join(self, patience: float) -> None:
        """Waits for the end, but not for ever."""
        self._thread.join(patience)
        if self._thread.is_alive():
            self._failure = f"it has not ended within {patience:g} seconds"

    def news(self) -> str | None:
        """Why the tracker was given up, once."""
        failure, self._failure = self._failure, None
        return failure

    def _work(self, run: Run) -> None:
        """Does what is ordered, until the end or a failure."""
        try:
            tracked = self.tracker.begin(run)
            self.id = tracked.id
            while (order := self._orders.get()) is not None:
                order(tracked)
        except Exception as error:  # whatever a service does, the run goes on
            first = str(error).partition("\n")[0][:_LONGEST].rstrip(".")
            self._failure = f"{type(error).__name__}: {first}"


def aggregate(value: Any) -> Any:
    """Metrics or a summary without the figures of single sites.

    Examples:
      >>> aggregate({"round": 1, "sites": {"a": {"loss": 2.5}}, "epsilon": {"max": 3.0, "accounts": {"a": 3.0}}})
      {'round': 1, 'epsilon': {'max': 3.0}}
    """
    if not isinstance(value, Mapping):
        return value
    return {key: aggregate(inner) for key, inner in value.items() if key not in _BY_SITE}


def table(summary: Mapping[str, Any]) -> dict[str, float | str]:
    """A summary as one flat table: numbers as scalars are, and texts (``privacy/line``, ``model/name``) by path."""
    return dict(scalars(summary)) | dict(_texts(summary))


def _texts(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Path and text of every text in nested dictionaries."""
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in _texts(inner, f"{path}/{key}" if path else str(key))]
    return [(path, value)] if isinstance(value, str) else []


def _name(folder: Path) -> str:
    """A run's name: its path below the folder ``runs`` where there is one, so that runs of a sweep differ."""
    parts = folder.absolute().parts
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else ()
    return "/".join(below) or folder.name
