"""The ledger of what a run released: ``ledger.jsonl``, append-only, each line on the disk before its noise is drawn.

The first line is a header, every other one an entry: a round, and the events that it releases by account. A line is
canonical JSON (sorted keys, no spaces, ASCII). Its ``hash`` is the sha256 of the line without it, and each entry holds
the hash of the line before. So a line that is changed, moved or removed is noticed. Lines removed from the end are
noticed by whoever kept a later :func:`head`, as a run's checkpoints do. Somebody who writes the whole chain anew is
not: the ledger guards against accidents and oversights, it is not signed.

A line is written before its noise is drawn, so a killed run has charged for at least what it released.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.events import Event, merge
from fedjax_llm.privacy.mechanism import EVERY_SITE
from fedjax_llm.types import Unit

LEDGER = "ledger.jsonl"
"""The ledger's name in the folder of a run."""
VERSION = 1


@dataclass(frozen=True)
class Header:
    """What the entries of a ledger are about.

    Attributes:
      unit: of privacy.
      adjacency: the neighbouring relation in words.
      mechanism: its name.
      delta: of the guarantee.
      accountant: ``pld`` or ``rdp``.
      randomness: where noise comes from: ``secret`` or ``reproducible``.
      accounts: site -> how many units it trains on.
      shared: sets of sites that hold data of the same unit, whose events add up for it.
      config: :func:`config_hash` of the run's configuration.
      version: of the format.
    """

    unit: Unit
    adjacency: str
    mechanism: str
    delta: float
    accountant: Literal["pld", "rdp"]
    randomness: str
    accounts: Mapping[str, int]
    shared: tuple[tuple[str, ...], ...]
    config: str
    version: int = VERSION


@dataclass(frozen=True)
class Entry:
    """One release.

    Attributes:
      index: its place among the entries, from 0.
      round: of the run.
      attempt: how often the round was released before with other noise.
      computation: a hash of all that decides the released bits.
      events: account -> what is released about it.
    """

    index: int
    round: int
    attempt: int
    computation: str
    events: Mapping[str, Event]


@dataclass(frozen=True)
class Contents:
    """A ledger as read, its chain verified.

    Attributes:
      header: the first line.
      entries: the other lines.
      hashes: of all lines, the header's first.
      size: bytes of the whole lines.
      torn: bytes of a half-written line after them. It was never synced, so nothing was released on it; the next
        :func:`append` removes it.
    """

    header: Header
    entries: tuple[Entry, ...]
    hashes: tuple[str, ...]
    size: int
    torn: int = 0


@dataclass
class Ledger:
    """An open ledger, for the one process that holds the run's lock."""

    path: Path
    contents: Contents


