"""The main job: fine-tunes a language model across sites, evaluates it and writes a report.

    python -m experiments.run --config=configs/quickstart.py
    python -m experiments.run --config=configs/quickstart.py --setting=centralised --federation.rounds=5
    python -m experiments.run --config=configs/quickstart.py --out=runs/mine --resume
    python -m experiments.run --config=configs/quickstart.py --hosts.coordinator=10.0.0.1:8476 --hosts.count=2 \
        --hosts.index=0

Every field of the configuration can be overridden; ``--help`` lists them with the configuration's values.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm import config as configuration
from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError, tell
from fedjax_llm.federation.hosts import Cluster, HostGone, connected
from fedjax_llm.runs import keys

DEFAULT = "configs/quickstart.py"


@dataclass(frozen=True)
class Command(Experiment):
    """Fine-tunes a language model across sites. The other options override fields of the configuration.

    Attributes:
      config: a Python file with ``get_config() -> Experiment``.
      out: the run's folder; ``runs/<config>-<setting>`` if not given.
      resume: go on with the run in that folder.
      key_file: the key with which output.encryption encrypts, if it is not where that says.
      hosts: the machines that share the sites, each started with an index of its own.
    """

    config: str = DEFAULT
    out: str | None = None
    resume: bool = False
    key_file: Path | None = None
    hosts: Cluster = Cluster()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    try:
        command = parse(arguments)
        experiment = experiment_of(command)
        folder = Path(command.out or f"runs/{Path(command.config).stem}-{experiment.setting}")
        if command.key_file is not None and experiment.output.encryption is None:
            raise UserError(
                "--key-file names a key, but output.encryption is None, so that nothing would be encrypted; set it in "
                "the configuration: output=Output(encryption=Encryption(key_file=...))"
            )
        from fedjax_llm.experiment.run import run

        with keys.using(command.key_file), connected(command.hosts) as hosts:
            return run(experiment, folder, resume=command.resume, console=console, hosts=hosts)
    except HostGone as error:
        tell(error)
        return 1
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


def parse(arguments: list[str]) -> Command:
    """The command line, with the configuration file's values as defaults.

    Raises:
      UserError: the configuration cannot be read.
      SystemExit: an option does not exist (near ones are named), or ``--help``.
    """
    path = config_path(arguments) or DEFAULT
    default = Command(**fields_of(configuration.load(path)), config=path)
    return tyro.cli(
        Command, default=default, args=arguments, prog="python -m experiments.run", description=told(__doc__)
    )


def config_path(arguments: list[str]) -> str | None:
    """What the command line names with ``--config``; the last one holds."""
    path = None
    for place, word in enumerate(arguments):
        if word == "--config" and place + 1 < len(arguments):
            path = arguments[place + 1]
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    return path


def fields_of(experiment: Experiment) -> dict[str, Any]:
    """The fields of an experiment, or of a command line that has them among its own."""
    return {field.name: getattr(experiment, field.name) for field in dataclasses.fields(Experiment)}


def experiment_of(command: Experiment) -> Experiment:
    """The experiment that a command line says.

    Raises:
      UserError: a value has no place in its field.
    """
    experiment = Experiment(**fields_of(command))
    configuration.check(experiment)
    return experiment


if __name__ == "__main__":
    sys.exit(main())
