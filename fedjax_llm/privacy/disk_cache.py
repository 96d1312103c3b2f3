"""Figures of the accountants, kept on disk: they take seconds, and every run and report asks for the same ones."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fedjax_llm.assets import cache_dir

FORMAT = 1
"""Part of every key: raise it whenever the accounting or the calibration computes anything differently."""

_Answer = TypeVar("_Answer")

_seen: dict[Path, Any] = {}


def remembered(question: str, inputs: Mapping[str, object], compute: Callable[[], _Answer]) -> _Answer:
    """The value of ``compute()``: from this process, else from the cache folder, else computed and kept.

    A file of the cache that is damaged, or answers another question, is ignored and rewritten; a folder that cannot be
    written costs time and nothing else. Runs may read and write at the same time.

    Args:
      question: what is computed.
      inputs: all that the answer depends on, apart from the versions of dp_accounting and of this package's accounting;
        of values that JSON can hold.
      compute: has the answer, which must be a function of the inputs, and a value that JSON gives back as it was (a
        number, text, a list); its exceptions pass, and nothing is kept.
    """
    asked = {"question": question, "format": FORMAT, "dp_accounting": version("dp-accounting"), **inputs}
    key = json.dumps(asked, sort_keys=True)
    path = cache_dir() / "privacy" / f"{_sha256(key)}.json"
    if path not in _seen:
        value = _read(path, key)
        if value is None:
            value = compute()
            _write(path, key, value)
        _seen[path] = value
    return _seen[path]


def _sha256(text: str) -> str:
    """In hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(key: str, value: object) -> str:
    """Of a value and what it answers."""
    return _sha256(f"{key} {json.dumps(value)}")


def _read(path: Path, key: str) -> Any:
    """The value in a file, or ``None`` where there is none to be trusted."""
    try:
        entry = json.loads(path.read_text())
        # The digest binds the value to its key: a flipped digit would be an epsilon that nobody computed.
        return entry["value"] if entry["sha256"] == _digest(key, entry["value"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: str, value: object) -> None:
    """Puts the file in place in one step, so that no reader sees a half of it."""
    entry = {"asked": json.loads(key), "value": value, "sha256": _digest(key, value)}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
        try:
            with open(handle, "w") as file:
                json.dump(entry, file, indent=1)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
