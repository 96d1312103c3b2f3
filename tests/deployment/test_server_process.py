"""What a server says of itself: files and names are compared before anything starts, and keys are registered once."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from fedjax_llm.deployment import trial as trials
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.server_process import read_server, registered
from fedjax_llm.deployment.trial import Trial, followed
from fedjax_llm.errors import UserError

JOB = """
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.at_sites import AtSites
def get_config():
    return Experiment(data=Data(AtSites(("north", "south"))))
"""
SERVER = """
from fedjax_llm.deployment.server_process import Server
def get_server():
    files = {"root_certificate": "ca.pem", "certificate": "server.pem", "private_key": "server.key"}
    return Server(**{"job": "job.py", "out": "run", "sites": {"north": "n.pub", "south": "s.pub"}, **files, **CHANGE})
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Writes the server's file, with changes; gives its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    for name in ("ca.pem", "server.pem", "server.key"):
        (tmp_path / name).write_text("")

    def write(**change):
        (tmp_path / "server.py").write_text(f"CHANGE = {change!r}\n{SERVER}")
        return tmp_path / "server.py"

    return write


def test_a_whole_file_is_read(settings):
    server = read_server(settings(port=8001))
    assert (server.port, dict(server.sites)) == (8001, {"north": "n.pub", "south": "s.pub"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": "jobs.py"}, "job of the server is 'jobs.py'; there is no such file"),
        ({"certificate": "none.pem"}, "certificate of the server is 'none.pem'"),
        ({"directory": "none.json"}, "directory of the server is 'none.json'"),
        ({"sites": {"north": "n.pub"}}, "no public key for south"),
        (
            {"sites": {"north": "n", "south": "s", "sout": "t"}},
            "'sout', which is no site of job.py; did you mean 'south'",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_starts(settings, change, message):
    with pytest.raises(UserError, match=message):
        read_server(settings(**change))


class Link:
    """A SuperLink as far as keys are concerned: it takes each once."""

    def __init__(self):
        self.keys = []

    def register(self, public_key):
        key = public_key.read_text().split()[1]
        assert key not in self.keys
        self.keys.append(key)
        return 100 + len(self.keys)


def test_keys_are_registered_once_and_new_ones_get_new_nodes(tmp_path):
    sites = {name: str(tmp_path / f"{name}.pub") for name in ("north", "south")}
    for name, path in sites.items():
        (tmp_path / path).write_text(f"ecdsa-sha2-nistp384 KEY-{name} somebody@{name}\n")
    link, kept = Link(), tmp_path / "nodes.json"
    assert registered(link, sites, kept) == {"north": 101, "south": 102}
    (tmp_path / "north.pub").write_text("ecdsa-sha2-nistp384 KEY-north another comment\n")
    assert registered(link, sites, kept) == {"north": 101, "south": 102}
    (tmp_path / "south.pub").write_text("ecdsa-sha2-nistp384 KEY-new\n")
    assert registered(link, sites, kept) == {"north": 101, "south": 103}
    assert link.keys == ["KEY-north", "KEY-south", "KEY-new"]


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the public key of site 'north' is .*north\.pub'; there is no such file"):
        registered(Link(), {"north": str(tmp_path / "north.pub")}, tmp_path / "nodes.json")


def waiting(folder, monkeypatch, says):
    """Waits for a run of which Flower says something else at every look; how the run ended."""
    monkeypatch.setattr(trials, "_LOOK", 0.0)
    link = SimpleNamespace(ended=lambda number: next(says)(number))
    started = SimpleNamespace(folder=folder, log=lambda name: folder / f"{name}.log", check=lambda: None)
    return followed(SimpleNamespace(link=link, started=started), "7", folder / "outcome.json")


def busy(number):
    raise subprocess.TimeoutExpired("flwr", 120)


def silent(number):
    raise UserError("flwr list failed")


def test_a_run_that_goes_on_is_waited_for_whatever_flower_answers(tmp_path, monkeypatch):
    def done(number):
        (tmp_path / "outcome.json").write_text(json.dumps({"status": 0, "message": ""}))
        return f"finished:completed run {number}"

    says = iter([busy, silent, lambda number: None, done])
    assert waiting(tmp_path, monkeypatch, says)["status"] == 0
    assert list(says) == []


def test_a_run_that_ended_without_a_word_is_not_waited_for(tmp_path, monkeypatch):
    says = iter([lambda number: None, lambda number: f"finished:failed no heartbeat of {number}"])
    with pytest.raises(UserError, match=r"was killed, or did not begin; .*no heartbeat of 7\. .*go on with --resume"):
        waiting(tmp_path, monkeypatch, says)


def test_a_run_takes_the_place_of_the_one_before_whether_that_has_ended_or_not(tmp_path):
    asked = []

    def stop(number):
        asked.append(f"stop {number}")
        if number == "1":
            raise UserError("flwr stop failed: it has ended")

    def run(settings):
        asked.append(f"run, resume {json.loads(settings.read_text())['resume']}")
        return str(sum(one.startswith("run") for one in asked))

    started = SimpleNamespace(folder=tmp_path, log=lambda name: tmp_path / f"{name}.log")
    trial = Trial(tmp_path / "job.py", SimpleNamespace(stop_run=stop, run=run), started, None, tmp_path)
    begun = [trial.start_run(tmp_path / "run", Rules(), resume) for resume in (False, True, True)]
    assert [number for number, _ in begun] == ["1", "2", "3"]
    assert asked == ["run, resume False", "stop 1", "run, resume True", "stop 2", "run, resume True"]
    assert len({outcome for _, outcome in begun}) == 3
