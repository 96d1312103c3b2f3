"""The model of a run on medical multiple choice as it is published, beside its base model.

    python -m experiments.evaluate runs/mine --benchmark.name=pubmedqa --benchmark.path=ori_pqal.json
    python -m experiments.evaluate runs/mine --benchmark.name=medmcqa --benchmark.path=dev.json --benchmark.most=500
    python -m experiments.evaluate runs/mine --benchmark.name=medqa --scoring.forms letters answers match
    python -m experiments.evaluate runs/mine --benchmark.name=mmlu --benchmark.path=mmlu/test

Without a path the hub is asked (``pip install 'fedjax_llm[hub]'``). What is found stays in RUN/benchmarks/NAME.json.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.data.medical_choice import MedicalChoice
from fedjax_llm.errors import UserError, tell
from fedjax_llm.experiment.benchmark import Scoring, keep, run_benchmark, table_rows
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.leak_report import table
from fedjax_llm.experiment.tuned import open_run
from fedjax_llm.runs import keys
from fedjax_llm.runs.progress import RunProgress

COLUMNS = ("scored by", "questions", "base", "tuned", "tuned - base", "best guesser")


@dataclass(frozen=True)
class Command:
    """Scores the model of a run on a medical benchmark, beside its base model and guessers.

    Attributes:
      run: the folder of a run.
      benchmark: which questions.
      scoring: how they are scored.
      base: only the base model; then a run without an adapter will do.
      json: print what is kept, rather than a table.
      key_file: of an encrypted run, if the key is not where the run says.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    benchmark: MedicalChoice = MedicalChoice()
    scoring: Scoring = Scoring()
    base: bool = False
    json: bool = False
    key_file: Path | None = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    console = Console()
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m experiments.evaluate", description=told(__doc__))
        use_compilation_cache()
        shown = Console(stderr=True) if command.json else console
        with keys.using(command.key_file), RunProgress(1, shown) as progress:
            with progress.phase("Loading the model"):
                tuned = open_run(command.run, command.base)
            found = run_benchmark(tuned, command.benchmark, command.scoring, progress.phase)
            path = keep(command.run, found)
        if command.json:
            print(json.dumps(found))
            return 0
        console.print(table(f"{command.benchmark.name}: share of right answers", COLUMNS, table_rows(found)))
        console.print(f"Answers one by one: {path}", soft_wrap=True)
        return 0
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
