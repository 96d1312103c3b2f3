"""A metrics line as TensorBoard scalars, so that any viewer can follow a run."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedjax_llm.runs import encryption, statement


class Scalars:
    """Writes scalars into a folder, but none in an encrypted run, which no viewer could read; a context manager.

    Args:
      folder: of the event files.
      resumed_at: the first round that is written again after a resume; what an earlier process wrote from there on is
        dropped by the viewer.
      say: is told, once, that none are written.
    """

    def __init__(self, folder: str | Path, resumed_at: int | None = None, say: Callable[[str], None] = lambda _: None):
        self._writer: Any = None
        if encryption.vault_of(Path(folder)) is not None:
            say("The run is encrypted: no TensorBoard scalars are written.")
            return
        import tensorboardX  # slow to import where torch is installed, which it then loads

        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=resumed_at, flush_secs=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def round(self, line: Mapping[str, Any]) -> None:
        """Writes every number of a metrics line under its path (``sites/nervous/loss``), at the line's round.

        The description of ``epsilon/max`` and its like names unit, adjacency and delta.
        """
        if self._writer is None:
            return
        epsilon = line.get("epsilon")
        guarantee = "" if epsilon is None else f"Spent so far, {statement.terms(epsilon)} (add or remove one unit)"
        for name, value in scalars(line):
            about = guarantee if name.startswith("epsilon/") else ""
            self._writer.add_scalar(name, value, line["round"], summary_description=about)
        self._writer.flush()  # a checkpoint of this round may outlive the process


def scalars(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Path and value of every number in nested dictionaries, but the round itself; lists count their length.

    Examples:
      >>> list(scalars({"round": 1, "loss": 2.5, "excluded": ["a"], "epsilon": None}))
      [('loss', 2.5), ('excluded', 1.0)]
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if path or key != "round":
                yield from scalars(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        yield path, float(len(value))
    elif isinstance(value, int | float):
        yield path, float(value)
