"""A table or a query of a database: the same records as from files, and errors that name the row."""

import csv
import json
import sqlite3
from dataclasses import asdict

import pytest
import sqlalchemy

from fedjax_llm.data.records import Message
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.data.sql_table import SqlTable, content_hash
from fedjax_llm.errors import UserError

COLUMNS = ("note", "prompt", "answer", "patient", "clinic", "code")
ROWS = [
    ("n1", "why?", "so", "p1", "north", "A10"),
    ("n2", 'with "quotes",\nand lines', "ä 😀 100 %s :name", "p1", "north", "B20"),
    ("n3", "how?", "thus", "p2", "south", "A10"),
    ("n4", "when?", "now", "p3", "north", "A10"),
]


@pytest.fixture
def database(tmp_path):
    """Makes a table of these rows; gives the database's url."""
    path = tmp_path / "notes.db"

    def make(rows=ROWS, columns=COLUMNS, table="notes", types=None):
        with sqlite3.connect(path) as connection:
            declared = ", ".join(f'"{name}" {(types or {}).get(name, "TEXT")}' for name in columns)
            connection.execute(f'CREATE TABLE "{table}" ({declared})')
            connection.executemany(f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(columns))})', rows)
        connection.close()
        return f"sqlite:///{path}"

    return make


def table_of(url, **more):
    named = {"table": "notes", "id_column": "note", "site_column": "clinic", "owner_column": "patient"}
    return SqlTable(url, **(named | more))


