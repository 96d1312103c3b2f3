"""A whole job at the server: an ordinary run folder, though no text is here and every round is trained elsewhere."""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_llm import __version__
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.deployment.desk import Desk, Rules
from fedjax_llm.deployment.job import job_hash, ready, with_sites
from fedjax_llm.deployment.messages import Transport
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.compilation import CompileClock
from fedjax_llm.experiment.finish import finish, validation_of
from fedjax_llm.experiment.memory import set_up_process
from fedjax_llm.experiment.prepare import Load, Prepared, prepare
from fedjax_llm.experiment.run import record_environment, show_plan, show_results
from fedjax_llm.experiment.training_loop import Loop, run_rounds
from fedjax_llm.federation.hosts import Hosts, packed, unpacked
from fedjax_llm.models.loading import load
from fedjax_llm.runs import directory
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.secure.simulation import Identities
from fedjax_llm.types import RoundState

JOINED = "joined.msgpack"
"""In the run folder: the run's id, its sites, and what all told each other in the preparation."""


def serve(
    job: Experiment,
    folder: Path,
    transport: Transport,
    rules: Rules | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
    load_model: Load = load,
    signing: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Runs a job over sites.

    Args:
      job: from ``job.load_job``.
      folder: of the run; with ``resume`` that of the run to go on with.
      transport: reaches the sites.
      rules: of waiting for them.
      resume: go on from the newest intact checkpoint.
      console: where to show progress.
      load_model: gives the base model.
      signing: public signing keys by site, where aggregation is secure.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UserError: something that can be put right; what is done is kept.
    """
    set_up_process()
    console = console or Console()
    base = load_model(job.model.name, job.model.dtype, job.model.quantise)
    with RunProgress(job.federation.rounds, console, budget=job.privacy.budget) as progress:
        desk = Desk(transport, rules or Rules(), uuid.uuid4().hex, progress)
        if resume:
            desk.run, desk.names, desk.log = _joined(folder)
        about = {"code": __version__, "settings": job_hash(job), "model": base.fingerprint}
        there = desk.greet(desk.names or job.data.source.names, about)
        desk.gone |= {name: "it has not joined" for name in desk.names if name not in there}
        desk.names = desk.names or tuple(sorted(there))
        experiment = with_sites(job, desk.names)
        config = to_json(experiment)
        folder = directory.reopen(folder, config, MAY_CHANGE) if resume else directory.create(folder, config)
        desk.keep_in(folder)
        with directory.locked(folder):
            record_environment(folder, resume)
            prepared = ready(prepare(experiment, progress, lambda *_: base, hosts=desk.preparing()))
            prepared = _signed(prepared, signing)
            sites = [desk.run, list(desk.names), desk.log]
            directory.write_bytes(folder / JOINED, packed(sites))
            desk.all_ready()
            return _run(prepared, desk, folder, resume, console, progress)


def simulate(
    job: Experiment, folder: Path, held: Mapping[str, Any], *, console: Console | None = None, load_model: Load = load
) -> dict[str, Any]:
    """The same job in one process that holds everybody's text, for comparison.

    With ``execution.clients_per_chunk=1`` it gives the bits of :func:`serve`, where sites have the same machine.

    Args:
      job: from ``job.load_job``.
      folder: of the run; new.
      held: the sites' sources by name.
      console: where to show progress.
      load_model: gives the base model.

    Returns:
      What ``summary.json`` holds.
    """
    set_up_process()
    console = console or Console()
    experiment = with_sites(job, tuple(held), held)
    folder = directory.create(folder, to_json(experiment))
    with directory.locked(folder), RunProgress(job.federation.rounds, console) as progress:
        record_environment(folder, False)
        prepared = ready(prepare(experiment, progress, load_model))
        return _run(prepared, None, folder, False, console, progress)


def _run(
    prepared: Prepared, desk: Desk | None, folder: Path, resume: bool, console: Console, progress: RunProgress
) -> dict[str, Any]:
    """The rounds and what comes after them; without a desk, here."""
    plan = prepared.plan
    assert plan is not None
    show_plan(prepared, None, progress, console)

    def validate(state: RoundState) -> Any:
        measured = prepared if desk is None else replace(prepared, hosts=desk.figures("validate", plan, state))
        measure = validation_of(measured, plan)
        return None if measure is None or measured.hosts == Hosts(clients=()) else measure(state)

    due = validate if prepared.experiment.evaluation.validation_every else None
    loop = Loop(folder, resume, CompileClock(), due, prepared.fingerprint)
    rounds = prepared if desk is None else replace(prepared, hosts=Hosts(train=desk.train))
    ended = run_rounds(rounds, plan, loop, progress)
    last = prepared if desk is None else replace(prepared, hosts=desk.figures("evaluate", plan, ended.state))
    summary = finish(last, ended, folder, progress)
    show_results(last, summary, folder, progress, console)
    return summary


def _signed(prepared: Prepared, signing: Mapping[str, bytes] | None) -> Prepared:
    """The run with the sites' own public signing keys, where aggregation is secure."""
    plan = prepared.plan
    if plan is None or plan.secure is None:
        return prepared
    if signing is None:
        raise UserError(
            "the job has secure aggregation: give the server the directory of the sites' public signing keys"
        )
    identities = Identities({}, dict(signing))
    return replace(prepared, plan=plan._replace(secure=plan.secure._replace(identities=identities)))


def _joined(folder: Path) -> tuple[str, tuple[str, ...], list[list[bytes]]]:
    """The id, the sites and the preparation of a run that goes on."""
    path = folder / JOINED
    if not path.exists():
        raise UserError(
            f"{folder} holds no run of a federation that can be resumed ({JOINED} is missing): start it anew"
        )
    run, names, log = unpacked(path.read_bytes())
    return run, tuple(names), log
