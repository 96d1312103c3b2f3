"""The ledger: synced before it returns, damage is noticed, and whatever may have been released is charged."""

import dataclasses
import errno
import functools
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import ledger
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.ledger import Header, append, charged, create, head, read, reopen, spent_by_round

HEADER = Header(
    unit="record",
    adjacency="add or remove one record",
    mechanism="LocalDpSgd",
    delta=1e-5,
    accountant="pld",
    randomness="reproducible",
    accounts={"north": 120, "Süd": 45},
    shared=(("north", "Süd"),),
    config="c0ffee",
)
NORTH = Event("gaussian", 1.1, 0.25, count=2)
SOUTH = Event("gaussian", 1.3, 0.5, count=2)
EVENTS = {"north": NORTH, "Süd": SOUTH}


@functools.cache
def whole_ledger() -> bytes:
    """The bytes of a ledger of three rounds."""
    with tempfile.TemporaryDirectory() as folder:
        book = create(Path(folder) / ledger.LEDGER, HEADER)
        for number in (1, 2, 3):
            assert append(book, number, f"computation {number}", EVENTS, repeatable=True) == 0
        return book.path.read_bytes()


def written(path: Path) -> bytes:
    """Puts that ledger there."""
    path.write_bytes(whole_ledger())
    return whole_ledger()


@pytest.fixture
def path(tmp_path):
    return tmp_path / ledger.LEDGER


def test_what_was_written_is_read(path):
    written(path)
    contents = read(path)
    assert contents.header == HEADER
    assert [(entry.index, entry.round, entry.attempt) for entry in contents.entries] == [
        (0, 1, 0),
        (1, 2, 0),
        (2, 3, 0),
    ]
    assert contents.entries[1].events == EVENTS
    assert contents.entries[1].computation == "computation 2"
    assert len(contents.hashes) == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["hash"] for line in lines] == list(contents.hashes)
    assert [line["previous"] for line in lines[1:]] == list(contents.hashes[:-1])
    assert [entry.name for entry in path.parent.iterdir()] == [ledger.LEDGER]


def test_an_entry_is_whole_on_the_disk_before_append_returns(path, monkeypatch):
    seen = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (sync(handle), seen.append(path.stat().st_size if path.exists() else 0))
    )
    book = create(path, HEADER)
    assert len(seen) == 2, "the file under its temporary name, then the folder"
    assert seen[1] == path.stat().st_size
    append(book, 1, "a", EVENTS, repeatable=True)
    assert seen[2:] == [path.stat().st_size]
    assert len(read(path).entries) == 1


def test_a_ledger_is_never_begun_anew(path):
    before = written(path)
    with pytest.raises(UserError, match=r"ledger\.jsonl exists.*another folder"):
        create(path, HEADER)
    assert path.read_bytes() == before


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_power_cut_within_a_line_loses_that_line_only(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / ledger.LEDGER
    whole = written(path)
    begin = whole.rindex(b"\n", 0, -1) + 1
    end = data.draw(st.integers(begin, len(whole) - 2))
    path.write_bytes(whole[:end])
    contents = read(path)
    assert [entry.round for entry in contents.entries] == [1, 2]
    assert contents.torn == end - begin
    book = reopen(path, HEADER, head(contents))
    assert append(book, 3, "computation 3", EVENTS, repeatable=True) == 0
    assert path.read_bytes() == whole


def test_a_whole_line_without_its_end_is_charged(path):
    whole = written(path)
    path.write_bytes(whole[:-1])
    book = reopen(path, HEADER, None)
    assert len(book.contents.entries) == 3
    append(book, 4, "computation 4", EVENTS, repeatable=True)
    assert path.read_bytes().startswith(whole)
    assert len(read(path).entries) == 4


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped" / ledger.LEDGER
    path.parent.mkdir(exist_ok=True)
    whole = bytearray(written(path))
    place = data.draw(st.integers(0, len(whole) - 1) | st.sampled_from([i for i, b in enumerate(whole) if b == 10]))
    whole[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    path.write_bytes(whole)
    with pytest.raises(UserError, match=rf"ledger\.jsonl, line {whole[:place].count(10) + 1}: "):
        read(path)


@pytest.mark.parametrize(
    ("order", "line"),
    [((1, 2, 3), 1), ((0, 2, 3), 2), ((0, 1, 3), 3), ((0, 2, 1, 3), 2), ((0, 1, 1, 2, 3), 3), ((0, 0, 1), 2)],
)
def test_a_line_removed_moved_or_doubled_is_named(path, order, line):
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(UserError, match=f"line {line}: .*restore it from a copy"):
        read(path)


def test_an_edit_with_a_hash_of_its_own_breaks_the_chain(path):
    lines = written(path).splitlines(keepends=True)
    fields = json.loads(lines[1])
    del fields["hash"]
    fields["events"]["north"]["noise_multiplier"] = 50.0
    lines[1] = ledger._sealed(fields)[0]
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="line 3: it was not written after the line before"):
        read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "line 1: the format is of version 2"),
        ({"colour": "blue"}, "line 1: the header is not here"),
        ({"accounts": 3}, "line 1: "),
    ],
)
def test_a_header_of_another_kind_is_refused(path, fields, message):
    path.write_bytes(ledger._sealed(ledger._header_fields(HEADER) | fields)[0])
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize("line", [b"\n", b"3\n", b"[]\n", b"{}\n", b'{"hash":NaN}\n', b'{"hash": "" }\n', b"\xff\n"])
def test_other_lines_are_no_ledger(path, line):
    path.write_bytes(line)
    with pytest.raises(UserError, match="line 1: "):
        read(path)


