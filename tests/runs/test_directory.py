"""A run's folder: never overwritten, resumed with the same settings only, one process at a time."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.runs import directory

CONFIG = {"seed": 1, "lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}, "execution": {"rows": 16}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


def test_a_new_run_holds_its_config(tmp_path):
    folder = directory.create(tmp_path / "a" / "run", CONFIG)
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert folder.is_absolute()


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    directory.create(tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"another run.*another folder.*--resume"):
        directory.create(tmp_path, {"seed": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        directory.create(tmp_path, CONFIG)
    assert not (tmp_path / "config.json").exists()


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        directory.create(tmp_path / "file", CONFIG)


def test_resuming_needs_a_run_and_the_same_settings(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        directory.reopen(tmp_path, CONFIG)
    directory.create(tmp_path, CONFIG)
    assert directory.reopen(tmp_path, CONFIG) == tmp_path
    changed = {"seed": 2, "lora": {"rank": 16, "targets": ("q_proj", "v_proj")}, "execution": {"rows": 4}}
    with pytest.raises(UserError) as caught:
        directory.reopen(tmp_path, changed, ["execution.*"])
    assert "lora.rank: 8 -> 16" in str(caught.value)
    assert "seed: 1 -> 2" in str(caught.value)
    assert "execution" not in str(caught.value)
    assert "targets" not in str(caught.value), "a tuple is the list that JSON makes of it"


def test_settings_that_may_change_do_and_are_recorded(tmp_path):
    directory.create(tmp_path, CONFIG)
    faster = CONFIG | {"execution": {"rows": 64}}
    directory.reopen(tmp_path, faster, ["execution.*"])
    assert directory.read_json(tmp_path / "config.json") == faster


def test_a_damaged_config_is_named(tmp_path):
    directory.create(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        directory.reopen(tmp_path, CONFIG)


@given(JSON, JSON)
def test_differences_are_empty_exactly_for_equal_values(old, new):
    assert directory.differences(old, old) == []
    # JSON has no other way to tell 1 from true than its text
    assert (directory.differences(old, new) == []) == (
        json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    )
    assert len(directory.differences(old, new)) == len(directory.differences(new, old))


def test_differences_name_what_came_and_went():
    assert directory.differences({"a": {"b": 1}}, {"a": {"c": [{"d": 1}]}}) == [
        "a.b: 1 -> (absent)",
        "a.c[0].d: (absent) -> 1",
    ]


def test_a_full_disk_keeps_the_file_that_stood_there(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    directory.write_json(path, {"old": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left to write .*summary\.json.*--resume"):
        directory.write_json(path, {"new": 1})
    assert directory.read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_number_that_json_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.write_json(tmp_path / "x.json", {"nll": float("nan")})


def test_the_lock_excludes_another_process_and_dies_with_it(tmp_path):
    directory.create(tmp_path, CONFIG)
    program = (
        "import sys, time; from pathlib import Path; from fedjax_llm.runs.directory import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="another process"), directory.locked(tmp_path):
                pass
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
    with directory.locked(tmp_path):
        pass
