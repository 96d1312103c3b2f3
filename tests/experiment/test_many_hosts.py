"""Runs on several hosts: as threads, what each reads and knows; as processes, results, deaths and resuming."""

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_private import entries
from small_run import SITES, changed, go, outcome, write_small
from threaded_hosts import as_threads

from fedjax_llm import config
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.data import site_files
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.prepare import load_dataset, prepare
from fedjax_llm.federation.hosts import Hosts, here
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.runs import metrics
from fedjax_llm.runs.checkpoints import finished_steps
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.secure.sec_agg import SecAgg

ORDER = sorted(SITES)
PATIENCE = 4
KILLED = """
import os, runpy, signal, sys
from fedjax_llm.federation.hosts import Hosts

told = Hosts.from_first
rounds = 0

def killed(self, value):
    global rounds
    found = told(self, value)
    rounds += isinstance(found, dict) and "attempt" in found
    if rounds == 3 and "--hosts.index={index}" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)  # the third round has begun
    return found

Hosts.from_first = killed
get_config = runpy.run_path({config!r})["get_config"]
"""
PRIVATE = """
import runpy
from small_private import private

get_config = lambda: private(runpy.run_path({config!r})["get_config"](), "DpSgd", evaluation__generations=0)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "files")


@pytest.fixture(scope="module")
def private_files(files):
    path = files.with_name("private.py")
    path.write_text(PRIVATE.format(config=str(files)))
    return path


def quiet() -> RunProgress:
    return RunProgress(1, Console(file=io.StringIO()))


def prepared_on(count: int, experiment):
    return as_threads(count, lambda hosts: prepare(experiment, quiet(), hosts=hosts))


def test_each_host_reads_and_tokenises_its_own_sites_only(files, monkeypatch):
    experiment, read = config.load(files), set()
    lines, content = site_files._lines, Path.read_bytes

    def seen(path: Path) -> None:
        if path.suffix == ".jsonl":
            read.add((threading.get_ident(), path.stem))

    monkeypatch.setattr(site_files, "_lines", lambda path: seen(path) or lines(path))
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen(path) or content(path))

    def load(hosts: Hosts) -> set[str]:
        load_dataset(experiment, hosts)
        return {stem for thread, stem in read if thread == threading.get_ident()}

    assert as_threads(2, load) == [set(ORDER[0::2]), set(ORDER[1::2])]
    monkeypatch.undo()
    alone = prepare(experiment, quiet())
    for index, found in enumerate(prepared_on(2, experiment)):
        assert [name for name, examples in found.train if here(examples)] == ORDER[index::2]
        assert list(found.held_out.test) == ORDER[index::2]
        assert all(not here(site.train) for place, site in enumerate(found.sites) if place % 2 != index)
        assert [len(examples) for _, examples in found.train] == [len(examples) for _, examples in alone.train]
        assert found.lengths == alone.lengths
        assert found.held_out.lengths == alone.held_out.lengths
        assert found.dataset.version == alone.dataset.version
        assert found.fingerprint == alone.fingerprint
        assert [client.id for client in found.plan.clients] == [client.id for client in alone.plan.clients]


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_privacy_is_accounted_for_as_on_one_host(files, tmp_path, unit):
    """With two ids and an owner that several sites have."""
    sites = tmp_path / "sites"
    sites.mkdir()
    for name in SITES:
        rows = [json.loads(line) for line in (files.parent / "sites" / f"{name}.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            row |= {"owner": f"p{i // 2}" if i < 6 and name != "hill" else f"{name} {i // 2}"}
            row |= {"id": f"twice-{i}"} if i in (2, 3) else {}
        (sites / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = config.load(files)
    experiment = changed(experiment, data__source__paths=(str(sites),), data__source__owner_column="owner")
    experiment = changed(experiment, privacy=Privacy(DpSgd(1.0, 1.0), unit=unit, delta=1e-3))
    alone = prepare(experiment, quiet())
    assert bool(alone.population.shared) == (unit == "patient")
    for found in prepared_on(3, experiment):
        assert found.population == alone.population
        assert found.fingerprint == alone.fingerprint
        np.testing.assert_array_equal(found.plan.mechanism.stddev, alone.plan.mechanism.stddev)
        assert [len(client.units) for client in found.plan.clients] == [len(c.units) for c in alone.plan.clients]


def test_a_secret_key_is_the_first_hosts(files):
    privacy = Privacy(DpSgd(1.0, 1.0), unit="record", delta=1e-3, randomness="secret")
    experiment = changed(config.load(files), privacy=privacy)
    keys = {str(found.plan.secret_key) for found in prepared_on(2, experiment)}
    assert len(keys) == 1
    assert keys != {str(prepare(experiment, quiet()).plan.secret_key)}


REFUSED = {
    "centralised": ({"setting": "centralised"}, "has one client"),
    "secure": ({"secure": SecAgg()}, "holds the secrets of all clients"),
    "attack": ({"attack": SignFlip(), "malicious": 0.4}, "malicious clients see the messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hosts_cannot_share_is_refused(files, name):
    fields, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        prepared_on(2, dataclasses.replace(config.load(files), **fields))


def test_more_hosts_than_sites_and_other_settings_are_refused(files):
    experiment = config.load(files)
    with pytest.raises(UserError, match=r"hosts.count is 4, but there are only 3 sites"):
        prepared_on(4, experiment)
    with pytest.raises(UserError, match="host 1 was started with other settings than host 0"):
        as_threads(2, lambda hosts: prepare(changed(experiment, seed=hosts.index), quiet(), hosts=hosts))


def start(configuration: Path, folder: Path, port: int, index: int, *options: str) -> subprocess.Popen:
    """A host of two, by the command line."""
    hosts = [f"--hosts.coordinator=127.0.0.1:{port}", "--hosts.count=2", f"--hosts.index={index}"]
    words = [f"--config={configuration}", f"--out={folder}", *hosts, f"--hosts.patience={PATIENCE}", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def run_two(configuration: Path, folder: Path, *options: str) -> list[tuple[int, str]]:
    """Exit status and output of both hosts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [start(configuration, folder, port, index, *options) for index in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def check_same_run(found, expected) -> None:
    """Equal but for the rounding of sums."""
    for line, wanted in zip(found["metrics"], expected["metrics"], strict=True):
        assert line["cohort"] == wanted["cohort"]
        assert line["tokens"] == wanted["tokens"]
        assert line["upload_bytes"] == wanted["upload_bytes"]
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
    for kind in ("base", "final"):
        sites, wanted = found["evaluation"][kind]["sites"], expected["evaluation"][kind]["sites"]
        assert list(sites) == list(wanted)
        for site in sites:
            assert sites[site]["records"] == wanted[site]["records"]
            np.testing.assert_allclose(sites[site]["nll"], wanted[site]["nll"], atol=1e-3)
    for name in ("sites", "lengths", "rounds_done", "data"):
        assert found["summary"][name] == expected["summary"][name]


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory, short_reports):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert go(config.load(files), folder)[0] == 0
    return outcome(folder)


