"""Your own sites: JSON Lines or CSV, one file a site, or files with a site column."""

import csv
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.data.records import Dataset, Site
from fedjax_llm.data.table import Columns, Row, scalar, sites_of
from fedjax_llm.errors import UserError, nearest

_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class SiteFiles:
    """Records from files, UTF-8.

    Attributes:
      paths: files, or folders, which stand for all ``.jsonl`` and ``.csv`` files in them.
      site_column: column with the site's name; ``None``: every file is a site, named by the file without its suffix.
      id_column: names a record; rows with the same id are one record with several examples. ``None``: a hash of the
        row.
      label_column: a class, for label-skewed partitions.
      owner_column: whose record it is, e.g. the patient: an owner is never torn apart.
      prompt_column: the question, where there is no column of messages.
      answer_column: the answer, where there is no column of messages.
      messages_column: chat messages, a list of ``{"role": ..., "content": ...}`` (in CSV as JSON text).
    """

    paths: tuple[str, ...]
    site_column: str | None = None
    id_column: str | None = None
    label_column: str | None = None
    owner_column: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    messages_column: str = "messages"

    @property
    def apart(self) -> bool:
        """Whether every file is a site, so that each can be read where it belongs."""
        return self.site_column is None

    def load(
        self, index: int = 0, count: int = 1, gather: Callable[[Any], list[Any]] = lambda value: [value]
    ) -> Dataset:
        """Reads all files; or, where every file is a site, those of one of several hosts.

        Args:
          index: of the host.
          count: of the hosts. The site at place ``i`` in the order of the names is that of host ``i % count``; others
            have no records here, and of their files only the names are looked at.
          gather: gives the values of all hosts. What hosts tell each other is digests: of files, and of records' ids,
            since an id that two sites have is made two.

        Raises:
          UserError: a path leads nowhere, two files would be one site, a file is empty, or a line cannot be read; the
            message begins with ``FILE:LINE:``.
        """
        files = list(dict.fromkeys(file for path in self.paths for file in _files(Path(path).expanduser())))
        if not files:
            raise UserError("paths is empty; name at least one .jsonl or .csv file, or a folder of them")
        columns = Columns(
            self.prompt_column,
            self.answer_column,
            self.messages_column,
            self.id_column,
            self.label_column,
            self.owner_column,
        )
        order = {name: place for place, name in enumerate(sorted(file.stem for file in files))}
        own = files if count == 1 else [file for file in files if order[file.stem] % count == index]

        def shared(ids: Collection[str]) -> list[str]:
            hashes = [_digest(name.encode()) for name in ids]
            others = {one for place, told in enumerate(gather(hashes)) if place != index for one in told}
            return [name for name, one in zip(ids, hashes, strict=True) if one in others]

        self._check_names(files)
        found = {site.name: site for site in sites_of(self._rows(own), columns, shared)}
        every = found if count == 1 else order
        sites = tuple(found.get(name, Site(name, ())) for name in sorted(every))
        told = gather({str(file): _digest(file.read_bytes()) for file in own})
        digests = {name: digest for part in told for name, digest in part.items()}
        digest = hashlib.sha256("".join(digests[str(file)] for file in files).encode())
        names = ", ".join(file.name for file in files[:10]) + (", ..." if len(files) > 10 else "")
        return Dataset(sites, f"sha256:{digest.hexdigest()[:16]}", f"your own files: {names}")

    def _check_names(self, files: list[Path]) -> None:
        """Refuses two files that would be one site."""
        taken: dict[str, Path] = {}
        for file in files:
            if self.site_column is None and (other := taken.setdefault(file.stem, file)) != file:
                raise UserError(
                    f"{file} and {other} would both be the site {file.stem!r}; rename one, or name a site column"
                )

    def _rows(self, files: list[Path]) -> Iterator[tuple[str, str, Row]]:
        """(site, place, row) of all files, one at a time."""
        for file in files:
            line = 0
            for line, row in _read(file):
                where = f"{file}:{line}"
                site = file.stem if self.site_column is None else scalar(where, row, self.site_column)
                if site is None:
                    raise UserError(
                        f"{where}: the site column {self.site_column!r} is empty; every row belongs to a site"
                    )
                yield site, where, row
            if line == 0:
                raise UserError(f"{file}: holds no records; fill it or leave it out")


def _digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _files(path: Path) -> list[Path]:
    """The data files that a path stands for."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: no .jsonl or .csv file in this folder")
        return files
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder{nearest(path.name, beside)}")
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: the name must end in .jsonl or .csv, which says how to read it")
    return [path]


def _read(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, row) of a file, one at a time."""
    return _read_csv(path) if path.suffix.lower() == ".csv" else _read_jsonl(path)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, without a byte-order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) for every line that is not blank."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); a line holds one object"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a line must hold one object {{...}}, not {type(row).__name__}")
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """(number of its first line, row by column) for every line below the header that is not blank."""
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for values in reader:
            if header is None and values:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    raise UserError(f"{path}:{start}: a column name stands twice in the header: {', '.join(header)}")
            elif header is not None and values:
                if len(values) != len(header):
                    raise UserError(
                        f"{path}:{start}: {len(values)} values under {len(header)} columns; is a comma or a quote lost?"
                    )
                yield start, dict(zip(header, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{start}: not CSV ({error}); quote fields with commas, or use JSON Lines") from None
