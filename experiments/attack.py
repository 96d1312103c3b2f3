"""Shows what a model gives away: of a finished run, or by a configuration.

    python -m experiments.attack runs/quickstart-federated
    python -m experiments.attack runs/mine --attacks.shadows=16
    python -m experiments.attack --config=configs/attacks/open_model.py
    python -m experiments.attack --config=configs/attacks/course.py

A configuration is a Python file with ``get_attack()``; the same command again goes on where it ended. The exit status
is 0; 3 if an audit shows more than is claimed, 2 if something is wrong with the request, 130 after Ctrl-C.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.experiment.ground import Attacks
from fedjax_llm.runs import directory, keys


@dataclass(frozen=True)
class Command:
    """Attacks a finished run, or does what a configuration says.

    Attributes:
      run: the folder of a finished run.
      config: without a run, a file with ``get_attack()``; with one, the run's own configuration, where its folder names
        classes that this project does not have.
      out: the folder of a configuration's results; ``runs/<name of the file>`` if not given.
      site: whose adapters to attack, where every site has its own.
      key_file: of an encrypted run, if the key is not where the run says.
      attacks: on a run, how hard.
    """

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    config: Path | None = None
    out: Path | None = None
    site: str | None = None
    key_file: Path | None = None
    attacks: Attacks = Attacks()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    console = Console()
    try:
        about = told(__doc__)
        command = tyro.cli(Command, args=arguments, prog="python -m experiments.attack", description=about)
        if command.run is None:
            return configured(command, console)
        if command.out is not None:
            raise UserError("--out is for a configuration; what is found about a run stays in its folder")
        from fedjax_llm import config
        from fedjax_llm.experiment.attacked_run import attack_run

        directory.refuse_absent(command.run)
        experiment = None if command.config is None else config.load(command.config)
        with keys.using(command.key_file):
            return attack_run(command.run, command.attacks, console, site=command.site, experiment=experiment)
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.")
        return 130


def configured(command: Command, console: Console) -> int:
    """Does what a configuration says.

    Raises:
      UserError: there is none, or options are given that are for runs.
    """
    if command.config is None:
        raise UserError("name the folder of a run, or a configuration: --config=configs/attacks/open_model.py")
    if command.site is not None or command.key_file is not None or command.attacks != Attacks():
        raise UserError("--site, --key-file and --attacks are for runs; a configuration says all by itself")
    from fedjax_llm.experiment import attack

    return attack.run_attack(attack.load(command.config), command.out or Path("runs") / command.config.stem, console)


if __name__ == "__main__":
    sys.exit(main())
