"""The real thing in miniature: Flower's SuperLink and SuperNodes as processes, with TLS and keys, and a site killed."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from small_job import events, lines
from small_run import SITES
from small_trial import PATIENCE, check_simulated, rounds_charged, running, wait_for, write_trial

from fedjax_llm.config import from_file
from fedjax_llm.deployment.certificates import make_server_files, make_site_key
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.processes import tail
from fedjax_llm.deployment.site import read_site
from fedjax_llm.deployment.site_process import supernode_command
from fedjax_llm.deployment.trial import Trial, federation, followed

pytest.importorskip("flwr", reason="the extra [flower] is not installed")
pytestmark = pytest.mark.flower


class Done(NamedTuple):
    """What there is after a trial: its folder, how its run ended, processes by name, and what strangers' logs said."""

    folder: Path
    told: dict
    processes: dict[str, subprocess.Popen]
    strangers: dict[str, str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A private run of two rounds, in which one site is killed and started again, and two strangers knock."""
    folder = tmp_path_factory.mktemp("trial")
    config = write_trial(folder)
    sites = from_file(config, "get_sites", tuple)
    run, strangers = folder / "run", {}
    with federation(config, sites, folder / "home") as trial:
        for name in SITES:
            trial.start_site(name)
        number, outcome = trial.start_run(run, Rules(at_least=3, tries=30, pause=1.0), resend=20.0)
        everyone = dict(trial.started.running)
        wait_for(run / "metrics.jsonl", outcome)
        trial.started.stop("site-hill", at_once=True)
        strangers = {kind: knock(trial, kind) for kind in ("key", "certificate")}
        trial.start_site("hill")
        everyone["site-hill again"] = trial.started.running["site-hill"]
        told = followed(trial, number, outcome)
        logs = {path.stem: tail(path) for path in trial.started.folder.glob("*.log")}
    assert told["status"] == 0, (told, logs)
    return Done(folder, dict(told), everyone, strangers)


def knock(trial: Trial, wrong: str) -> str:
    """What a SuperNode says that comes with a key that nobody knows, or trusts another authority."""
    command = supernode_command(read_site(trial.settings["hill"]))
    folder = trial.secrets / f"stranger-{wrong}"
    if wrong == "key":
        own, _ = make_site_key(folder, "stranger")
        command[command.index("--auth-supernode-private-key") + 1] = str(own)
    else:
        command[command.index("--root-certificates") + 1] = str(make_server_files(folder, ["127.0.0.1"]).root)
    name = f"stranger-{wrong}"
    process = trial.started.start(name, [*command, "--max-retries", "1"])
    try:
        process.wait(PATIENCE)
    finally:
        trial.started.stop(name, at_once=True)
    assert process.returncode != 0
    return tail(trial.started.log(name), 60)


def test_the_run_over_processes_gives_the_bits_of_the_simulation(done):
    check_simulated(done.folder)


def test_the_site_that_was_killed_came_back_and_each_site_was_charged_once_a_round(done):
    assert {line["round"] for line in lines(done.folder / "run")} == {1, 2}
    assert all(line["cohort"] == ["coast", "hill", "town"] for line in lines(done.folder / "run"))
    for name in SITES:
        assert rounds_charged(done.folder, name) == [1, 2]
    assert {site for _, site, _, _ in events(done.folder / "run")} <= {"hill"}


def test_strangers_are_turned_away(done):
    assert "ertificate" in done.strangers["certificate"]
    assert "coast" not in done.strangers["key"]


def test_no_process_outlives_the_trial(done):
    assert all(process.poll() is not None for process in done.processes.values())
    found = "\n".join(args for _, _, args in running())
    assert str(done.folder) not in found


def test_an_ordinary_run_folder_is_left_and_no_key(done):
    names = {path.name for path in (done.folder / "run").iterdir()}
    wanted = {
        "config.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "summary.json",
        "report.html",
        "adapter",
        "joined.msgpack",
    }
    assert wanted <= names
    everything = [
        path for path in done.folder.rglob("*") if path.is_file() and path.suffix in (".key", ".pem", ".jsonl")
    ]
    assert everything
    assert not any(b"PRIVATE KEY" in path.read_bytes() for path in everything)
