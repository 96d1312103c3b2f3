"""``metrics.jsonl``: one JSON object a round, on the disk before the round's checkpoint is.

In an encrypted run every line is an envelope in base64, bound to the byte at which it begins.
"""

import base64
import binascii
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.runs.directory import cannot_write, write_bytes
from fedjax_llm.runs.encryption import Vault, vault_of


class MetricsLog:
    """Appends lines to a file, each synced to the disk before :meth:`append` returns.

    Floats are written so that they read back bit for bit; NaN and infinities become ``null``.
    """

    def __init__(self, path: Path):
        self._path, self._vault = path, vault_of(path.parent)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one round's line.

        Raises:
          UserError: the disk is full or the file cannot be written; no part of the line stays.
        """
        text = json.dumps(_jsonable(line), allow_nan=False) + "\n"
        try:
            with open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                data = _stored(text, self._path, self._vault, size)
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
          UserError: a line before the last is not a JSON object with a ``round``, or was changed in an encrypted file.
        """
        if not self._path.exists():
            return 0
        raw = _texts(self._path, self._vault)
        kept = [text for text, line in zip(raw, _parse(raw, self._path), strict=False) if line["round"] <= last]
        if len(kept) < len(raw):
            data = bytearray()
            for text in kept:
                data += _stored(text, self._path, self._vault, len(data))
            write_bytes(self._path, data)
        return len(raw) - len(kept)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a half-written line at the end is left out.

    Raises:
      UserError: the file is missing, or another line is not a JSON object with a ``round`` (its number is given), or
        was changed in an encrypted file, or the key of that is missing.
    """
    try:
        raw = _texts(path, vault_of(path.parent))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    return _parse(raw, path)


def plain_text(path: Path) -> str:
    """The whole lines of a metrics file as they are without encryption.

    Raises:
      UserError: as for :func:`read`, but for lines that are not JSON.
    """
    return "".join(text for text in _texts(path, vault_of(path.parent)) if text.endswith("\n"))


def deterministic(line: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a line that is a function of config and seed: everything but ``timing``."""
    return {key: value for key, value in line.items() if key != "timing"}


def _texts(path: Path, vault: Vault | None) -> list[str]:
    """The lines in clear with their ends; an unfinished last one has no end, and is in clear or not."""
    if vault is None:
        return path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    *lines, torn = path.read_bytes().split(b"\n")
    texts, begin = [], 0
    for line in lines:
        texts.append(_opened(line, path, vault, begin))
        begin += len(line) + 1
    if torn and _is_whole(torn[:-1], path, vault, begin):
        raise UserError(f"{path} was changed since the run wrote it: its last line ends in another byte")
    return [*texts, torn.decode("ascii", "replace")] if torn else texts


def _stored(text: str, path: Path, vault: Vault | None, begin: int) -> bytes:
    """A line as it stands in the file, beginning at a byte."""
    data = text.encode("utf-8")
    return data if vault is None else base64.b64encode(vault.seal(data, _place(path, vault, begin))) + b"\n"


def _opened(line: bytes, path: Path, vault: Vault, begin: int) -> str:
    """The text of an encrypted line."""
    try:
        sealed = base64.b64decode(line)
    except binascii.Error:
        sealed = b""
    if base64.b64encode(sealed) != line:  # some other texts decode to the same bytes
        raise UserError(f"{path} was changed since the run wrote it: at byte {begin} there is no whole line")
    return vault.unseal(sealed, _place(path, vault, begin)).decode("utf-8")


def _is_whole(line: bytes, path: Path, vault: Vault, begin: int) -> bool:
    """Whether this is all of an encrypted line but its end: then it was not interrupted while it was written."""
    try:
        return bool(_opened(line, path, vault, begin))
    except UserError:
        return False


def _place(path: Path, vault: Vault, begin: int) -> str:
    """What a line is bound to."""
    return f"{vault.place(path)} at byte {begin}"


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