def test_a_table_and_a_csv_file_of_the_same_rows_are_the_same_data(database, tmp_path):
    with open(tmp_path / "notes.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *ROWS])
    files = SiteFiles(
        (str(tmp_path / "notes.csv"),), site_column="clinic", id_column="note", owner_column="patient"
    ).load()
    dataset = table_of(database(), label_column=None).load()
    assert dataset.sites == files.sites
    assert content_hash(dataset.sites) == content_hash(files.sites)
    assert dataset.version == f"sha256:{content_hash(files.sites)[:16]}"


def test_rows_come_in_the_order_of_their_ids_whatever_the_order_of_the_table(database):
    url = database()
    database(reversed(ROWS), table="turned")
    one, other = table_of(url).load(), table_of(url, table="turned").load()
    assert [record.id for record in other.sites[0].records] == ["n1", "n2", "n4"]
    assert (one.sites, one.version) == (other.sites, other.version)


def test_numbers_as_ids_are_ordered_by_size_and_are_text_in_records(database):
    rows = [(10, "q", "a"), (9, "q", "b"), (100, "q", "c")]
    url = database(rows, ("note", "prompt", "answer"), types={"note": "INTEGER PRIMARY KEY"})
    (site,) = SqlTable(url, "note", table="notes", site="clinic").load().sites
    assert (site.name, [record.id for record in site.records]) == ("clinic", ["9", "10", "100"])


def test_every_change_of_the_content_changes_the_version(database):
    url = database()
    versions = {table_of(url).load().version}
    for number, column in enumerate(COLUMNS):
        changed = [tuple("x" if (place, at) == (0, number) else value for at, value in enumerate(row))
                   for place, row in enumerate(ROWS)]  # fmt: skip
        database(changed, table=f"with_{column}")
        versions.add(table_of(url, table=f"with_{column}").load().version)
    assert len(versions) == 1 + len(COLUMNS)


def test_a_query_reads_what_it_names_as_it_stands(database):
    query = "SELECT note, prompt AS q, answer AS a, '100 %s :name' AS said FROM notes WHERE clinic LIKE 'n%'"
    dataset = SqlTable(database(), "note", query=query, prompt_column="q", answer_column="a").load()
    (site,) = dataset.sites
    assert [record.id for record in site.records] == ["n1", "n2", "n4"]
    assert site.records[0].fields == {"said": "100 %s :name"}


def test_chats_as_json_text_and_as_a_column_of_json(database):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ä"}]
    for number, declared in enumerate(("TEXT", "JSON")):
        url = database([("1", json.dumps(turns))], ("note", "chat"), f"t{number}", {"chat": declared})
        table = SqlTable(url, "note", table=f"t{number}", messages_column="chat")
        (record,) = table.load().sites[0].records
        assert record.examples[0].messages == (Message("user", "q"), Message("assistant", "ä"))


def test_columns_of_prompts_may_be_null_where_there_are_chats(database):
    chat = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    url = database([("1", None, chat)], ("note", "prompt", "messages"))
    assert len(SqlTable(url, "note", table="notes").load().sites[0].records) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"table": "note"}, "there is no table note; did you mean 'notes'"),
        ({"id_column": "notes"}, "table notes: no column 'notes'; did you mean 'note'"),
        ({"prompt_column": "question"}, "no column 'question'; .*answer, clinic"),
        ({"owner_column": "patients"}, "no column 'patients'; did you mean 'patient'"),
        ({"site_column": "clinik"}, "no column 'clinik'; did you mean 'clinic'"),
        ({"table": None, "query": "SELECT note, note FROM notes"}, "'note' stands twice"),
        ({"table": None, "query": "SELECT * FROM nots"}, "no such table: nots"),
        ({"table": None, "query": "SELECT * FROM notes WHERE 1 = 0"}, "the query: holds no rows"),
    ],
)
def test_what_is_not_there_is_told(database, more, message):
    with pytest.raises(UserError, match=message):
        table_of(database(), **more).load()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((None, "q", "a", "p", "north", ""), "the id column 'note' is NULL or empty"),
        ((" ", "q", "a", "p", "north", ""), "the id column 'note' is NULL or empty"),
        (("n9", None, "a", "p", "north", ""), "note n9: the column 'prompt' is NULL; .*WHERE prompt IS NOT NULL"),
        (("n9", "q", None, "p", "north", ""), "note n9: the column 'answer' is NULL"),
        (("n9", "q", " ", "p", "north", ""), "note n9: the answer is empty"),
        (("n9", "q", b"\x00", "p", "north", ""), "note n9: .*must hold text, not bytes"),
        (("n9", "q", "a", "p", None, ""), "note n9: the site column 'clinic' is NULL"),
        (("n1", "q", "a", "p", "north", ""), "note n1: stands twice at site 'north'"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(database, row, message):
    with pytest.raises(UserError, match=message):
        table_of(database([*ROWS, row])).load()


def test_the_same_id_at_two_sites_is_two_records(database):
    dataset = table_of(database([*ROWS, ("n1", "q", "a", "p9", "south", "")])).load()
    assert [record.id for site in dataset.sites for record in site.records] == [
        "north/n1",
        "n2",
        "n4",
        "south/n1",
        "n3",
    ]


def test_a_file_that_is_not_there_is_not_made(tmp_path, database):
    database()
    with pytest.raises(UserError, match=r"note\.db: no such database file; did you mean 'notes\.db'"):
        table_of(f"sqlite:///{tmp_path}/note.db").load()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.db"]


def test_nothing_can_be_written(database):
    url = database()
    writes = "WITH gone AS (SELECT 1) DELETE FROM notes"
    with pytest.raises(UserError, match="readonly"):
        table_of(url, table=None, query=writes).load()
    assert len(table_of(url).load().sites[0].records) == 3


@pytest.mark.parametrize("query", ["DELETE FROM notes", "", "  ", "PRAGMA user_version"])
def test_a_query_only_selects(query):
    with pytest.raises(UserError, match="must begin with SELECT"):
        SqlTable("sqlite://", "note", query=query)


def test_a_table_or_a_query():
    for more in ({}, {"table": "notes", "query": "SELECT 1"}):
        with pytest.raises(UserError, match="a table or a query"):
            SqlTable("sqlite://", "note", **more)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://reader:hunter2@db/notes",
        "postgresql://db/notes?user=reader&password=hunter2",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhunter2",
    ],
)
def test_a_password_in_the_url_is_refused_without_showing_it(url):
    with pytest.raises(UserError, match="password_variable") as refused:
        SqlTable(url, "note", table="notes")
    assert "hunter2" not in str(refused.value)


def test_a_password_comes_from_the_environment_and_is_nowhere_shown(monkeypatch):
    def refuse(url, **options):
        raise sqlalchemy.exc.OperationalError("connect", {}, Exception(f"password {url.password}\nof {url.username}"))

    monkeypatch.delenv("NOTES_PASSWORD", raising=False)
    monkeypatch.setattr(sqlalchemy, "create_engine", refuse)
    url = "postgresql+psycopg://reader@db/notes"
    table = SqlTable(url, "note", table="notes", password_variable="NOTES_PASSWORD")
    with pytest.raises(UserError, match="NOTES_PASSWORD is not set"):
        table.load()
    monkeypatch.setenv("NOTES_PASSWORD", "hunter2")
    with pytest.raises(UserError, match=r"cannot be reached, or refuses: password \*\*\* of reader\.") as refused:
        table.load()
    assert "hunter2" not in str(refused.value) + repr(table) + json.dumps(asdict(table))
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no url of a database"),
        ("nosuchdb://host/x", "nosuchdb"),
        ("postgresql+psycopg://reader@db/notes", "driver is not installed: pip install psycopg"),
    ],
)
def test_an_impossible_database_is_told(url, message):
    with pytest.raises(UserError, match=message):
        SqlTable(url, "note", table="notes").load()