def create(path: Path, header: Header) -> Ledger:
    """Makes a ledger with its header, synced with its folder; it exists whole or not at all.

    Raises:
      UserError: there is a ledger already, or the file cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists; what was released stays charged. Choose another folder for a new run")
    line, digest = _sealed(_header_fields(header))
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return Ledger(path, Contents(header, (), (digest,), len(line)))


def reopen(path: Path, header: Header, known: str | None) -> Ledger:
    """Opens the ledger of a run that goes on.

    Args:
      path: of the ledger.
      header: as the run would write it now.
      known: the :func:`head` in the checkpoint that the run goes on from; ``None``: from the beginning, where a missing
        ledger is made.

    Raises:
      UserError: the ledger is missing, damaged, shorter than at the checkpoint, or of other settings.
    """
    if known is None and not path.exists():
        return create(path, header)
    contents = read(path)
    if known is not None and not contains(contents, known):
        raise UserError(
            f"{path} lacks entries that it had when the checkpoint was saved: lines are missing at its end, or it is "
            "another run's. Going on would charge less than was released; restore the ledger, or start a new run"
        )
    before, now = _header_fields(contents.header), _header_fields(header)
    changed = [f"{name}: {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        raise UserError(f"{path}, line 1, is of other settings than this run: {'; '.join(changed)}")
    return Ledger(path, contents)


def append(ledger: Ledger, round: int, computation: str, events: Mapping[str, Event], repeatable: bool) -> int:  # noqa: A002
    """Charges a round that is about to be released; when this returns, the entry is on the disk.

    A round that a killed run had charged already is charged again, for another attempt with fresh noise, unless
    randomness is ``repeatable`` and the very same bits will be released: :func:`repeats`.

    Args:
      ledger: of the run.
      round: which round.
      computation: a hash of all that decides the bits: configuration, data, the state that the round begins with,
        layout of the computation, library versions, platform.
      events: account -> what is released about it.
      repeatable: whether equal computations give equal bits, noise included.

    Returns:
      The attempt, to be folded into the key of the round's noise.

    Raises:
      UserError: the file cannot be written, or was changed meanwhile; then no noise may be drawn.
    """
    unknown = events.keys() - ledger.contents.header.accounts.keys() - {EVERY_SITE}
    if unknown:
        raise ValueError(f"the ledger has no accounts {sorted(unknown)}")
    entries = ledger.contents.entries
    last = _last(entries, round)
    if last is not None and repeatable and repeats(ledger.contents, round, computation, events):
        return last.attempt
    entry = Entry(len(entries), round, 0 if last is None else last.attempt + 1, computation, dict(events))
    line, digest = _sealed(dataclasses.asdict(entry) | {"previous": head(ledger.contents)})
    size = _write_line(ledger, line)
    ledger.contents = Contents(ledger.contents.header, (*entries, entry), (*ledger.contents.hashes, digest), size)
    return entry.attempt


def repeats(contents: Contents, round: int, computation: str, events: Mapping[str, Event]) -> bool:  # noqa: A002
    """Whether a round would release the very bits that its last entry stands for, where keys are repeatable."""
    last = _last(contents.entries, round)
    if last is None or (last.computation, last.events) != (computation, dict(events)):
        return False
    # An earlier round drawn anew since gives this one another state, which its old noise must never meet.
    return not any(later.round < round for later in contents.entries[last.index + 1 :])


def read(path: Path) -> Contents:
    """Reads a ledger and verifies its chain.

    A half-written line at the end is left out (see :class:`Contents`). A whole one that lacks only the end of the line
    counts: charging too much is safe.

    Raises:
      UserError: the file is missing, or a line is damaged, changed, moved or removed (its number is given).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {what}; without it nobody can tell what a private run released") from error
    *lines, tail = raw.split(b"\n")
    lines += [tail] if _complete(tail) else []
    torn = 0 if _complete(tail) else len(tail)
    if not lines:
        raise UserError(f"{path}, line 1: there is no header; restore the file from a copy")
    header: Header | None = None
    entries: list[Entry] = []
    hashes: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            fields, digest = _opened(line)
            if header is None:
                header = _header(fields)
            else:
                entries.append(_entry(fields, len(entries), hashes[-1]))
            hashes.append(digest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: {error}. The ledger was damaged or edited; restore it from a copy"
            ) from error
    assert header is not None
    return Contents(header, tuple(entries), tuple(hashes), len(raw) - torn, torn)


def head(contents: Contents) -> str:
    """The hash of the last line, which stands for all of them; checkpoints hold it."""
    return contents.hashes[-1]


def contains(contents: Contents, digest: str) -> bool:
    """Whether the ledger holds the line of an earlier :func:`head`, and so all lines before it."""
    return digest in contents.hashes


def charged(contents: Contents) -> dict[str, tuple[Event, ...]]:
    """By account: all that was released about it, every attempt included."""
    return _added({}, contents.entries)


def spent_by_round(contents: Contents) -> list[tuple[int, dict[str, tuple[Event, ...]]]]:
    """What had been released, by account, when each round was done, every attempt included; rounds in their order.

    Later rounds that a killed run had released before an earlier one was released anew count for that one too.
    """
    last = {entry.round: entry.index for entry in contents.entries}
    curve, spent, done = [], {}, 0
    for number in sorted(last):
        spent = _added(spent, contents.entries[done : last[number] + 1])
        done = max(done, last[number] + 1)
        curve.append((number, spent))
    return curve


