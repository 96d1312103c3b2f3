"""The metrics file: exact, synced, and whole after a kill."""

import errno
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.runs import metrics


def write(path, rounds):
    log = metrics.MetricsLog(path)
    for number in rounds:
        log.append({"round": number, "loss": 1 / number, "timing": {"seconds": 0.5}})
    return log


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_floats_read_back_bit_for_bit_and_the_rest_is_null(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    metrics.MetricsLog(path).append({"round": 1, "loss": value, "sites": {"a": [np.float64(value), np.float32(0.1)]}})
    (line,) = metrics.read(path)
    expected = value if math.isfinite(value) else None
    assert repr(line["loss"]) == repr(expected)
    assert repr(line["sites"]["a"]) == repr([expected, float(np.float32(0.1))])


def test_lines_are_synced_before_append_returns(tmp_path, monkeypatch):
    path, sizes = tmp_path / "m.jsonl", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), real(handle)))
    write(path, [1, 2])
    assert sizes[-1] == path.stat().st_size
    assert len(sizes) == 2


@given(count=st.integers(0, 6), last=st.integers(0, 7), cut=st.integers(0, 400))
def test_truncation_after_any_kill_leaves_exactly_the_rounds_kept(tmp_path_factory, count, last, cut):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    log = write(path, range(1, count + 1))
    data = path.read_bytes() if count else b""
    path.write_bytes(data[: max(0, len(data) - cut)])  # killed while a line (or several) went to the disk
    whole = path.read_bytes().count(b"\n")
    log.truncate_after(last)
    assert [line["round"] for line in metrics.read(path)] == list(range(1, min(whole, last) + 1))
    kept = path.read_bytes()
    assert data.startswith(kept)
    log.append({"round": 99})
    assert metrics.read(path)[-1] == {"round": 99}


def test_truncation_says_how_much_went(tmp_path):
    log = write(tmp_path / "m.jsonl", range(1, 6))
    assert log.truncate_after(3) == 2
    assert log.truncate_after(3) == 0
    assert metrics.MetricsLog(tmp_path / "absent.jsonl").truncate_after(3) == 0


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    log = write(tmp_path / "m.jsonl", [1])
    before = (tmp_path / "m.jsonl").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left.*m\.jsonl"):
        log.append({"round": 2})
    assert (tmp_path / "m.jsonl").read_bytes() == before


@pytest.mark.parametrize("bad", ["{]", "[1]", '{"loss": 1}', '{"round": "1"}'])
def test_a_malformed_line_is_named(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"round": 1}) + "\n" + bad + "\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 2"):
        metrics.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="missing"):
        metrics.read(tmp_path / "m.jsonl")


def test_timing_is_not_deterministic():
    assert metrics.deterministic({"round": 1, "loss": 2.0, "timing": {"seconds": 1}}) == {"round": 1, "loss": 2.0}