def test_an_empty_or_a_missing_ledger_is_an_error(path):
    with pytest.raises(UserError, match=r"ledger\.jsonl is missing"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="line 1: there is no header"):
        read(path)


def test_missing_last_lines_are_noticed_by_a_checkpoint(path):
    whole = written(path)
    known = head(read(path))
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert len(read(path).entries) == 2, "the chain alone cannot tell"
    with pytest.raises(UserError, match="lacks entries"):
        reopen(path, HEADER, known)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        reopen(path, HEADER, known)
    assert not path.exists()


def test_reopening_wants_the_settings_of_before(path):
    assert reopen(path, HEADER, None).contents.entries == ()
    other = dataclasses.replace(HEADER, unit="patient", delta=1e-3)
    with pytest.raises(UserError, match=r"unit: record -> patient; delta: 1e-05 -> 0\.001$"):
        reopen(path, other, None)


def test_the_same_bits_are_charged_once(path):
    whole = written(path)
    book = reopen(path, HEADER, None)
    assert append(book, 3, "computation 3", EVENTS, repeatable=True) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("computation", "events", "repeatable"),
    [("computation 3", EVENTS, False), ("on another machine", EVENTS, True), ("computation 3", {"north": NORTH}, True)],
)
def test_other_bits_are_charged_again(path, computation, events, repeatable):
    written(path)
    book = reopen(path, HEADER, None)
    assert append(book, 3, computation, events, repeatable) == 1
    assert append(book, 3, computation, events, repeatable) == (1 if repeatable else 2)
    attempts = 2 if repeatable else 3
    assert charged(read(path))["north"] == (Event("gaussian", 1.1, 0.25, count=2 * (2 + attempts)),)


def test_noise_never_meets_another_state(path):
    """Round 2 is drawn anew, so round 3 begins elsewhere; its old noise on new gradients would tell the difference."""
    written(path)
    book = reopen(path, HEADER, None)
    assert append(book, 2, "on another machine", EVENTS, repeatable=True) == 1
    assert append(book, 3, "computation 3", EVENTS, repeatable=True) == 1
    assert append(book, 3, "computation 3", EVENTS, repeatable=True) == 1, "but the new one may be repeated"


def test_the_curve_counts_what_had_been_released_by_then(path):
    book = create(path, HEADER)
    for number, computation in ((1, "a"), (2, "a"), (3, "a"), (2, "b"), (3, "b")):
        append(book, number, computation, {"north": NORTH} if number == 1 else EVENTS, repeatable=True)
    curve = spent_by_round(read(path))
    assert [number for number, _ in curve] == [1, 2, 3]
    assert [spent["north"][0].count for _, spent in curve] == [2, 8, 10]
    assert [spent.get("Süd", (Event("gaussian", 1.0, count=0),))[0].count for _, spent in curve] == [0, 6, 8]
    assert curve[-1][1] == charged(read(path))


def test_different_events_stay_apart(path):
    book = create(path, HEADER)
    append(book, 1, "a", {"north": NORTH}, repeatable=True)
    append(book, 2, "a", {"north": SOUTH}, repeatable=True)
    assert charged(book.contents) == {"north": (NORTH, SOUTH)}
    assert charged(read(path)) == {"north": (NORTH, SOUTH)}


def test_an_account_that_nobody_has_is_a_mistake(path):
    before = written(path)
    with pytest.raises(ValueError, match="nowhere"):
        append(reopen(path, HEADER, None), 4, "a", {"nowhere": NORTH}, repeatable=True)
    assert path.read_bytes() == before


def test_a_full_disk_is_told_and_leaves_the_ledger_as_it_was(path, monkeypatch):
    whole = written(path)
    book = reopen(path, HEADER, None)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*ledger\.jsonl.*No space left.*--resume"):
            append(book, 4, "a", EVENTS, repeatable=True)
    assert path.read_bytes() == whole
    assert append(book, 4, "a", EVENTS, repeatable=True) == 0
    assert len(read(path).entries) == 4


def test_a_ledger_that_changes_under_a_run_stops_it(path):
    written(path)
    book = reopen(path, HEADER, None)
    append(reopen(path, HEADER, None), 4, "a", EVENTS, repeatable=True)
    with pytest.raises(UserError, match="was changed while the run used it"):
        append(book, 4, "b", EVENTS, repeatable=True)
    assert len(read(path).entries) == 4


def test_the_hash_of_a_configuration_passes_over_what_may_change():
    config = {"seed": 1, "execution": {"rows": 16}, "output": {"keep_last": 2, "select": "last"}}
    may_change = ("execution.*", "output.keep_last")
    digest = ledger.config_hash(config, may_change)
    assert digest == ledger.config_hash(config | {"execution": {"rows": 64}}, may_change)
    assert digest != ledger.config_hash(config | {"execution": {"rows": 64}})
    assert digest != ledger.config_hash(config | {"seed": 2}, may_change)
    assert digest != ledger.config_hash(config | {"output": {"keep_last": 2, "select": "best"}}, may_change)
