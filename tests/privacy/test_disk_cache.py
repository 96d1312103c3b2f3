"""The cache of figures: hits, keys, damage, and runs that share it."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedjax_llm.privacy import disk_cache
from fedjax_llm.privacy.disk_cache import remembered


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the entries lie."""
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(disk_cache, "_seen", {})
    return tmp_path / "privacy"


def refuse():
    raise AssertionError("computed again")


def another_process(monkeypatch):
    monkeypatch.setattr(disk_cache, "_seen", {})


@pytest.mark.parametrize("value", [7, 0.1 + 0.2, math.inf, [1.5, "pld"]])
def test_an_answer_is_computed_once_for_this_process_and_for_the_next(value, monkeypatch):
    assert remembered("q", {"a": 1}, lambda: value) == value
    assert remembered("q", {"a": 1}, refuse) == value
    another_process(monkeypatch)
    assert remembered("q", {"a": 1}, refuse) == value


def test_the_file_says_what_was_asked(folder):
    remembered("q", {"a": 1}, lambda: 7)
    (path,) = folder.iterdir()
    entry = json.loads(path.read_text())
    assert entry["value"] == 7
    assert entry["asked"] == {
        "question": "q",
        "a": 1,
        "format": 1,
        "dp_accounting": disk_cache.version("dp-accounting"),
    }


def test_everything_asked_and_both_versions_are_in_the_key(monkeypatch):
    remembered("q", {"a": 1, "b": 2}, lambda: 1)
    for question, inputs in (
        ("p", {"a": 1, "b": 2}),
        ("q", {"a": 1}),
        ("q", {"a": 1, "b": 2.5}),
        ("q", {"a": 2, "b": 1}),
    ):
        assert remembered(question, inputs, lambda: 2) == 2
    assert remembered("q", {"b": 2, "a": 1}, refuse) == 1
    with monkeypatch.context() as patch:
        patch.setattr(disk_cache, "FORMAT", 0)
        assert remembered("q", {"a": 1, "b": 2}, lambda: 3) == 3
    with monkeypatch.context() as patch:
        patch.setattr(disk_cache, "version", lambda name: "0.0")
        assert remembered("q", {"a": 1, "b": 2}, lambda: 4) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("8.25", "3.25"),
        lambda text: text.replace("sha256", "sha1"),
        lambda text: "[1, 2]",
        lambda text: "\ud800",
    ],
)
def test_a_damaged_file_is_ignored_and_rewritten(damage, folder, monkeypatch):
    remembered("q", {}, lambda: 8.25)
    (path,) = folder.iterdir()
    intact = path.read_text()
    path.write_bytes(damage(intact).encode("utf-8", "surrogatepass"))
    another_process(monkeypatch)
    assert remembered("q", {}, lambda: 8.25) == 8.25
    assert path.read_text() == intact


def test_an_entry_under_another_key_is_not_believed(folder, monkeypatch):
    remembered("q", {"a": 1}, lambda: 1)
    (first,) = folder.iterdir()
    remembered("q", {"a": 2}, lambda: 2)
    (second,) = set(folder.iterdir()) - {first}
    second.write_text(first.read_text())
    another_process(monkeypatch)
    assert remembered("q", {"a": 2}, lambda: 2) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "file"))
    assert remembered("q", {}, lambda: 5) == 5


def test_a_failed_computation_leaves_nothing(folder):
    with pytest.raises(AssertionError, match="again"):
        remembered("q", {}, refuse)
    assert not folder.exists()
    assert remembered("q", {}, lambda: 5) == 5


def test_a_failed_write_leaves_no_scraps(folder, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert remembered("q", {}, lambda: 5) == 5
    assert list(folder.iterdir()) == []


def test_writers_at_the_same_time_leave_one_whole_entry(folder, monkeypatch):
    key = json.dumps({"a": 1})
    path = folder / "entry.json"
    value = list(range(20_000))  # more than one write of a buffered file
    disk_cache._write(path, key, value)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            writing = [pool.submit(disk_cache._write, path, key, value) for _ in range(4)]
            reading = [pool.submit(disk_cache._read, path, key) for _ in range(4)]
            assert all(read.result() == value for read in reading)
            assert all(write.result() is None for write in writing)
    assert list(folder.iterdir()) == [path]
