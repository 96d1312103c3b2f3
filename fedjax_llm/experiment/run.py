"""A whole run: prepare, train, evaluate, report."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_llm import lora as low_rank
from fedjax_llm.config import MAY_CHANGE, Experiment, in_words, to_json
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.compilation import CompileClock
from fedjax_llm.experiment.disclosed import disclosed
from fedjax_llm.experiment.expectation import Expectation, expect, learn
from fedjax_llm.experiment.finetuning import finetune
from fedjax_llm.experiment.finish import finish, length_counts, site_counts, validation_of
from fedjax_llm.experiment.following import follow
from fedjax_llm.experiment.forecast import promised
from fedjax_llm.experiment.memory import set_up_process
from fedjax_llm.experiment.prepare import Load, Prepared, Trunks, prepare
from fedjax_llm.experiment.training_loop import Ended, Loop, run_rounds
from fedjax_llm.federation.communication import travelling, tree_bytes
from fedjax_llm.federation.hosts import AGAIN, ALONE, HostGone, Hosts
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.release import template
from fedjax_llm.models.loading import load
from fedjax_llm.runs import directory, environment, tracking
from fedjax_llm.runs.checkpoints import finished_steps
from fedjax_llm.runs.progress import (
    RunProgress,
    byte_size,
    privacy_table,
    results_table,
    settings_table,
    sites_table,
)
from fedjax_llm.runs.tracking import Trackers


def run(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool,
    console: Console,
    load_model: Load = load,
    trunks: Trunks | None = None,
    hosts: Hosts = ALONE,
) -> int:
    """Runs an experiment in a folder.

    Args:
      experiment: what to do.
      folder: of the run; new, or with ``resume`` that of the run to go on with.
      resume: go on from the newest intact checkpoint.
      console: where to show progress.
      load_model: gives the base model; a process with several runs can give the same one to all.
      trunks: of the runs before in this process (``prepare``).
      hosts: that share the sites; this one, the first, keeps the folder.

    Returns:
      0, or 130 if Ctrl-C ended it.

    Raises:
      HostGone: another host died.
      UserError: something that the user can put right.
    """
    if not hosts.first:
        return follow(experiment, hosts, console=console, load_model=load_model)
    tracking.check(experiment.output.tracking)
    set_up_process()
    clock = CompileClock()
    config = to_json(experiment)
    folder = directory.reopen(folder, config, MAY_CHANGE) if resume else directory.create(folder, config)
    shown = RunProgress(experiment.federation.rounds, console, budget=experiment.privacy.budget)
    with directory.locked(folder), shown as progress:
        record_environment(folder, resume)
        try:
            prepared = _prepared(experiment, progress, folder, resume, load_model, trunks, hosts)
            expected = expect(prepared) if hosts.count == 1 else None  # of the text, this host knows its own
            show_plan(prepared, expected, progress, console)
            with Trackers(experiment.output.tracking, config, folder, progress.say) as trackers:
                ended = None
                if prepared.plan is not None:
                    validate = validation_of(prepared, prepared.plan)
                    loop = Loop(folder, resume, clock, validate, prepared.fingerprint, trackers.round)
                    ended = run_rounds(prepared, prepared.plan, loop, progress)
                    prepared, ended = finetune(prepared, ended, progress)
                summary = _finish(prepared, ended, expected, folder, clock, progress)
                trackers.finish(summary)
                show_results(prepared, summary, folder, progress, console)
        except KeyboardInterrupt:
            progress.say(f"Stopped. {_kept(folder)}. Go on with: {_resume_command()}")
            return 130
        except HostGone as gone:
            raise HostGone(f"{gone}. {_kept(folder)} in {folder}; {AGAIN}") from gone
    return 0


def _prepared(
    experiment: Experiment,
    progress: RunProgress,
    folder: Path,
    resume: bool,
    load_model: Load,
    trunks: Trunks | None,
    hosts: Hosts,
) -> Prepared:
    """What :func:`prepare` gives; where it finds a fault, a new run's folder goes, so that the name stays free."""
    try:
        return prepare(experiment, progress, load_model, trunks, hosts)
    except UserError:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _finish(
    prepared: Prepared,
    ended: Ended | None,
    expected: Expectation | None,
    folder: Path,
    clock: CompileClock,
    progress: RunProgress,
) -> dict[str, Any]:
    """What :func:`finish` gives, and how the prediction did, where there was one."""
    began, compiled = time.perf_counter(), clock.seconds
    summary = finish(prepared, ended, folder, progress)
    seconds = time.perf_counter() - began - (clock.seconds - compiled)
    if expected is not None:
        summary["cost"] = learn(prepared, expected, summary, seconds)
        directory.write_json(folder / "summary.json", summary)
    return summary


