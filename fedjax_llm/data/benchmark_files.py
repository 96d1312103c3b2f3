"""Rows of published benchmarks, from the kinds of files that they come in: JSON, JSON Lines, CSV, Parquet."""

import csv
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedjax_llm.data.table import Row
from fedjax_llm.errors import UserError, nearest

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of every row of a file.

    A ``.json`` file may be a list of objects, an object of objects (whose keys become the column ``id``), or JSON Lines
    in spite of its name, as some benchmarks are published.

    Args:
      path: ends in ``.json``, ``.jsonl``, ``.csv`` or ``.parquet``.
      columns: of a CSV file without a header; where its first row holds the first of these names, it is the header.

    Raises:
      UserError: there is no such file, it is of another kind, cannot be read, or wants a package that is missing.
    """
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, beside)}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: the name must end in {', '.join(SUFFIXES)}, which says how to read it")
    if suffix == ".parquet":
        rows = _parquet(path)
    elif suffix == ".csv":
        rows = _csv(path, columns)
    else:
        rows = _json(path)
    empty = True
    for name, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise UserError(f"{path}:{name}: an object {{...}} is wanted, not {type(row).__name__}")
        yield f"{path}:{name}", row
    if empty:
        raise UserError(f"{path}: holds no rows")


def _text(path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of JSON of any of the three forms."""
    text = _text(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(path, text)
        return
    if isinstance(whole, list):
        yield from ((str(number), row) for number, row in enumerate(whole, start=1))
    elif isinstance(whole, dict) and whole and all(isinstance(row, dict) for row in whole.values()):
        yield from ((key, {"id": key, **row}) for key, row in whole.items())
    else:
        yield "1", whole


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """One row a line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield str(number), json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from None


def _csv(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """Rows below the header; all rows where the columns are given and there is no header."""
    lines = _text(path).splitlines(keepends=True)
    rows = [(number, values) for number, values in _csv_rows(path, lines) if values]
    if not rows:
        return
    header = [name.strip() for name in rows[0][1]]
    if columns is not None and columns[0] not in header:
        header = list(columns)
    else:
        rows = rows[1:]
    for number, values in rows:
        if len(values) != len(header):
            raise UserError(f"{path}:{number}: {len(values)} values for {len(header)} columns; is a quote lost?")
        yield str(number), dict(zip(header, values, strict=True))


def _csv_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, values)."""
    reader = csv.reader(lines, strict=True)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file, a batch in memory at a time."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, which wants the package 'pyarrow': pip install 'fedjax_llm[hub]'"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield str(number), row
    except (OSError, ValueError) as error:  # the package's own errors are of these kinds
        raise UserError(f"{path}: cannot be read as Parquet ({error}); download it again") from error
