"""From the rows of a table to sites of records, whatever the table came from: a file, or a hub.

A row is a mapping from column to value. Its exchange stands in one column of chat messages (a list of
``{"role": ..., "content": ...}``, or the same as JSON text), or in a prompt and an answer column.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from fedjax_llm.data.records import Example, Message, Record, Site
from fedjax_llm.errors import UserError, nearest

Row = Mapping[str, object]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; ``None``: no column does.

    A row with the column ``messages`` is read as a chat, any other as ``prompt`` and ``answer``.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    messages: str = "messages"
    id: str | None = None
    label: str | None = None
    owner: str | None = None


def sites_of(
    rows: Iterable[tuple[str, str, Row]],
    columns: Columns,
    shared: Callable[[Collection[str]], Collection[str]] = lambda ids: (),
) -> tuple[Site, ...]:
    """Gathers rows into sites, by name.

    Rows of one site with the same id become one record with several examples. Without an id column, the id of a record
    is a hash of its row, so it does not depend on the order of the rows; equal rows of one site are told apart by a
    counter (``-2``, ``-3``, ...) and share an owner, so that no split separates them. An id that occurs at several
    sites becomes ``site/id`` at each, with the id as the owner where there is none.

    Args:
      rows: (site, where the row stands, for error messages, row).
      columns: what holds what.
      shared: tells which of these sites' ids occur at sites that are not read here, too.

    Raises:
      UserError: a row cannot be read (see :func:`example_of`), or rows of one record disagree on its label or owner.
    """
    by_site: dict[str, dict[str, Record]] = {}
    copies: Counter[tuple[str, str]] = Counter()
    for site, where, row in rows:
        records = by_site.setdefault(site, {})
        record = _record(where, row, columns)
        if columns.id is None:
            copies[site, record.id] += 1
            if (count := copies[site, record.id]) > 1:
                record = replace(record, id=f"{record.id}-{count}", owner=record.owner or record.id)
            records[record.id] = record
        else:
            known = records.get(record.id)
            records[record.id] = record if known is None else _joined(where, known, record)
    places = Counter(record_id for records in by_site.values() for record_id in records)
    places.update(shared(list(places)))
    return tuple(
        Site(site, tuple(_distinct(site, record, places) for record in by_site[site].values()))
        for site in sorted(by_site)
    )


def example_of(where: str, row: Row, columns: Columns) -> Example:
    """The exchange in a row.

    Args:
      where: the row's place, e.g. ``clinic.jsonl:3``; error messages begin with it.
      row: the row.
      columns: what holds what.

    Raises:
      UserError: the columns are missing (those there are get listed), a message is misshapen, or the exchange does not
        end with a non-empty answer of the assistant.
    """
    if columns.messages in row:
        messages = _messages(where, row[columns.messages], columns.messages)
    else:
        prompt, answer = _text(where, row, columns.prompt), _text(where, row, columns.answer)
        messages = (Message("user", prompt), Message("assistant", answer))
    if messages[-1].role != "assistant":
        raise UserError(f"{where}: the last message is the {messages[-1].role}'s; it must be the assistant's answer")
    if not messages[-1].content.strip():
        raise UserError(f"{where}: the answer is empty; there is nothing to train on: fill it in or drop the row")
    if not any(message.content.strip() for message in messages[:-1]):
        raise UserError(f"{where}: nothing is asked before the answer; a prompt is wanted")
    if any("\ud800" <= letter <= "\udfff" for message in messages for letter in message.content):
        raise UserError(f"{where}: the text holds half of a surrogate pair; export the file again as UTF-8")
    return Example(messages)


def missing_column(where: str, column: str, row: Row) -> UserError:
    """The error for a column that a row does not have: what it does have, and what is nearest."""
    hint = nearest(column, row)
    known = "" if hint.startswith("; known") else "; the columns are: " + ", ".join(sorted(row))
    return UserError(f"{where}: no column {column!r}{hint}{known}")


def scalar(where: str, row: Row, column: str) -> str | None:
    """A column's value as text; ``None`` where it is empty.

    Raises:
      UserError: the row has no such column, or a list or an object in it.
    """
    if column not in row:
        raise missing_column(where, column, row)
    value = row[column]
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where}: the column {column!r} must hold text or a number, not {type(value).__name__}")
    return str(value).strip() or None if value is not None else None


def _record(where: str, row: Row, columns: Columns) -> Record:
    """A record of one example."""
    example = example_of(where, row, columns)
    label = scalar(where, row, columns.label) if columns.label else None
    owner = scalar(where, row, columns.owner) if columns.owner else None
    used = (columns.prompt, columns.answer, columns.messages, columns.id)
    fields = {key: str(value) for key, value in row.items() if key not in used and isinstance(value, str | int | float)}
    if columns.id is None:
        content = [asdict(example), label, owner, sorted(fields.items())]
        record_id = hashlib.sha256(
            json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")
        ).hexdigest()[:32]
    else:
        named = scalar(where, row, columns.id)
        if named is None:
            raise UserError(f"{where}: the id column {columns.id!r} is empty; every row of a table with ids needs one")
        record_id = named
    return Record(record_id, (example,), label, owner, fields)


def _joined(where: str, known: Record, more: Record) -> Record:
    """One record of two rows with the same id; fields are those of the first."""
    for name, one, other in (("label", known.label, more.label), ("owner", known.owner, more.owner)):
        if one != other:
            raise UserError(
                f"{where}: record {known.id!r} has the {name} {other!r} here and {one!r} before; rows with one id are "
                f"one record, so give the rows different ids or the same {name}"
            )
    return replace(known, examples=known.examples + more.examples)


def _distinct(site: str, record: Record, places: Mapping[str, int]) -> Record:
    """The record with an id that is unique among all sites."""
    if places[record.id] == 1:
        return record
    return replace(record, id=f"{site}/{record.id}", owner=record.owner or record.id)


def _text(where: str, row: Row, column: str) -> str:
    """A column of text."""
    if column not in row:
        raise missing_column(where, column, row)
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: the column {column!r} must hold text, not {type(value).__name__}")
    return value


def _messages(where: str, value: object, column: str) -> tuple[Message, ...]:
    """A column of chat messages."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the column {column!r} is text, but not JSON ({error})") from None
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the column {column!r} must be a list of messages with one at least")
    messages = []
    for number, item in enumerate(value, start=1):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{where}: message {number} must be {{'role': text, 'content': text}}, got {str(item)[:80]}"
            )
        if role not in _ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r}{nearest(role, _ROLES)}")
        messages.append(Message(role, content))
    return tuple(messages)
