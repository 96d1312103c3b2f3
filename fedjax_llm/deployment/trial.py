"""A whole federation on one machine, as it would run on many: TLS, keys, server and sites as separate processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_llm.config import from_file
from fedjax_llm.deployment.certificates import ServerFiles, make_server_files, make_signing_key, make_site_key
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.job import load_job
from fedjax_llm.deployment.processes import Processes, free_port, processes
from fedjax_llm.deployment.site import Site
from fedjax_llm.deployment.site_process import flower_environment
from fedjax_llm.deployment.superlink import SuperLink, start_superlink
from fedjax_llm.errors import UserError

_LOOK = 60.0  # seconds between questions whether a run that says nothing is there still
_SITE = '''"""A site of a trial."""

from dataclasses import replace

from fedjax_llm.config import from_file


def get_site():
    sites = {{site.name: site for site in from_file({config!r}, "get_sites", tuple)}}
    return replace(sites[{name!r}], **{fields!r})
'''


@dataclass
class Trial:
    """A federation that runs.

    Attributes:
      config: the file with the job and the sites.
      link: the SuperLink.
      started: all processes.
      files: the server's certificate.
      secrets: the folder of keys, which does not outlive the trial.
      nodes: numbers of the sites' nodes.
      settings: the sites' files.
    """

    config: Path
    link: SuperLink
    started: Processes
    files: ServerFiles
    secrets: Path
    nodes: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Path] = field(default_factory=dict)

    def start_site(self, name: str) -> None:
        """Starts a site's processes, for the first time or again."""
        command = [sys.executable, "-m", "experiments.deploy", f"--site={self.settings[name]}"]
        self.started.start(f"site-{name}", command)

    def start_run(self, out: Path, rules: Rules, resume: bool = False, resend: float = 60.0) -> tuple[str, Path]:
        """Starts the server's run; its number, and the file that will say how it ended, which is its own.

        One that was started before and killed is ended first: for a minute nodes would wait for what it has not sent.
        """
        last = self.secrets / "run-number"
        if last.exists():
            with suppress(UserError, subprocess.TimeoutExpired):  # as a rule it has ended
                self.link.stop_run(last.read_text("utf-8"))
        outcome = self.secrets / f"outcome-{uuid.uuid4().hex}.json"
        settings = {
            "job": os.path.abspath(self.config), "out": os.path.abspath(out), "resume": resume, "nodes": self.nodes,
            "rules": asdict(rules), "resend": resend, "log": str(self.started.log("run")), "outcome": str(outcome),
            "directory": str(self.secrets / "directory.json"),
        }  # fmt: skip
        path = self.secrets / "run.json"
        path.write_text(json.dumps(settings), "utf-8")
        number = self.link.run(path)
        last.write_text(number, "utf-8")
        return number, outcome


@contextmanager
def federation(config: Path, sites: Sequence[Site], home: Path, environment: Mapping[str, str] = {}) -> Iterator[Trial]:
    """Starts a SuperLink, and makes what every site needs to connect to it; the sites themselves are to be started.

    Args:
      config: a file with ``get_config()``, a job, and ``get_sites()``.
      sites: of that file.
      home: where logs go, and what sites keep.
      environment: of all processes, besides this one's.
    """
    home = home.resolve()
    with tempfile.TemporaryDirectory(prefix="fedjax-") as folder:
        secrets = Path(folder)
        own = flower_environment(secrets / "flwr") | {"PYTHONPATH": python_path()} | dict(environment)
        files = make_server_files(secrets, ["127.0.0.1", "localhost"])
        with processes(home / "logs", own) as started:
            link = start_superlink(files, free_port(), started, secrets / "superlink")
            trial, directory = Trial(config, link, started, files, secrets), {}
            for site in sites:
                private, public = make_site_key(secrets, site.name)
                signing, directory[site.name] = make_signing_key(secrets, site.name)
                trial.nodes[site.name] = link.register(public)
                fields = {
                    "server": link.address, "root_certificate": str(files.root), "private_key": str(private),
                    "signing_key": str(signing), "directory": str(secrets / "directory.json"),
                    "folder": str(home / site.name), "job": os.path.abspath(config),
                }  # fmt: skip
                path = secrets / f"{site.name}.py"
                path.write_text(_SITE.format(config=os.path.abspath(config), name=site.name, fields=fields), "utf-8")
                trial.settings[site.name] = path
            (secrets / "directory.json").write_text(json.dumps(directory), "utf-8")
            yield trial


