"""All rounds of a run, with metrics, checkpoints and a display; it can be killed at any instant and resumed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.charging import BudgetSpent, Charge, charge, open_account
from fedjax_llm.experiment.compilation import CompileClock
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.federation.plan import RoundPlan, RoundReport
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.runs import environment
from fedjax_llm.runs.checkpoints import Checkpoints
from fedjax_llm.runs.metrics import MetricsLog
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.runs.tensorboard import Scalars
from fedjax_llm.types import RoundState

TIMING = ("train_seconds", "tokens_per_second", "compile_seconds", "peak_rss_bytes", "cost")
"""The keys of ``summary.json`` that depend on the machine and the moment."""
Validate = Callable[[RoundState], dict[str, Any]]
"""State -> ``{"nll", "sites"}`` on validation records."""


@dataclass(frozen=True)
class Loop:
    """Where a run's rounds are kept.

    Attributes:
      folder: of the run.
      resume: whether to go on from its newest checkpoint.
      clock: of compilations.
      validate: measures the adapters on validation records, or ``None``.
      fingerprint: of the model and the text; a checkpoint of others is refused.
      track: is told every round's line of metrics; it returns at once.
    """

    folder: Path
    resume: bool
    clock: CompileClock
    validate: Validate | None
    fingerprint: str
    track: Callable[[Mapping[str, Any]], None] = lambda _: None


class Ended(NamedTuple):
    """How the rounds ended: the resulting state, and why before the last round, if so."""

    state: RoundState
    stopped: str | None


def run_rounds(prepared: Prepared, plan: RoundPlan, loop: Loop, progress: RunProgress) -> Ended:
    """Runs what is left of the rounds, as far as the privacy budget goes.

    Returns:
      The last state; or, where the experiment selects the best, that of the lowest validation loss.

    Raises:
      KeyboardInterrupt: Ctrl-C; the save in progress has been waited for.
      UserError: no client came back finite, or the disk is full; the last good checkpoint stays.
    """
    output, stopped, hosts = prepared.experiment.output, None, prepared.hosts
    state = initial_state(plan, prepared.adapters)
    with Checkpoints(loop.folder / "checkpoints", output.keep_last, output.keep_best, progress.say) as checkpoints:
        state, known = _restored(checkpoints, state, loop, progress)
        state = hosts.tree_from_first(state)
        account = open_account(prepared, loop.folder, known, loop.fingerprint)
        done = int(state.round)
        log = MetricsLog(loop.folder / "metrics.jsonl")
        log.truncate_after(done)
        with Scalars(loop.folder / "tensorboard", done + 1 if loop.resume else None, progress.say) as scalars:
            while done < plan.federation.rounds:
                try:
                    charged = None if account is None else charge(account, plan, state)
                except BudgetSpent as spent:
                    stopped = str(spent)
                    progress.say(f"The privacy budget ends the run: {stopped}.")
                    break
                hosts.from_first({"attempt": 0 if charged is None else charged.attempt})
                state, line = _one_round(prepared, plan, state, loop, charged)
                log.append(line)  # before the checkpoint: a resumed run drops it or has it
                validation = line["validation"]
                extra = {"fingerprint": loop.fingerprint, "ledger": None if account is None else account.head}
                scalars.round(line)
                loop.track(line)
                checkpoints.save(line["round"], state, extra, validation["nll"] if validation else None)
                progress.round(line)
                done = line["round"]
        hosts.from_first(None)  # that was the last round
        if output.select == "best" and (best := checkpoints.restore_best(state)) is not None:
            step, state, _ = best
            progress.say(f"Taking the adapters of round {step}, which have the lowest validation loss.")
    return Ended(hosts.tree_from_first(state), stopped)


def follow_rounds(prepared: Prepared, plan: RoundPlan, validate: Validate | None, progress: RunProgress) -> Ended:
    """The same rounds on a host other than the first, which says when each begins and keeps what comes of them.

    A private round is in the ledger on the first host's disk before it says so.

    Raises:
      HostGone: another host died.
      UserError: no client came back finite.
    """
    hosts, rounds = prepared.hosts, plan.federation.rounds
    state = hosts.tree_from_first(initial_state(plan, prepared.adapters))
    while (begun := hosts.from_first(None)) is not None:
        state, report = run_round(plan, prepared.base.params, state, begun["attempt"], hosts)
        number = int(state.round)
        if validate is not None and _validates(prepared, plan, number):
            validate(state)
        hosts.remember(f"round {number} had been done, whose checkpoint, or that of the round before, is the newest")
        progress.say(f"round {number}/{rounds}  {len(report.clients)} clients, of all hosts")
    return Ended(hosts.tree_from_first(state), None)


def _restored(
    checkpoints: Checkpoints, fresh: RoundState, loop: Loop, progress: RunProgress
) -> tuple[RoundState, str | None]:
    """The newest intact state of a resumed run with the head of its ledger, else the fresh one."""
    if not loop.resume:
        return fresh, None
    found = checkpoints.restore_latest(fresh)
    if found is None:
        progress.say("There is no checkpoint yet: beginning with the first round.")
        return fresh, None
    step, state, extra = found
    if extra["fingerprint"] != loop.fingerprint:
        raise UserError(
            f"the model's weights or the text are not those that the run in {loop.folder} was started with; "
            "restore them, or start a new run in another folder"
        )
    progress.say(f"Going on after round {step}.")
    return state, extra["ledger"]


def _one_round(
    prepared: Prepared,
    plan: RoundPlan,
    state: RoundState,
    loop: Loop,
    charged: Charge | None,
) -> tuple[RoundState, dict[str, Any]]:
    """A round, its validation where one is due, and its line of metrics."""
    began, compiled = time.perf_counter(), loop.clock.seconds
    attempt = 0 if charged is None else charged.attempt
    state, report = run_round(plan, prepared.base.params, state, attempt, prepared.hosts)
    jax.block_until_ready(state.adapters)
    spent, compiling = time.perf_counter() - began, loop.clock.seconds - compiled
    number, validation = int(state.round), None
    if loop.validate is not None and _validates(prepared, plan, number):
        validation = loop.validate(state)
    timing = {
        "seconds": spent,
        "compile_seconds": compiling,
        "tokens_per_second": report.tokens / max(spent - compiling, 1e-9),
        "peak_rss_bytes": environment.peak_rss_bytes(),
    }
    epsilon = None if charged is None else charged.epsilon
    each = shows_clients(prepared.experiment)
    return state, metrics_line(number, report, validation, epsilon, each) | {"timing": timing}


def _validates(prepared: Prepared, plan: RoundPlan, number: int) -> bool:
    """Whether validation is due after a round."""
    every = prepared.experiment.evaluation.validation_every
    return bool(every) and (number % every == 0 or number == plan.federation.rounds)


def shows_clients(experiment: Experiment) -> bool:
    """Whether metrics hold the figures of every client."""
    chosen = experiment.output.client_metrics
    return experiment.secured is None if chosen is None else chosen


def metrics_line(
    number: int,
    report: RoundReport,
    validation: Mapping[str, Any] | None,
    epsilon: Mapping[str, Any] | None = None,
    each: bool = True,
) -> dict[str, Any]:
    """A round's line of ``metrics.jsonl``, without its timing.

    Args:
      number: of the round.
      report: of the round.
      validation: figures on validation records, where some were due.
      epsilon: what has been spent.
      each: whether the line holds every client's figures, and not only its bytes.
    """
    seen = [(c.loss, c.examples) for c in report.clients if c.included and c.loss is not None]
    losses, examples = zip(*seen, strict=True) if seen else ((), ())
    told = ("loss", "tokens", "examples", "update_norm") if each else ()
    sites = {
        client.name: {name: getattr(client, name) for name in (*told, "download_bytes", "upload_bytes")}
        | {name: value for name in ("rank", "staleness") if (value := getattr(client, name)) is not None}
        for client in report.clients
    }
    return (
        {
            "round": number,
            "loss": float(np.average(losses, weights=examples)) if seen else None,
            "cohort": [client.name for client in report.clients],
            "excluded": [client.name for client in report.clients if each and not client.included],
            "sites": sites,
            "tokens": report.tokens,
            "padded_tokens": report.padded_tokens,
            "download_bytes": sum(client.download_bytes for client in report.clients) + report.wasted.download,
            "upload_bytes": sum(client.upload_bytes for client in report.clients) + report.wasted.upload,
            "update_norm": report.update_norm,
            "clip_norm": report.clip_norm,
            "aggregation_error": report.aggregation_error,
            "validation": validation,
            "epsilon": epsilon,
        }
        | _availability(report)
        | ({} if report.secure is None else {"secure": asdict(report.secure)})
    )


def _availability(report: RoundReport) -> dict[str, Any]:
    """What a line says of clients that were selected in vain, and of time; nothing where all answer at once."""
    if report.elapsed is None:
        return {}
    return {
        "silent": list(report.silent),
        "late": list(report.late),
        "wasted_bytes": sum(report.wasted),
        "elapsed": report.elapsed,
    }
