"""The server killed and resumed over Flower, with one site as two processes, worker and node."""

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from small_job import lines
from small_run import SITES
from small_trial import check_simulated, rounds_charged, running, wait_until, write_trial

from fedjax_llm.config import from_file
from fedjax_llm.deployment import trial as trials
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.processes import tail
from fedjax_llm.deployment.trial import Trial, federation, followed
from fedjax_llm.errors import UserError

pytest.importorskip("flwr", reason="the extra [flower] is not installed")
pytestmark = pytest.mark.flower
ROUNDS = 2
QUICK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # seconds; a message waits for half of them on average


class Done(NamedTuple):
    """What there is after a run: its folder, rounds and ledgers at the kill, what the kill is called, and logs."""

    folder: Path
    rounds: int
    ledgers: dict[str, bytes]
    complaint: str
    logs: dict[str, str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A private run whose process is killed after the first checkpoint, and resumed; SuperLink and sites stay."""
    folder = tmp_path_factory.mktemp("resumed")
    config = write_trial(folder, rounds=ROUNDS)
    run, rules = folder / "run", Rules(at_least=3, tries=30, pause=1.0)
    with federation(config, from_file(config, "get_sites", tuple), folder / "home", QUICK) as trial:
        start_sites(trial, apart="hill")
        first, unsaid = trial.start_run(run, rules, resend=20.0)
        everyone = dict(trial.started.running)
        wait_until(lambda: (run / "checkpoints" / "1").exists() or unsaid.exists())
        os.kill(process_of_the_run(trial), signal.SIGKILL)
        rounds, held = len(lines(run)), ledgers(folder)
        last, outcome = trial.start_run(run, rules, resume=True, resend=20.0)
        told = followed(trial, last, outcome)
        complaint = said_of(trial, first, unsaid)
        trial.started.check()
        assert trial.started.running == everyone
        logs = {path.stem: tail(path, 1000) for path in trial.started.folder.glob("*.log")}
    assert told["status"] == 0, (told, logs)
    return Done(folder, rounds, held, complaint, logs)


def start_sites(trial: Trial, apart: str) -> None:
    """Starts all sites, one of them as worker and node."""
    for name in set(SITES) - {apart}:
        trial.start_site(name)
    for part in ("worker", "node"):
        command = [sys.executable, "-m", "experiments.deploy", f"--site={trial.settings[apart]}", f"--part={part}"]
        trial.started.start(f"{part}-{apart}", command)


def process_of_the_run(trial: Trial) -> int:
    """What the SuperExec has started, which the SuperLink has started."""
    found = str(trial.started.running["superlink"].pid)
    for program in ("flower-superexec", "flwr-serverapp"):
        (found,) = [pid for pid, parent, args in running() if parent == found and program in args]
    return int(found)


def ledgers(folder: Path) -> dict[str, bytes]:
    """What sites and server have written of what was released."""
    paths = {name: folder / "home" / name / "budget.jsonl" for name in SITES}
    return {name: path.read_bytes() for name, path in (paths | {"server": folder / "run" / "ledger.jsonl"}).items()}


def said_of(trial: Trial, number: str, outcome: Path) -> str:
    """What whoever waits for a run that was killed is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "_LOOK", 1.0)
        with pytest.raises(UserError) as found:
            followed(trial, number, outcome)
    return str(found.value)


def test_the_resumed_run_gives_the_bits_of_the_simulation(done):
    check_simulated(done.folder)


def test_it_was_killed_on_the_way_and_no_ledger_lost_what_it_had(done):
    assert done.rounds == 1
    now = ledgers(done.folder)
    assert all(held and now[name].startswith(held) for name, held in done.ledgers.items())


def test_each_site_was_charged_once_a_round(done):
    for name in SITES:
        assert rounds_charged(done.folder, name) == list(range(1, ROUNDS + 1))


def test_whoever_waits_for_a_run_that_was_killed_is_told(done):
    assert "was killed" in done.complaint
    assert "go on with --resume" in done.complaint


def test_a_site_in_two_parts_does_what_one_in_one_does_and_its_node_computes_nothing(done):
    for name in ("worker-hill", "site-coast", "site-town"):
        assert all(f"round {number}: trained" in done.logs[name] for number in range(1, ROUNDS + 1)), name
        assert done.logs[name].count("Reading the text: done") == 1, name
    assert "connecting to" in done.logs["node-hill"]
    assert "Reading the text" not in done.logs["node-hill"]
    assert "connecting to" not in done.logs["worker-hill"]
