"""Differential privacy before and after a run.

What a configuration will guarantee, without its model and without training; options override fields as in a run:

    python -m experiments.privacy --config=configs/quickstart.py --privacy.target-epsilon=4

With a target or a budget that includes how many rounds, and how much sampling, would fit it with the same noise.

What a run released, finished or not, recomputed from its ledger alone and compared with what the run claims. The exit
status is 1 if it claims less than it released:

    python -m experiments.privacy runs/quickstart-federated

What all runs together released about a site of a deployment, by the site's own ledger:

    python -m experiments.privacy site/budget.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.command_line import told
from experiments.run import config_path, experiment_of, fields_of
from fedjax_llm import config as configuration
from fedjax_llm.config import MAY_CHANGE, Experiment
from fedjax_llm.errors import UserError, tell
from fedjax_llm.privacy.ledger import config_hash
from fedjax_llm.runs import directory, keys, recount, recount_site
from fedjax_llm.runs.progress import RunProgress

PROGRAM = "python -m experiments.privacy"


@dataclass(frozen=True)
class Look(Experiment):
    """Says what a configuration will guarantee. The other options override fields of the configuration.

    Attributes:
      config: a Python file with ``get_config() -> Experiment``.
    """

    config: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    try:
        path = config_path(arguments)
        return count(arguments, console) if path is None else look(path, arguments, console)
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


def look(path: str, arguments: list[str], console: Console) -> int:
    """Prints what a configuration will guarantee."""
    from fedjax_llm.experiment import forecast

    default = Look(**fields_of(configuration.load(path)), config=path)
    experiment = experiment_of(tyro.cli(Look, default=default, args=arguments, prog=PROGRAM, description=told(__doc__)))
    with RunProgress(experiment.federation.rounds, console) as progress:
        found = forecast.forecast(experiment, progress)
    forecast.render(console, experiment, found)
    return 0


def count(arguments: list[str], console: Console) -> int:
    """Prints what a run released; 1 if the run claims less."""

    def released(
        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
        delta: float | None = None,
        key_file: Path | None = None,
    ) -> recount.Recount | recount_site.SiteRecount:
        """Recomputes a run's epsilon from its ledger alone; with --config=FILE instead, says what it will be.

        Args:
          run: the folder of a run, or the file of a site's own ledger.
          delta: of the guarantee; that of the ledger if not given.
          key_file: of an encrypted run, whose claims are read with it, if the key is not where the run says.
        """
        if run.is_file():
            return recount_site.recount_site(run, delta)
        directory.refuse_absent(run)
        path = run / directory.CONFIG
        config = config_hash(directory.read_json(path), MAY_CHANGE) if path.is_file() else None
        with keys.using(key_file):
            return recount.recount(run, delta, config=config)

    found = tyro.cli(released, args=arguments, prog=PROGRAM, description=told(__doc__))
    if isinstance(found, recount_site.SiteRecount):
        recount_site.render(console, found)
        return 0
    recount.render(console, found)
    return 0 if found.sound else 1


if __name__ == "__main__":
    sys.exit(main())