def show_results(
    prepared: Prepared, summary: Mapping[str, Any], folder: Path, progress: RunProgress, console: Console
) -> None:
    """Prints the figures, and where everything is."""
    trained = prepared.plan is not None
    console.print(results_table(summary if trained else {"base": summary["base"]}))
    place = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    if summary["privacy"] is not None:
        console.print(privacy_table(summary["privacy"]))
    progress.say(f"Run folder: {place}   Report: {place / 'report.html'}")
    if prepared.experiment.output.encryption is not None:
        copied = [_interpreter(), "-m", "experiments.decrypt", str(place), "OUT"]
        progress.say(f"All of it is encrypted. A copy in clear, with the report: {shlex.join(copied)}")
    if (folder / "adapter").is_dir() and prepared.held_out.prompts:
        question = prepared.held_out.prompts[0].text
        progress.say("Ask it: " + shlex.join([_interpreter(), "-m", "experiments.ask", str(place), question]))


def record_environment(folder: Path, resume: bool) -> None:
    """Writes ``environment.json``; a resumed run adds to it. The seed is in ``config.json``."""
    path, now = folder / "environment.json", environment.describe()
    if resume and path.exists():
        before = directory.read_json(path)
        now = before | {"resumed": [*before.get("resumed", []), now]}
    directory.write_json(path, now)


def show_plan(prepared: Prepared, expected: Expectation | None, progress: RunProgress, console: Console) -> None:
    """Prints what is going to happen: time and memory, model, adapters, sites, rounds, bytes."""
    if expected is not None:
        progress.say(expected.prediction.told())
    experiment, base = prepared.experiment, prepared.base
    trainable, shown = low_rank.size(prepared.adapters), disclosed(prepared, ())
    rows: list[tuple[str, Any]] = [
        ("setting", experiment.setting),
        ("model", f"{base.name}, {base.size:,} parameters, {experiment.model.dtype}"),
        ("text", prepared.dataset.version),
    ]
    if prepared.plan is not None:
        plan = prepared.plan
        steps = f"{plan.local.local_epochs} epochs" if plan.local.local_epochs else f"{plan.local.local_steps} steps"
        rows += [
            ("adapters", f"rank {prepared.lora.rank} on {', '.join(prepared.lora.targets)}"),
            ("trainable parameters", f"{trainable:,} ({trainable / base.size:.3%})"),
            ("rounds", plan.federation.rounds),
            ("clients a round", f"{plan.cohort} of {len(plan.clients)}"),
            ("local training", f"{steps} of {plan.local.batch_size} examples, {plan.local.optimizer.name}"),
            ("microbatches", ", ".join(f"{shape.rows} x {shape.length} tokens" for shape in plan.shapes)),
        ]
        if shown is not None:
            rows += federation_rows(prepared, plan, shown["protocol"])
    console.print(settings_table(rows))
    if shown is not None:
        console.print(settings_table(shown["saw"], title="Who sees what"))
    console.print(sites_table(site_counts(prepared)))
    if prepared.plan is not None and prepared.plan.mechanism is not None and prepared.population is not None:
        with progress.phase("Accounting"):
            promise = promised(experiment, prepared.plan.mechanism, prepared.population)
        console.print(privacy_table(promise))
    for part, lengths in (("training", prepared.lengths), ("held-out", prepared.held_out.lengths)):
        for name, count in length_counts(lengths).items():
            if count:
                progress.say(f"{count:,} {part} examples are longer than {experiment.data.max_length} tokens: {name}.")


def federation_rows(prepared: Prepared, plan: RoundPlan, protocol: str | None) -> list[tuple[str, Any]]:
    """How updates are aggregated (securely, by a protocol), what becomes of them on the way, and their size."""
    experiment = prepared.experiment
    _, shared = low_rank.partition(prepared.adapters, plan.aggregation.personal)
    message = shared if plan.aggregation.client.report is None else template(plan, prepared.adapters)
    live = None if plan.aggregation.live is None else plan.aggregation.live(1)
    leaves = travelling(message, live)
    size = tree_bytes(leaves) if plan.codec is None else plan.codec.nbytes([leaf for _, leaf in leaves])
    rows: list[tuple[str, Any]] = [("aggregation", in_words(experiment.aggregation))]
    if protocol is not None:
        rows.append(("secure aggregation", protocol))
    if experiment.compression is not None:
        rows.append(("compression", in_words(experiment.compression)))
    if experiment.attack is not None:
        rows.append(("malicious", f"{sum(plan.malicious)} of {len(plan.clients)} sites: {in_words(experiment.attack)}"))
    if plan.ranks:
        rows.append(("ranks", ", ".join(map(str, plan.ranks[:12])) + (", ..." if len(plan.ranks) > 12 else "")))
    return [*rows, ("one update on the wire", byte_size(size))]


def _kept(folder: Path) -> str:
    """What there is of a run that has ended early."""
    done = finished_steps(folder / "checkpoints")
    return f"Everything up to round {done[-1]} is kept" if done else "No round was finished"


def _resume_command() -> str:
    """The command line that goes on with this run."""
    words = [word for word in sys.orig_argv[1:] if word != "--resume"]
    return shlex.join([_interpreter(), *words, "--resume"])


def _interpreter() -> str:
    """This Python as a command, relative where it lies below the current folder."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
