"""JSON Lines and CSV."""

import json

import pytest

from fedjax_llm.data.records import Message
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def line(prompt="q", answer="a", **more):
    return json.dumps({"prompt": prompt, "answer": answer} | more) + "\n"


def first_example(dataset):
    return dataset.sites[0].records[0].examples[0]


def test_one_file_a_site(write):
    paths = (write("north.jsonl", line("q1") + "\n" + line("q2")), write("south.csv", "prompt,answer\nq3,a3\n"))
    dataset = SiteFiles(paths).load()
    assert [(site.name, len(site.records)) for site in dataset.sites] == [("north", 2), ("south", 1)]
    assert dataset.sites[1].records[0].examples[0].messages == (Message("user", "q3"), Message("assistant", "a3"))
    assert "north.jsonl" in dataset.citation


def test_a_folder_stands_for_its_files(write, tmp_path):
    write("b.jsonl", line())
    write("a.CSV", "prompt,answer\nq,a\n")
    write("readme.txt", "not data")
    (tmp_path / "sub.csv").mkdir()
    assert [site.name for site in SiteFiles((str(tmp_path),)).load().sites] == ["a", "b"]


def test_a_file_named_twice_is_read_once(write, tmp_path):
    path = write("s.jsonl", line())
    assert len(SiteFiles((path, str(tmp_path), path)).load().sites[0].records) == 1


def test_a_site_column_gathers_over_files(write):
    paths = (
        write("x.jsonl", line("q1", where="north") + line("q2", where="south")),
        write("y.jsonl", line("q3", where="north")),
    )
    dataset = SiteFiles(paths, site_column="where").load()
    assert [(site.name, len(site.records)) for site in dataset.sites] == [("north", 2), ("south", 1)]


def test_all_columns_can_be_named(write):
    path = write("s.csv", "Q,A,key,kind,patient\nwhy?,so,r1,x,p1\n")
    (record,) = (
        SiteFiles(
            (path,),
            id_column="key",
            label_column="kind",
            owner_column="patient",
            prompt_column="Q",
            answer_column="A",
        )
        .load()
        .sites[0]
        .records
    )
    assert (record.id, record.label, record.owner) == ("r1", "x", "p1")
    assert [message.content for message in record.examples[0].messages] == ["why?", "so"]


def test_chats_in_jsonl_and_csv(write):
    turns = [{"role": "user", "content": "q, with a comma"}, {"role": "assistant", "content": "ä"}]
    wanted = (Message("user", "q, with a comma"), Message("assistant", "ä"))
    jsonl = write("s.jsonl", json.dumps({"chat": turns}))
    assert first_example(SiteFiles((jsonl,), messages_column="chat").load()).messages == wanted
    text = json.dumps(turns, ensure_ascii=False).replace('"', '""')
    csv = write("t.csv", f'messages\n"{text}"\n')
    assert first_example(SiteFiles((csv,)).load()).messages == wanted


def test_csv_values_may_span_lines_and_start_with_a_byte_order_mark(write):
    path = write("s.csv", b'\xef\xbb\xbfprompt,answer\r\n"two\r\nlines",a\r\n\r\nq2,a2\r\n')
    (site,) = SiteFiles((path,)).load().sites
    assert [record.examples[0].messages[0].content for record in site.records] == ["two\r\nlines", "q2"]


def test_ids_and_version_follow_the_content(write):
    one = SiteFiles((write("s.jsonl", line("q1") + line("q2")),)).load()
    other = SiteFiles((write("s.jsonl", line("q2") + line("q1")),)).load()
    assert {record.id for record in one.sites[0].records} == {record.id for record in other.sites[0].records}
    assert one.version != other.version
    assert one.version == SiteFiles((write("s.jsonl", line("q1") + line("q2")),)).load().version


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.jsonl", line() + "{broken\n", r"s\.jsonl:2: not JSON .*column 2"),
        ("s.jsonl", "\n[1]\n", r"s\.jsonl:2: a line must hold one object .* not list"),
        ("s.jsonl", line() + line(answer=""), r"s\.jsonl:2: the answer is empty"),
        ("s.jsonl", line() + '{"prompt": "q"}', r"s\.jsonl:2: no column 'answer'; known: prompt"),
        ("s.jsonl", line().encode() + b'{"prompt": "caf\xe9"}', r"s\.jsonl:2: not UTF-8"),
        ("s.jsonl", "", r"s\.jsonl: holds no records"),
        ("s.csv", "prompt,answer\n", r"s\.csv: holds no records"),
        ("s.csv", 'prompt,answer\n"a\nb",c\nd\n', r"s\.csv:4: 1 values under 2 columns"),
        ("s.csv", "prompt,answer\nq,a\n,a\n", r"s\.csv:3: nothing is asked"),
        ("s.csv", 'prompt,answer\nq,a\n"x"y,a\n', r"s\.csv:3: not CSV"),
        ("s.csv", 'prompt,answer\nq,"never closed\n', r"s\.csv:2: not CSV"),
        ("s.csv", "prompt,prompt,answer\nq,q,a\n", r"s\.csv:1: a column name stands twice"),
        ("s.csv", b"prompt,answer\nq,caf\xe9\n", r"s\.csv:2: not UTF-8"),
        ("s.parquet", b"PAR1", r"must end in \.jsonl or \.csv"),
    ],
)
def test_bad_files(write, name, content, message):
    with pytest.raises(UserError, match=message):
        SiteFiles((write(name, content),)).load()


def test_bad_site_columns(write):
    path = write("s.jsonl", line(where="north") + line(where=""))
    with pytest.raises(UserError, match=r"s\.jsonl:2: the site column 'where' is empty"):
        SiteFiles((path,), site_column="where").load()
    with pytest.raises(UserError, match=r"s\.jsonl:1: no column 'wher'; did you mean 'where'"):
        SiteFiles((path,), site_column="wher").load()


def test_bad_paths(write, tmp_path):
    write("north.jsonl", line())
    with pytest.raises(UserError, match=r"no such file or folder; did you mean 'north\.jsonl'"):
        SiteFiles((str(tmp_path / "nort.jsonl"),)).load()
    with pytest.raises(UserError, match="no such file or folder"):
        SiteFiles((str(tmp_path / "absent" / "nort.jsonl"),)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl or \.csv file in this folder"):
        SiteFiles((str(tmp_path / "empty"),)).load()
    with pytest.raises(UserError, match="paths is empty"):
        SiteFiles(()).load()


def test_two_files_of_one_name(write):
    paths = (write("s.jsonl", line()), write("s.csv", "prompt,answer\nq,a\n"))
    with pytest.raises(UserError, match="would both be the site 's'"):
        SiteFiles(paths).load()
