"""The key of encrypted runs: how it is written, where it is kept, and where it may not be."""

import base64
import binascii
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError

KEY_VARIABLE = "FEDJAX_LLM_KEY"
"""The environment variable that is asked for a key where the recorded place has none."""
KEY_BYTES = 32

_GIVEN: ContextVar[tuple[Path, bytes] | None] = ContextVar("key file", default=None)


@dataclass(frozen=True)
class Encryption:
    """Where the key of an encrypted run is: exactly one of the two.

    The key is 32 bytes, as 64 hex digits, as base64, or (in a file) raw; ``experiments.make_key`` makes one.

    Attributes:
      key_file: a file, not in the run's folder nor beside it. It must be readable until the run has ended.
      key_variable: the name of an environment variable that holds the key as text.
    """

    key_file: str | None = None
    key_variable: str | None = None

    def __post_init__(self) -> None:
        """Refuses neither and both, and a key where its place should be named: ``config.json`` would hold it."""
        if (self.key_file is None) == (self.key_variable is None):
            which = "neither" if self.key_file is None else "both"
            raise UserError(
                f"output.encryption has {which} of key_file and key_variable; set one of them: where the key is kept"
            )
        for name in ("key_file", "key_variable"):
            if isinstance(value := getattr(self, name), str) and _decoded(value) is not None:
                raise UserError(
                    f"output.encryption.{name} is itself a key; it must name the place where the key is kept"
                )
        if isinstance(self.key_variable, str) and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise UserError(
                "output.encryption.key_variable is not the name of an environment variable, such as RUN_KEY"
            )


def of_config(config: Any) -> Encryption | None:
    """The encryption that a run's configuration asks for, from its nested dictionaries; ``None``: none."""
    output = config.get("output") if isinstance(config, Mapping) else None
    how = output.get("encryption") if isinstance(output, Mapping) else None
    return Encryption(how.get("key_file"), how.get("key_variable")) if isinstance(how, Mapping) else None


def key_of(how: Encryption, run: Path) -> bytes:
    """The user's key: from :func:`using`, else from the recorded place, else from ``FEDJAX_LLM_KEY``.

    Args:
      how: where it should be.
      run: the run's folder, which must not have the key in it or beside it.

    Raises:
      UserError: it is in none of these places, or what is there is no key.
    """
    if (given := _GIVEN.get()) is not None:
        _check_apart(given[0], run)
        return given[1]
    if how.key_file is not None:
        path = Path(how.key_file).expanduser()
        if path.exists():
            _check_apart(path, run)
            return _read_key(path)
    for name in (how.key_variable, KEY_VARIABLE):
        if name is not None and (text := os.environ.get(name)) is not None:
            return parse_key(text.encode("utf-8", "surrogateescape"), f"the environment variable {name}")
    sought = f"the file {how.key_file}" if how.key_file is not None else f"the environment variable {how.key_variable}"
    raise UserError(
        f"the key of the encrypted run {run} is missing: there is neither {sought} nor the environment variable "
        f"{KEY_VARIABLE}. Name its file with --key-file, or put it back"
    )


@contextmanager
def using(key_file: Path | None) -> Iterator[None]:
    """Takes the key from this file (read once), whatever a run's configuration says; ``None`` changes nothing.

    Raises:
      UserError: there is no such file, or it holds no key.
    """
    if key_file is None:
        yield
        return
    if _decoded(str(key_file)) is not None:
        raise UserError(
            "--key-file is itself a key; it must name a file that holds one. Make another: this one was shown"
        )
    path = key_file.expanduser()
    token = _GIVEN.set((path, _read_key(path)))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def make_key(path: Path) -> None:
    """Writes a new key, as hex digits, into a file that its owner alone may read.

    Raises:
      UserError: the file exists, or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(os.urandom(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise UserError(f"{path} exists; a key is never overwritten, what it encrypted would be lost") from None
    except OSError as error:
        raise UserError(f"cannot write the key {path}: {error.strerror}") from error


def parse_key(raw: bytes, where: str) -> bytes:
    """A key from its text (64 hex digits, or base64) or, if it is no text, from its 32 bytes.

    Raises:
      UserError: it is none of these; the message never holds it.
    """
    if not re.fullmatch(rb"[\t\n\r -~]*", raw):
        if len(raw) == KEY_BYTES:
            return raw
        raise UserError(f"{where} holds {len(raw)} bytes, or more, that are no text; a raw key has exactly {KEY_BYTES}")
    text = raw.decode("ascii").strip()
    key = _decoded(text)
    if key is None:
        raise UserError(
            f"{where} holds {len(text)} characters, which are neither 64 hex digits nor {KEY_BYTES} bytes in base64; "
            "python -m experiments.make_key PATH makes a key"
        )
    return key


def _decoded(text: str) -> bytes | None:
    """The 32 bytes that hex or base64 text stands for, if it does."""
    text = text.strip()
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text)
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None


def _read_key(path: Path) -> bytes:
    """The key of a file; warns where others can read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(1024)
    except OSError as error:
        raise UserError(f"the key file {path} cannot be read: {error.strerror}") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        warnings.warn(f"the key file {path} is open to others than its owner: chmod 600 {path}", stacklevel=1)
    return parse_key(raw, f"the key file {path}")


def _check_apart(path: Path, run: Path) -> None:
    """Refuses a key that whoever takes the run's folder would take along."""
    path, run = path.resolve(), run.resolve()
    if path.is_relative_to(run) or path.parent == run.parent:
        where = "in the run's folder" if path.is_relative_to(run) else "beside the run's folder"
        raise UserError(
            f"the key file {path} is {where} {run}; keep it elsewhere, so that they do not get lost together"
        )
