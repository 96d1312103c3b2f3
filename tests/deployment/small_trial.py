"""A trial in miniature: real processes, a tiny model in a folder, three sites of invented records."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from small_job import adapters, lines, private_job, quiet, same_bits
from small_run import write_sites
from tiny import tiny_folder

from fedjax_llm.config import from_file
from fedjax_llm.deployment.job import load_job
from fedjax_llm.deployment.serve import simulate
from fedjax_llm.privacy import ledger

PATIENCE = 240.0  # seconds, of which none is needed
SITES = """

def get_sites():
    from fedjax_llm.data.site_files import SiteFiles
    from fedjax_llm.deployment.site import Budget, Site

    return tuple(
        Site(name, SiteFiles((f"{texts}/{{name}}.jsonl",), id_column="id"), {job!r}, budget=Budget(20.0, 1e-3))
        for name in ("coast", "hill", "town")
    )
"""


def write_trial(folder: Path, **changes: object) -> Path:
    """Model, texts and configuration of a private job; gives the configuration file."""
    model, texts = tiny_folder(folder / "model"), write_sites(folder / "sites")
    path = private_job(folder, **changes)
    text = path.read_text().replace('name="tiny"', f"name={str(model)!r}")
    path.write_text(text + SITES.format(texts=texts, job=str(path)))
    return path


def check_simulated(folder: Path) -> None:
    """The run in a trial's folder has the adapters and the metrics of its simulation, bit for bit."""
    config = folder / "job.py"
    held = {site.name: site.data for site in from_file(config, "get_sites", tuple)}
    simulate(load_job(config), folder / "simulation", held, console=quiet())
    assert same_bits(adapters(folder / "run"), adapters(folder / "simulation"))
    assert lines(folder / "run") == lines(folder / "simulation")


def rounds_charged(folder: Path, name: str) -> list[int]:
    """The rounds that a site of a trial has charged to its own budget."""
    entries = ledger.read(folder / "home" / name / "budget.jsonl").entries
    return [entry.round for entry in entries if entry.events]


def wait_for(path: Path, outcome: Path) -> None:
    """Waits until a file holds something, or the run has ended."""
    wait_until(lambda: (path.exists() and path.stat().st_size > 0) or outcome.exists())


def wait_until(true: Callable[[], bool]) -> None:
    """Waits for something."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def running() -> list[list[str]]:
    """Number, parent and whole command line of every process: without ``ww``, ps cuts lines at the terminal's width."""
    words = ["ps", "-ww", "-eo", "pid=,ppid=,args="]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [line.split(None, 2) for line in listed.splitlines()]


def alive(process: int) -> bool:
    """Whether a process runs, and is not only waited for."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")