def run_trial(config: Path, out: Path, console: Console, rules: Rules | None = None, resume: bool = False) -> None:
    """Runs a job on this machine, over processes that share nothing but their connections.

    Args:
      config: a file with ``get_config()``, a job, and ``get_sites()``.
      out: the run's folder; logs, and what sites keep, go beside it.
      console: where to show progress.
      rules: of waiting for sites.
      resume: go on with the run in that folder.

    Raises:
      UserError: something that the user can put right.
    """
    sites: tuple[Site, ...] = from_file(config, "get_sites", tuple)
    names = load_job(config).data.source.names
    if sorted(names) != sorted(site.name for site in sites):
        raise UserError(f"get_sites() of {config} gives {[site.name for site in sites]}, and its job has {list(names)}")
    home = out.with_name(out.name + "-sites")
    with federation(config, sites, home) as trial:
        console.print(
            f"SuperLink on {trial.link.address} (TLS), {len(sites)} sites with keys; logs in {trial.started.folder}"
        )
        for site in sites:
            trial.start_site(site.name)
        run_to_end(trial, out, rules or Rules(at_least=len(sites)), resume, console)


def run_to_end(trial: Trial, out: Path, rules: Rules, resume: bool, console: Console) -> None:
    """Starts the server's run, and shows its log until it has ended.

    Args:
      trial: the federation.
      out: the run's folder.
      rules: of waiting for sites.
      resume: go on with the run in that folder.
      console: where to show progress.

    Raises:
      UserError: the run failed, or one of the processes ended before it.
    """
    log = trial.started.log("run")
    log.write_text("", "utf-8")
    number, outcome = trial.start_run(out, rules, resume)
    told = followed(trial, number, outcome, console)
    outcome.unlink()
    if told["status"]:
        raise UserError(f"{told['message']} (logs: {trial.started.folder})")


def followed(trial: Trial, number: str, outcome: Path, console: Console | None = None) -> Mapping[str, Any]:
    """Shows a run's log as it grows; how the run ended.

    Args:
      trial: the federation.
      number: of the run.
      outcome: the file that will say how it ended.
      console: where to show the log; ``None``: nowhere.

    Raises:
      UserError: one of the processes ends before, or the run's own is killed, or never begins.
    """
    log, shown, look = trial.started.log("run"), 0, time.monotonic() + _LOOK
    while True:
        done = outcome.exists()
        if console is not None and log.exists():
            with open(log, encoding="utf-8", errors="replace") as file:
                file.seek(shown)
                console.out(file.read(), end="", highlight=False)
                shown = file.tell()
        if done:
            return json.loads(outcome.read_text("utf-8"))
        trial.started.check()
        if time.monotonic() > look:
            check_alive(trial, number, outcome)
            look = time.monotonic() + _LOOK
        time.sleep(0.5)


def check_alive(trial: Trial, number: str, outcome: Path) -> None:
    """Refuses to wait for a run that has ended without a word.

    Raises:
      UserError: Flower says so.
    """
    try:
        ended = trial.link.ended(number)
    except (UserError, subprocess.TimeoutExpired):
        return  # a busy machine: it is asked again
    if ended and not outcome.exists():  # which is written before Flower hears of the end
        raise UserError(
            f"the process of the server's run was killed, or did not begin; Flower says: {ended}. What is done is "
            f"kept: go on with --resume (logs: {trial.started.folder})"
        )


def python_path() -> str:
    """The path on which processes find what this one runs."""
    return os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