def config_hash(config: Mapping[str, Any], may_change: Sequence[str] = ()) -> str:
    """The sha256 of a configuration as nested JSON-able dictionaries.

    Args:
      config: of the run.
      may_change: patterns of ``fnmatch`` for dotted paths that are left out, such as ``execution.*``.
    """

    def kept(value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return value
        places = {name: f"{path}.{name}" if path else name for name in value}
        return {
            name: kept(value[name], place)
            for name, place in places.items()
            if not any(fnmatchcase(place, pattern) for pattern in may_change)
        }

    return hashlib.sha256(_canonical(kept(config, ""))).hexdigest()


def _last(entries: Sequence[Entry], round: int) -> Entry | None:  # noqa: A002
    """The newest entry of a round."""
    return next((entry for entry in reversed(entries) if entry.round == round), None)


def _added(spent: Mapping[str, tuple[Event, ...]], entries: Sequence[Entry]) -> dict[str, tuple[Event, ...]]:
    """Merged events by account, with those of some entries added."""
    total = dict(spent)
    for entry in entries:
        for account, event in entry.events.items():
            total[account] = merge((*total.get(account, ()), event))
    return total


def _canonical(fields: Any) -> bytes:
    """JSON with one way to write each value."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _sealed(fields: dict[str, Any]) -> tuple[bytes, str]:
    """A line with its end, and its hash."""
    digest = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical({**fields, "hash": digest}) + b"\n", digest


def _opened(line: bytes) -> tuple[dict[str, Any], str]:
    """The fields of a line, and its hash; ValueError where they do not fit, bit for bit."""
    try:
        fields = json.loads(line.decode("ascii"))
    except ValueError as error:
        raise ValueError("this is not JSON") from error
    digest = fields.pop("hash", "") if isinstance(fields, dict) else ""
    if _sealed(fields) != (line + b"\n", digest):
        raise ValueError("its content does not fit its hash")
    return fields, digest


def _header_fields(header: Header) -> dict[str, Any]:
    """A header as JSON has it."""
    fields = {field.name: getattr(header, field.name) for field in dataclasses.fields(header)}
    return fields | {"accounts": dict(header.accounts), "shared": [list(names) for names in header.shared]}


def _header(fields: Mapping[str, Any]) -> Header:
    """A header from its fields; an error where they are another line's."""
    if fields.keys() != {field.name for field in dataclasses.fields(Header)}:
        raise ValueError("the header is not here")
    if fields["version"] != VERSION:
        raise ValueError(f"the format is of version {fields['version']}, this program reads version {VERSION}")
    shared = tuple(tuple(names) for names in fields["shared"])
    values: dict[str, Any] = {**fields, "accounts": dict(fields["accounts"]), "shared": shared}
    return Header(**values)


def _entry(fields: dict[str, Any], index: int, previous: str) -> Entry:
    """An entry from its fields; an error where it is not the one that belongs in this place."""
    if fields.get("index") != index:
        raise ValueError(f"entry {index} was expected here; a line was removed, moved or doubled")
    if fields.pop("previous", None) != previous:
        raise ValueError("it was not written after the line before")
    if fields.keys() != {field.name for field in dataclasses.fields(Entry)}:
        raise ValueError("an entry has other fields")
    events = {account: Event(**event) for account, event in fields["events"].items()}
    values: dict[str, Any] = {**fields, "events": events}
    return Entry(**values)


def _complete(tail: bytes) -> bool:
    """Whether text after the last end of a line is more than the beginning of a line."""
    try:  # a strict beginning of a line is never JSON; a line with anything in place of its end begins with JSON
        json.JSONDecoder().raw_decode(tail.decode("latin-1"))
    except ValueError:
        return False
    return True


def _write_line(ledger: Ledger, line: bytes) -> int:
    """Appends a line in place of a torn one, synced; gives the file's size. No part of it stays if that fails."""
    contents = ledger.contents
    try:
        with open(ledger.path, "r+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) != contents.size + contents.torn:
                raise UserError(f"{ledger.path} was changed while the run used it; resume the run to read it again")
            file.truncate(contents.size)
            file.seek(contents.size - 1)
            data = line if file.read(1) == b"\n" else b"\n" + line
            try:
                written = 0
                while written < len(data):  # a nearly full disk takes a part, then refuses the rest
                    written += file.write(data[written:]) or 0
                os.fsync(file.fileno())
            except OSError:
                ledger.contents = dataclasses.replace(contents, torn=0)
                file.truncate(contents.size)
                raise
    except OSError as error:
        raise _cannot_write(ledger.path, error) from error
    return contents.size + len(data)


def _cannot_write(path: Path, error: OSError) -> UserError:
    """The message for a failed write."""
    return UserError(f"cannot write {path}: {error.strerror or error}. The round did not run; mend it, then --resume")


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name last through a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