@pytest.fixture(scope="module")
def unbroken_private(private_files, tmp_path_factory, short_reports):
    folder = tmp_path_factory.mktemp("private") / "run"
    assert go(config.load(private_files), folder)[0] == 0
    return outcome(folder)


def test_two_processes_do_what_one_does(files, unbroken, tmp_path):
    folder = tmp_path / "run"
    for status, said in run_two(files, folder):
        assert status == 0, said
        assert "Traceback" not in said
    check_same_run(outcome(folder), unbroken)
    assert finished_steps(folder / "checkpoints")[-1] == 3
    assert (folder / "report.html").exists()


def killed_in_the_third_round(configuration: Path, folder: Path, killed: int) -> int:
    """A run of two processes, of which one dies; checks what the other says. Gives the last round that is kept."""
    broken = folder.with_suffix(".py")
    broken.write_text(KILLED.format(index=killed, config=str(configuration)))
    found = run_two(broken, folder)
    assert found[killed][0] == -signal.SIGKILL
    status, said = found[1 - killed]
    assert status == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: host {killed} is gone")
    assert last.endswith("start all hosts again with --resume")
    done = finished_steps(folder / "checkpoints")[-1]
    assert done in ((2,) if killed == 1 else (1, 2))
    assert f"up to round {done} is kept in {folder}" in last or (killed == 0 and "round 2 had been done" in last)
    assert len(metrics.read(folder / "metrics.jsonl")) == 2
    return done


def test_the_first_host_is_killed_and_one_goes_on_alone(files, unbroken, tmp_path, short_reports):
    done = killed_in_the_third_round(files, tmp_path / "run", 0)
    status, said = go(config.load(files), tmp_path / "run", resume=True)
    assert status == 0
    assert f"Going on after round {done}" in said
    check_same_run(outcome(tmp_path / "run"), unbroken)


def test_another_is_killed_and_both_go_on_with_the_same_noise(private_files, unbroken_private, tmp_path):
    """The third round was charged before one died; as many hosts repeat it bit for bit, so it is charged once."""
    folder = tmp_path / "run"
    done = killed_in_the_third_round(private_files, folder, 1)
    first, second = run_two(private_files, folder, "--resume")
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert f"Going on after round {done}" in first[1]
    assert entries(folder) == [(1, 0), (2, 0), (3, 0)]
    found = outcome(folder)
    check_same_run(found, unbroken_private)
    assert [line["epsilon"] for line in found["metrics"]] == [line["epsilon"] for line in unbroken_private["metrics"]]
