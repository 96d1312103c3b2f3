"""``metrics.jsonl``: one JSON object a round, on the disk before the round's checkpoint is."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.runs.directory import cannot_write, write_text


class MetricsLog:
    """Appends lines to a file, each synced to the disk before :meth:`append` returns.

    Floats are written so that they read back bit for bit; NaN and infinities become ``null``.
    """

    def __init__(self, path: Path):
        self._path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one round's line.

        Raises:
          UserError: the disk is full or the file cannot be written; no part of the line stays.
        """
        data = (json.dumps(_jsonable(line), allow_nan=False) + "\n").encode("ascii")
        try:
            with open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    written = 0
                    while written < len(data):  # a nearly full disk takes a part, then refuses the rest
                        written += file.write(data[written:]) or 0
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def truncate_after(self, last: int) -> int:
        """Drops the lines of rounds after ``last`` and a half-written line at the end, all at once or not at all.

        Returns:
          How many lines were dropped.

        Raises:
          UserError: a line before the last is not a JSON object with a ``round``.
        """
        if not self._path.exists():
            return 0
        raw = self._path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        kept = [text for text, line in zip(raw, _parse(raw, self._path), strict=False) if line["round"] <= last]
        if len(kept) < len(raw):
            write_text(self._path, "".join(kept))
        return len(raw) - len(kept)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a half-written line at the end is left out.

    Raises:
      UserError: the file is missing, or another line is not a JSON object with a ``round`` (its number is given).
    """
    try:
        raw = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    return _parse(raw, path)


def deterministic(line: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a line that is a function of config and seed: everything but ``timing``."""
    return {key: value for key, value in line.items() if key != "timing"}


def _parse(raw: list[str], path: Path) -> list[dict[str, Any]]:
    """The objects of all lines but an unfinished last one."""
    lines = []
    for number, text in enumerate(raw, 1):
        if not text.endswith("\n"):
            break  # the process was killed while it wrote
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); remove the line or restore the file"
            ) from error
        if not isinstance(line, dict) or not isinstance(line.get("round"), int):
            raise UserError(f"{path}, line {number}: not an object with a whole number 'round'")
        lines.append(line)
    return lines


def _jsonable(value: Any) -> Any:
    """The value as JSON has it: NumPy scalars are numbers, what is not finite is ``None``."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    return value
