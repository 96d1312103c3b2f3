"""A run's folder: made once, reopened only with the same settings, used by one process at a time."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import filelock

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.runs import encryption, keys

CONFIG = "config.json"
_LOCK = ".lock"


def create(path: str | Path, config: Mapping[str, Any]) -> Path:
    """Makes the folder of a new run and writes ``config.json`` into it, and ``encryption.json`` if it is encrypted.

    Args:
      path: absent, or an empty folder.
      config: the resolved experiment, as JSON-able nested dictionaries.

    Returns:
      The folder, absolute.

    Raises:
      UserError: the folder holds another run or other files, or cannot be written, or the key of encryption is missing.
    """
    folder = Path(path).absolute()
    how = keys.of_config(config)
    identity = None if how is None else encryption.new_identity(how, folder)
    made(folder, "run")
    with locked(folder):
        if (folder / CONFIG).exists():
            raise UserError(
                f"{folder} holds another run; choose another folder with --out, or continue that run with --resume"
            )
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (_LOCK, encryption.IDENTITY))
        if others:
            shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            raise UserError(f"{folder} is not empty (it holds {shown}) and is not a run; choose another folder")
        (folder / encryption.IDENTITY).unlink(missing_ok=True)  # left by a start that was killed here
        if identity is not None:
            write_json(folder / encryption.IDENTITY, identity)
        write_json(folder / CONFIG, config)
    return folder


def reopen(path: str | Path, config: Mapping[str, Any], may_change: Sequence[str] = ()) -> Path:
    """Opens an existing run in order to continue it with the settings that it was started with.

    Settings in ``may_change`` may differ; ``config.json`` then takes the new ones.

    Args:
      path: the folder of a run.
      config: the resolved experiment, as JSON-able nested dictionaries.
      may_change: dotted paths or patterns such as ``execution.*``.

    Returns:
      The folder, absolute.

    Raises:
      UserError: there is no run, its ``config.json`` cannot be read, other settings differ (they are listed), one is
        encrypted and the other is not, or the key of an encrypted run is missing or another.
    """
    folder = Path(path).absolute()
    if not (folder / CONFIG).exists():
        raise UserError(f"there is no run to resume in {folder} (no {CONFIG}); leave out --resume to start one")
    before = read_json(folder / CONFIG)
    now = _plain(config)
    if (keys.of_config(before) is None) != (keys.of_config(now) is None):
        way = "without" if keys.of_config(before) is None else "with"
        raise UserError(
            f"the run in {folder} was started {way} output.encryption; go on with it {way}, or start a new run in "
            "another folder: part of the files would be in clear"
        )
    advice = "resume it with the settings that it was started with, or start a new run in another folder"
    check_same(before, now, f"the run in {folder} was started with", advice, may_change)
    encryption.vault_of(folder)  # a key that does not fit is told before anything is touched
    if before != now:
        with locked(folder):
            write_json(folder / CONFIG, now)
    return folder


def made(path: str | Path, what: str) -> Path:
    """A folder for results, made if absent; absolute.

    Args:
      path: of the folder.
      what: has its results there, for the message: ``run``, ``sweep``.

    Raises:
      UserError: it cannot be made.
    """
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the {what}'s folder {folder}: {error.strerror}; choose another") from error
    return folder


def refuse_absent(path: Path) -> None:
    """Refuses a folder that does not exist, and names the nearest beside it that are runs.

    Raises:
      UserError: there is no such folder.
    """
    if path.is_dir():
        return
    parent = path.parent
    runs = [one.name for one in parent.iterdir() if (one / CONFIG).exists()] if parent.is_dir() else []
    raise UserError(f"{path} is not the folder of a run, it does not exist{nearest(path.name, runs)}")


def check_same(before: Any, now: Any, what: str, advice: str, may_change: Sequence[str] = ()) -> None:
    """Refuses to go on with results of other settings, and says which differ.

    Args:
      before: the settings that results are of, as JSON has them.
      now: those that are wanted.
      what: has the results, as the beginning of a sentence that ends in "other settings".
      advice: what to do.
      may_change: as for :func:`differences`.

    Raises:
      UserError: any other setting differs.
    """
    changed = differences(before, now, may_change)
    if changed:
        listed = "\n".join("  " + line for line in changed)
        raise UserError(f"{what} other settings:\n{listed}\n{advice}")


def differences(old: Any, new: Any, may_change: Sequence[str] = ()) -> list[str]:
    """What differs between two configs, a line each: ``lora.rank: 8 -> 16``, in the order of the paths.

    Args:
      old: nested dictionaries and lists, as JSON has them.
      new: likewise.
      may_change: dotted paths, or patterns of ``fnmatch`` (``execution.*``), that are left out.
    """
    before, after = dict(_leaves(_plain(old))), dict(_leaves(_plain(new)))
    lines = []
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path, "(absent)"), after.get(path, "(absent)")
        if was != now and not any(fnmatchcase(path, pattern) for pattern in may_change):
            lines.append(f"{path}: {was} -> {now}")
    return lines


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the lock is the kernel's, so a killed process leaves none behind.

    Raises:
      UserError: another process holds it, or the folder cannot be written.
    """
    lock = filelock.FileLock(folder / _LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"another process is using the run in {folder}; wait for it, or choose another") from error
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose a folder that can be written") from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all (a temporary file beside it, synced, renamed), sealed in an encrypted run.

    Raises:
      UserError: the disk is full or the file cannot be written; what stood there before stays.
      ValueError: a number is NaN or infinite, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all, sealed in an encrypted run.

    Raises:
      UserError: the disk is full or the file cannot be written; what stood there before stays.
    """
    write_bytes(path, encryption.seal(path, text.encode("utf-8")))


def write_bytes(path: Path, data: bytes | bytearray) -> None:
    """Writes a file whole or not at all, as it is.

    Raises:
      UserError: the disk is full or the file cannot be written; what stood there before stays.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600; others may read a run
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run, encrypted or not.

    Raises:
      UserError: it is missing or is not JSON, or as for :func:`~fedjax_llm.runs.encryption.read`.
    """
    try:
        return json.loads(encryption.read(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {path.parent} the folder of a run that has ended?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The message for a failed write: what, why, and what to do about a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"no space left to write {path} ({error.strerror}); free some, then continue with --resume")
    return UserError(f"cannot write {path}: {error.strerror or error}")


def _plain(value: Any) -> Any:
    """The value as it reads back from a JSON file: tuples are lists, keys are text."""
    return json.loads(json.dumps(value, allow_nan=False))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and JSON text of every leaf; empty containers are leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
