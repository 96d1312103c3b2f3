"""A federation between real sites, over Flower: a site, the server, or a trial of the whole on this machine.

    python -m experiments.deploy --config=configs/deploy/quickstart.py            # a trial, with throw-away keys
    python -m experiments.deploy --config=configs/deploy/quickstart.py --out=runs/mine --resume
    python -m experiments.deploy --config=configs/deploy/quickstart.py --simulate  # the same job in one process
    python -m experiments.deploy --site=my_hospital.py                             # one site, beside its text

docs/deploy.md walks the operators of a site and of the server through it.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell


@dataclass(frozen=True)
class Command:
    """Runs a job between sites that keep their text.

    Attributes:
      config: a Python file with ``get_config() -> Experiment``, a job, and ``get_sites()``, for a trial here.
      site: a Python file with ``get_site() -> Site``: this machine is that site.
      part: of a site: the worker that holds its text and the node that connects to the server can be run by two users,
        who share the socket in the site's folder alone.
      server: a Python file with ``get_server() -> Server``: this machine is the server.
      out: the run's folder; ``runs/deploy-<config>`` if not given.
      resume: go on with the run in that folder.
      simulate: do the job of a trial in one process instead.
      deadline: seconds after which a round goes on without the sites that have not answered; if not given it waits.
      at_least: sites that a round needs; all if not given.
    """

    config: Path | None = None
    site: Path | None = None
    part: Literal["both", "worker", "node"] = "both"
    server: Path | None = None
    out: Path | None = None
    resume: bool = False
    simulate: bool = False
    deadline: float | None = None
    at_least: int | None = None


_OF = {
    "part": ("site",), "resume": ("config", "server"), "out": ("config",), "simulate": ("config",),
    "deadline": ("config",), "at_least": ("config",),
}  # fmt: skip
"""What each option goes with."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    console = Console()
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m experiments.deploy", description=told(__doc__))
        if sum(path is not None for path in (command.config, command.site, command.server)) != 1:
            raise UserError(
                "name one of --config=FILE, a job for a trial here; --site=FILE, the settings of a site; and "
                "--server=FILE, those of the server"
            )
        _check_options(command)
        if command.site is not None:
            from fedjax_llm.deployment.site import read_site
            from fedjax_llm.deployment.site_process import run_site

            run_site(read_site(command.site), console, command.part)
        elif command.server is not None:
            from fedjax_llm.deployment.server_process import read_server, run_server

            run_server(read_server(command.server), console, command.resume)
        else:
            _trial(command, console)
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    return 0


def _check_options(command: Command) -> None:
    """Refuses options that the rest of the command line would leave without effect.

    Raises:
      UserError: with the option, and what it goes with.
    """
    given = {field.name for field in fields(command) if getattr(command, field.name) != field.default}
    for name, of in _OF.items():
        if name in given and not given & set(of):
            option, others = name.replace("_", "-"), " or ".join(f"--{one}" for one in of)
            raise UserError(f"--{option} goes with {others} only; leave it out")
    if command.simulate and given & {"resume", "deadline", "at_least"}:
        raise UserError("--simulate does the job at once, without sites to wait for: leave the others out")


def _trial(command: Command, console: Console) -> None:
    """A trial of a job on this machine, or its simulation."""
    from fedjax_llm.config import from_file
    from fedjax_llm.deployment.desk import Rules
    from fedjax_llm.deployment.job import load_job
    from fedjax_llm.deployment.serve import simulate
    from fedjax_llm.deployment.trial import run_trial

    assert command.config is not None
    kind = "simulated" if command.simulate else "deploy"
    out = command.out or Path(f"runs/{kind}-{command.config.stem}")
    sites = from_file(command.config, "get_sites", tuple)
    if command.simulate:
        simulate(load_job(command.config), out, {site.name: site.data for site in sites}, console=console)
        return
    rules = Rules(deadline=command.deadline, at_least=command.at_least or len(sites))
    run_trial(command.config, out, console, rules, command.resume)


if __name__ == "__main__":
    sys.exit(main())
