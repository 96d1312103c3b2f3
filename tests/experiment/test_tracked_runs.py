"""Whole runs with trackers: everything reaches them, a resume goes on, and no figure of a run knows of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_run import changed, go, outcome, write_small

from fedjax_llm.config import load
from fedjax_llm.errors import UserError
from fedjax_llm.runs import metrics
from fedjax_llm.runs.tensorboard import scalars
from fedjax_llm.runs.tracking import Tracked, aggregate, table

pytestmark = pytest.mark.usefixtures("short_reports")


@dataclass(frozen=True)
class Notebook:
    """Writes what it is told into a file, a line each; refuses, or fails in a round, where it is bidden to."""

    path: str
    sites: bool = False
    fails_in: int = 0
    absent: bool = False

    def check(self):
        """Refuses where its package is said to be absent."""
        if self.absent:
            raise UserError("the notebook's package is missing")

    def begin(self, run):
        self._write("begin", run.known, run.config)
        return Tracked(run.known or "first", self._round, lambda summary: self._write("finish", summary))

    def _round(self, step, numbers):
        if step == self.fails_in:
            raise TimeoutError("no answer")
        self._write("round", step, numbers)

    def _write(self, *what):
        with Path(self.path).open("a") as file:
            file.write(json.dumps(what) + "\n")


def told(path):
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration of two rounds, and the outcome of its run without trackers."""
    folder = tmp_path_factory.mktemp("small")
    experiment = changed(load(write_small(folder)), federation__rounds=2)
    assert go(experiment, folder / "plain")[0] == 0
    return experiment, outcome(folder / "plain")


def test_a_run_is_tracked_whole_and_is_the_same_run(small, tmp_path):
    experiment, plain = small
    paths = [tmp_path / name for name in ("good", "bad")]
    trackers = (Notebook(str(paths[0])), Notebook(str(paths[1]), fails_in=1))
    status, seen = go(changed(experiment, output__tracking=trackers), tmp_path / "run")
    assert status == 0
    assert seen.count("Warning: tracking by Notebook is given up") == 1
    assert outcome(tmp_path / "run") == plain
    lines = metrics.read(tmp_path / "run/metrics.jsonl")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert told(paths[0]) == [
        ("begin", None, config),
        *(("round", line["round"], dict(scalars(aggregate(line)))) for line in lines),
        ("finish", table(aggregate(summary))),
    ]
    assert [what for what, *_ in told(paths[1])] == ["begin"]


def test_a_resume_goes_on_with_the_tracked_run(small, tmp_path, monkeypatch):
    experiment, plain = small
    path = tmp_path / "diary"
    tracked = changed(experiment, output__tracking=(Notebook(str(path)),))

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedjax_llm.experiment.run.finetune", stopped)
        assert go(tracked, tmp_path / "run")[0] == 130
    assert go(tracked, tmp_path / "run", resume=True)[0] == 0
    assert outcome(tmp_path / "run") == plain
    assert [entry[:2] for entry in told(path)[:-1]] == [
        ("begin", None), ("round", 1), ("round", 2), ("finish", None), ("begin", "first"),
    ]  # fmt: skip
    assert told(path)[-1][0] == "finish"


def test_a_missing_package_is_told_before_the_folder_is_made(small, tmp_path):
    experiment, _ = small
    with pytest.raises(UserError, match="package is missing"):
        go(changed(experiment, output__tracking=(Notebook("x", absent=True),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
