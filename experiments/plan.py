"""What a run will take, before it begins: microbatches, tokens, time and memory on this machine.

    python -m experiments.plan --config=configs/quickstart.py
    python -m experiments.plan --config=configs/quickstart.py --federation.rounds=5 --json
    python -m experiments.plan --config=configs/pod/llama3_8b.py --topology=v5e:4x4

The machine is timed first, on the model's first layers: some seconds, once the programs are compiled. What it measures
is kept in the cache folder, and every run refines it. ``experiments.run`` begins with the same prediction in one line.

With ``--topology`` the round is compiled for a TPU slice that need not be there (``pip install
'fedjax_llm[topology]'``): whether it fits, what its chips send each other, and how long it should take.
``--topology=all`` makes a table of slices.
"""

import json
import sys
from dataclasses import dataclass, replace

import tyro
from rich.console import Console

from experiments.command_line import told
from experiments.run import DEFAULT, config_path, experiment_of, fields_of
from fedjax_llm import config as configuration
from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError, tell
from fedjax_llm.runs.progress import RunProgress, byte_size, duration, settings_table


@dataclass(frozen=True)
class Plan(Experiment):
    """Says what a run will take. The other options override fields of the configuration.

    Attributes:
      config: a Python file with ``get_config() -> Experiment``.
      calibrate: time the machine first; without it, what earlier runs have measured is used.
      json: print one JSON object rather than a table; with ``--topology=all``, one a line.
      topology: a TPU slice such as ``v5e:4x4`` to compile the round for, instead of timing this machine; ``all``:
        slices of 8 to 256 chips of every kind; models of more than 32 layers are extrapolated from shallower ones.
    """

    config: str = DEFAULT
    calibrate: bool = True
    json: bool = False
    topology: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    try:
        path = config_path(arguments) or DEFAULT
        default = Plan(**fields_of(configuration.load(path)), config=path)
        about = told(__doc__)
        command = tyro.cli(Plan, default=default, args=arguments, prog="python -m experiments.plan", description=about)
        if command.topology is not None:
            from experiments.pod_plan import show_topology

            show_topology(experiment_of(command), command.topology, command.json, console)
            return 0
        show(experiment_of(command), command, console)
        return 0
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


def show(experiment: Experiment, command: Plan, console: Console) -> None:
    """Prints the prediction of an experiment."""
    from fedjax_llm.experiment.cost_constants import calibrated, store
    from fedjax_llm.experiment.expectation import expect
    from fedjax_llm.experiment.memory import set_up_process
    from fedjax_llm.experiment.prediction import predict
    from fedjax_llm.experiment.prepare import prepare

    set_up_process()  # as a run does: a step that clears its memory anew takes a tenth longer
    shown = Console(stderr=True) if command.json else console
    with RunProgress(experiment.federation.rounds, shown) as progress:
        prepared = prepare(experiment, progress)
        expected = expect(prepared)
        found = expected.prediction
        if command.calibrate:
            with progress.phase("Timing the machine"):
                constants = calibrated(prepared.base, prepared.lora)._replace(memory=expected.constants.memory)
            store(prepared.base, constants)
            timed = predict(prepared, expected.work, constants, expected.held)
            found = replace(timed, memory_bytes=found.memory_bytes)  # what timing has taken is not the run's
    if command.json:
        print(json.dumps(found.to_json()))
        return
    rows = [
        ("rounds", found.rounds),
        ("microbatches", f"{found.microbatches:,.0f}"),
        ("tokens", f"{found.tokens:,.0f} real, {found.padded_tokens:,.0f} with padding"),
        ("operations", f"{found.operations / 1e12:,.1f} TFLOP"),
        ("a round", duration(found.training_seconds / max(found.rounds, 1))),
        ("training", duration(found.training_seconds)),
        *([("fine-tuning at the sites", duration(found.finetuning_seconds))] if found.finetuning_seconds else []),
        ("evaluation", duration(found.evaluation_seconds)),
        ("in all", duration(found.seconds)),
        ("compiling, the first time", duration(found.compile_seconds)),
        ("memory", byte_size(found.memory_bytes)),
    ]
    console.print(settings_table(rows, title="Roughly" if found.rough else "On this machine"))


if __name__ == "__main__":
    sys.exit(main())
