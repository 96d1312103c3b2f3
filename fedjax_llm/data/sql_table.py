"""Your own sites in a database: a table, or a query, of anything that SQLAlchemy reaches (extra ``sql``)."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

from fedjax_llm.data.records import Dataset, Site
from fedjax_llm.data.table import Columns, Row, missing_column, scalar, sites_of
from fedjax_llm.errors import UserError, nearest

if TYPE_CHECKING:
    import sqlalchemy

_READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "mysql": "START TRANSACTION READ ONLY",
    "mariadb": "START TRANSACTION READ ONLY",
    "oracle": "SET TRANSACTION READ ONLY",
}
"""What makes a transaction read-only, where the driver has no setting of its own for it."""


@dataclass(frozen=True)
class SqlTable:
    """Records from one table or one query, read in one read-only transaction.

    Rows are put in the order of their ids here, so that it does not depend on the database's collation. A table is read
    with all its columns; a query reads what it names, and nothing else leaves the database.

    Attributes:
      url: of the database, e.g. ``postgresql+psycopg://reader@db.clinic/notes`` or ``sqlite:////data/notes.db``. It has
        no password in it, since it stands in the ``config.json`` of a run.
      id_column: names a record, best by the table's key: which records are held out depends on it. Unique within a
        site, and never empty.
      table: its name, after its schema and a point where it has one. Or set ``query``.
      query: one ``SELECT`` statement.
      password_variable: the environment variable that holds the password; ``None``: the driver finds one by its own
        means (``~/.pgpass``, Kerberos), or wants none.
      site_column: column with the site's name; ``None``: all rows are those of ``site``.
      site: name of the one site where there is no site column.
      label_column: a class, for label-skewed partitions.
      owner_column: whose record it is, e.g. the patient: an owner is never torn apart.
      prompt_column: the question, where there is no column of messages.
      answer_column: the answer, where there is no column of messages.
      messages_column: chat messages, a list of ``{"role": ..., "content": ...}``, as JSON or as text.
    """

    url: str
    id_column: str
    table: str | None = None
    query: str | None = None
    password_variable: str | None = None
    site_column: str | None = None
    site: str = "site"
    label_column: str | None = None
    owner_column: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    messages_column: str = "messages"

    def __post_init__(self) -> None:
        """Refuses what can be told without the database."""
        if (self.table is None) == (self.query is None):
            raise UserError("a SqlTable has a table or a query: set one of the two, and leave the other out")
        if self.query is not None and self.query.split()[:1] not in (["SELECT"], ["select"], ["WITH"], ["with"]):
            raise UserError("SqlTable.query must begin with SELECT (or WITH): it is read from, and nothing else")
        if _holds_password(self.url):
            raise UserError(
                "SqlTable.url holds a password, and it stands in the config.json of every run. Take the password out, "
                "put it into an environment variable, and name that in SqlTable.password_variable"
            )

    def load(self) -> Dataset:
        """Reads all rows.

        Raises:
          UserError: SQLAlchemy or the driver is not installed, the database cannot be reached or read, there is no such
            table or column, there are no rows, an id is missing or stands twice, or a row cannot be read.
        """
        columns = Columns(
            self.prompt_column,
            self.answer_column,
            self.messages_column,
            self.id_column,
            self.label_column,
            self.owner_column,
        )
        with self._connected() as connection:
            names, rows = self._read(connection)
        self._check_columns(names)
        sites = sites_of(self._placed(rows), columns)
        if not sites:
            raise UserError(f"{self._what}: holds no rows; look at the table, or at what the query leaves out")
        return Dataset(sites, f"sha256:{content_hash(sites)[:16]}", f"your own database: {self._what}")

    @property
    def _what(self) -> str:
        """What errors call the source of the rows."""
        return "the query" if self.table is None else f"table {self.table}"

    @contextmanager
    def _connected(self) -> "Generator[sqlalchemy.Connection]":
        """A connection whose only transaction is read-only where the database knows that, and is rolled back."""
        sql = _sqlalchemy()
        password = self._password()
        try:
            url = sql.make_url(self.url)
            if password is not None:
                url = url.set(password=password)
            _check_file(url)
            engine = sql.create_engine(url, poolclass=sql.pool.NullPool, hide_parameters=True)
            with engine.connect() as connection:
                if engine.dialect.name == "postgresql":
                    connection = connection.execution_options(
                        isolation_level="REPEATABLE READ", postgresql_readonly=True
                    )
                if statement := _READ_ONLY.get(engine.dialect.name):
                    connection.exec_driver_sql(statement)
                yield connection
                connection.rollback()
        except ModuleNotFoundError as error:
            raise UserError(f"the database's driver is not installed: pip install {error.name}") from None
        except sql.exc.ArgumentError as error:  # others than of an unknown dialect may show the url
            hint = f" ({error})" if isinstance(error, sql.exc.NoSuchModuleError) else ""
            raise UserError(
                f"SqlTable.url is no url of a database that SQLAlchemy knows{hint}; it looks like "
                "postgresql+psycopg://user@host/database"
            ) from None
        except sql.exc.SQLAlchemyError as error:
            raise UserError(f"{self._what}: {self._told(error, password)}") from None

    def _password(self) -> str | None:
        """The password, from the environment."""
        if self.password_variable is None:
            return None
        if self.password_variable not in os.environ:
            raise UserError(
                f"the environment variable {self.password_variable} is not set; SqlTable.password_variable says that "
                "the database's password is in it"
            )
        return os.environ[self.password_variable]

    def _told(self, error: Exception, password: str | None) -> str:
        """What a database said, in one line and without the password."""
        said = " ".join(str(getattr(error, "orig", None) or error).split())
        if password:
            said = said.replace(password, "***")
        return (
            f"the database cannot be reached, or refuses: {said[:400]}. Check url, password and what the user may read"
        )

    def _read(self, connection: "sqlalchemy.Connection") -> tuple[Sequence[str], list[dict[str, object]]]:
        """The names of the columns, and all rows."""
        sql = _sqlalchemy()
        if self.table is not None:
            schema, _, name = self.table.rpartition(".")
            self._check_table(connection, schema or None, name)
            result = connection.execute(sql.select(sql.text("*")).select_from(sql.table(name, schema=schema or None)))
        else:
            assert self.query is not None
            # As it stands: no character of it is a parameter.
            result = connection.execution_options(no_parameters=True).exec_driver_sql(self.query)
        names = list(result.keys())
        return names, [{name: _plain(value) for name, value in zip(names, row, strict=True)} for row in result]

    def _check_table(self, connection: "sqlalchemy.Connection", schema: str | None, name: str) -> None:
        """Refuses a table that is not there, with those that are."""
        inspector = _sqlalchemy().inspect(connection)
        known = [*inspector.get_table_names(schema), *inspector.get_view_names(schema)]
        if name not in known and not inspector.has_table(name, schema):
            raise UserError(f"there is no {self._what}{nearest(name, known)}")

    def _check_columns(self, names: Sequence[str]) -> None:
        """Refuses columns that are missing, or stand twice."""
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(
                f"{self._what}: the column {twice[0]!r} stands twice; give one of the two another name (AS)"
            )
        others = [self.id_column, self.site_column, self.label_column, self.owner_column]
        for column in [*self._exchange(names), *filter(None, others)]:
            if column not in names:
                raise missing_column(self._what, column, dict.fromkeys(names))

    def _placed(self, rows: Sequence[Row]) -> Iterator[tuple[str, str, Row]]:
        """(site, place, row) by id."""
        seen: set[tuple[str, str]] = set()
        for number, row in enumerate(sorted(rows, key=lambda row: _order(row[self.id_column])), start=1):
            record = scalar(f"{self._what}, row {number} by id", row, self.id_column)
            if record is None:
                raise UserError(
                    f"{self._what}: the id column {self.id_column!r} is NULL or empty in some row; every record "
                    "needs a name that stays"
                )
            where = f"{self._what}, {self.id_column} {record}"
            site = self.site if self.site_column is None else scalar(where, row, self.site_column)
            if site is None:
                raise UserError(f"{where}: the site column {self.site_column!r} is NULL or empty")
            if (site, record) in seen:
                raise UserError(f"{where}: stands twice at site {site!r}; an id names one row, such as the table's key")
            seen.add((site, record))
            for column in self._exchange(row):
                if row[column] is None:
                    raise UserError(
                        f"{where}: the column {column!r} is NULL; fill it, or leave such rows out with a query "
                        f"(WHERE {column} IS NOT NULL)"
                    )
            yield site, where, row

    def _exchange(self, names: Container[str]) -> tuple[str, ...]:
        """The columns that exchanges are read from, of those that there are."""
        return (self.messages_column,) if self.messages_column in names else (self.prompt_column, self.answer_column)


def content_hash(sites: Sequence[Site]) -> str:
    """The SHA-256 of all that sites hold, in hexadecimal digits: equal for equal records in equal order."""
    text = json.dumps([asdict(site) for site in sites], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _sqlalchemy() -> Any:
    """The package."""
    try:
        import sqlalchemy
    except ImportError:
        raise UserError("a SqlTable wants SQLAlchemy: pip install 'fedjax_llm[sql]'") from None
    return sqlalchemy


def _holds_password(url: str) -> bool:
    """Whether a url holds a password, before the host or among its options."""
    parts = urlsplit(url)
    options = unquote(parts.query).lower()
    return parts.password is not None or any(name in options for name in ("password=", "passwd=", "pwd="))


def _check_file(url: "sqlalchemy.URL") -> None:
    """Refuses a file that is not there, which SQLite would make."""
    name = url.database
    if url.get_backend_name() == "sqlite" and name and not name.startswith(("file:", ":")) and not Path(name).is_file():
        folder = Path(name).parent
        beside = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{name}: no such database file{nearest(Path(name).name, beside)}")


def _plain(value: object) -> object:
    """A value as a file would hold it."""
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | UUID) else value


def _order(value: object) -> tuple[str, Any]:
    """Sorts ids: numbers by size, text by code points."""
    if isinstance(value, int | float):
        return "number", value
    return ("none", "") if value is None else ("text", str(value))
