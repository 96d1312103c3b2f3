"""Weights & Biases without a service: what stands in its file is what would be sent."""

import importlib.util
import json
import socket
import time

import pytest
from wandb_file import records

from fedjax_llm.errors import UserError
from fedjax_llm.runs.tensorboard import scalars
from fedjax_llm.runs.tracking import Trackers, aggregate, table
from fedjax_llm.runs.wandb_tracker import Wandb

CONFIG = {"class": "Experiment", "lora": {"rank": 4}}
LINE = {
    "round": 1, "loss": 2.5, "cohort": ["ward nine"], "sites": {"ward nine": {"loss": 2.25}},
    "epsilon": {"unit": "record", "delta": 1e-5, "max": 3.0, "accounts": {"ward nine": 3.0}},
}  # fmt: skip
SUMMARY = {"final": {"nll": 2.5, "sites": {"ward nine": {"nll": 2.0}}}, "privacy": {"line": "epsilon <= 3.00"}}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is an extra")


def track(folder, rounds, summary, **options):
    said = []
    with Trackers((Wandb("hospitals", mode="offline", **options),), CONFIG, folder, said.append) as trackers:
        for number in rounds:
            trackers.round(LINE | {"round": number})
        if summary:
            trackers.finish(summary)
    assert said == []
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    until = time.monotonic() + 60
    while not all(any(record.HasField("exit") for record in records(path)) for path in files):
        assert time.monotonic() < until, "the file of a run that has ended is never written to its end"
        time.sleep(0.05)  # its process may write on for a moment
    return files


def history(path):
    for record in records(path):
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


HOST = "a-hospitals-own-machine"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # a name that random bytes do not hold
        patch.setattr(socket, "gethostname", lambda: HOST)
        (file,) = track(tmp_path_factory.mktemp("mine"), [1, 2], SUMMARY)
    return file


def test_every_aggregate_scalar_of_a_round_is_there(tracked):
    lines = [{name: value for name, value in line.items() if not name.startswith("_")} for line in history(tracked)]
    assert lines == [dict(scalars(aggregate(LINE))) | {"round": number} for number in (1, 2)]
    assert lines[0]["epsilon/max"] == 3.0


def test_configuration_and_summary_are_there(tracked):
    configs, summaries = {}, {}
    for record in records(tracked):
        configs |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
        summaries |= {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
        }
    assert configs | CONFIG == configs
    for name, value in table(aggregate(SUMMARY)).items():
        assert summaries[f"summary/{name}"] == value


def test_nothing_of_single_sites_or_of_the_machine_is_there(tracked):
    data = tracked.read_bytes()
    for word in ("ward nine", HOST, str(tracked.parents[2]), "pytest"):
        assert word.encode() not in data, word
    others = [one for one in tracked.parent.rglob("*") if one.is_file() and one.parent.name != "logs"]
    assert others == [tracked]  # the logs stay here


def test_sites_are_sent_where_that_is_asked_for(tmp_path):
    (file,) = track(tmp_path, [1], SUMMARY, sites=True)
    (line,) = history(file)
    assert line["sites/ward nine/loss"] == 2.25


def test_a_resume_goes_on_with_the_same_run(tmp_path):
    track(tmp_path, [1, 2], None)
    files = track(tmp_path, [2, 3], SUMMARY)
    names = {next(record.run.run_id for record in records(file) if record.HasField("run")) for file in files}
    assert len(files) == 2
    assert len(names) == 1


def test_nobody_logged_in_is_told_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"nobody is logged in to it: run 'wandb login'.*mode='offline'"):
        Wandb("hospitals").check()
    Wandb("hospitals", mode="offline").check()


def test_a_missing_package_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedjax_llm\[wandb\]'"):
        Wandb("hospitals").check()
