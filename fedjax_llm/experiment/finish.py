"""After the rounds: evaluation of base and tuned, the adapter in PEFT's format, the summary, the report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm import peft
from fedjax_llm.data.chat import LengthReport
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation import evaluate, generation
from fedjax_llm.experiment.disclosed import disclosed
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.experiment.training_loop import TIMING, Ended, Validate
from fedjax_llm.federation import effective
from fedjax_llm.federation.communication import totals
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.privacy import guarantee, ledger, statement
from fedjax_llm.runs import directory, encryption, environment, metrics
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.runs.summary import macro_paired_difference, paired_difference, summarise_evaluation
from fedjax_llm.types import Adapters, PyTree, RoundState

Phase = AbstractContextManager[Callable[[int], None]]


def validation_of(prepared: Prepared, plan: RoundPlan) -> Validate | None:
    """How adapters are measured on validation records between rounds; ``None`` where there is no validation."""
    held_out = prepared.held_out
    if not prepared.experiment.evaluation.validation_every:
        return None

    def validate(state: RoundState) -> dict[str, Any]:
        by_site = adapters_of(plan, held_out.validation, state)
        parts = (tuned_base(prepared, state), prepared.lora.scaling, by_site, held_out, plan.trunk)
        return evaluate.validate(*parts, prepared.joined)

    return validate


def tuned_base(prepared: Prepared, state: RoundState) -> BaseModel:
    """The base model with what the algorithm has moved into its weights."""
    if prepared.plan is None:
        return prepared.base
    return replace(prepared.base, params=effective.params(prepared.plan, prepared.base.params, state.server_state))


def personal(plan: RoundPlan) -> bool:
    """Whether each site ends with adapters of its own."""
    return plan.setting == "local" or plan.aggregation.personal is not None or plan.aggregation.own is not None


def adapters_of(plan: RoundPlan, sites: Iterable[str], state: RoundState) -> dict[str, Adapters]:
    """The whole adapters that each site uses: all the same, or each its own."""
    if not personal(plan):
        return dict.fromkeys(sites, low_rank.join(state.adapters, plan.frozen))
    slots = {client.name: slot for slot, client in enumerate(plan.clients)}

    def own(site: str) -> Adapters:
        def of_site(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: leaf[slots[site]], tree)

        if "own" in state.client_state:
            return low_rank.join(of_site(state.client_state["own"]), plan.frozen)
        shared = of_site(state.adapters) if plan.setting == "local" else state.adapters
        return low_rank.join(low_rank.join(shared, of_site(state.client_state.get("personal", {}))), plan.frozen)

    return {site: own(site) for site in sites}


def finish(prepared: Prepared, ended: Ended | None, folder: Path, progress: RunProgress) -> dict[str, Any]:
    """Evaluates, and writes what a run leaves behind.

    Args:
      prepared: the run.
      ended: how the rounds ended; ``None`` in the setting base.
      folder: of the run.
      progress: shows the phases.

    Returns:
      What ``summary.json`` holds.
    """
    state = None if ended is None else ended.state
    evaluation = _evaluation(prepared, state, progress)
    directory.write_json(folder / "evaluation.json", evaluation)
    if state is not None:
        export(prepared, state, folder)
    summary = summarise(prepared, evaluation, folder, None if ended is None else ended.stopped)
    directory.write_json(folder / "summary.json", summary)
    with progress.phase("Writing the report"):
        from fedjax_llm.runs.report import write_report  # matplotlib: a second that the first round need not wait for

        write_report(folder)
    return summary


def follow(prepared: Prepared, ended: Ended | None, progress: RunProgress) -> None:
    """The part of a host other than the first in :func:`finish`: its own sites' evaluation."""
    _evaluation(prepared, None if ended is None else ended.state, progress)


def _evaluation(prepared: Prepared, state: RoundState | None, progress: RunProgress) -> dict[str, Any]:
    """``evaluation.json``: base and tuned model on the same records, questions and prompts.

    Of several hosts, each must call it.
    """
    base, scaling, held_out = prepared.base, prepared.lora.scaling, prepared.held_out
    # Adapters that change nothing are exactly the base model, and need no programs of their own to be compiled.
    nothing = low_rank.silent(low_rank.join(prepared.adapters, prepared.frozen), base.params)
    models = {"base": (base, dict.fromkeys(held_out.test, nothing))}
    if state is not None and prepared.plan is not None:
        models["final"] = (tuned_base(prepared, state), adapters_of(prepared.plan, held_out.test, state))
    trunk = None if prepared.plan is None else prepared.plan.trunk
    found: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for name, (model, adapters) in models.items():
        parts = (model, scaling, adapters, held_out)
        label = {"base": "base model", "final": "tuned model"}[name]

        def phase(title: str, total: int | None = None, label: str = label) -> Phase:
            return progress.phase(f"{title}, {label}", total)

        found[name] = evaluate.evaluate_sites(*parts, phase, trunk, prepared.joined)
        _check_finite(found[name], label)
        if held_out.prompts:
            longest = prepared.experiment.evaluation.max_new_tokens
            with phase("Greedy answers"):
                answers[name] = generation.answers(model, scaling, adapters, held_out.prompts, max_new_tokens=longest)
    found.setdefault("final", found["base"])  # nothing was trained: the result is the base model
    before = answers.get("base", [])
    found["generations"] = generation.side_by_side(held_out.prompts, before, answers.get("final", before))
    return found


def _check_finite(evaluation: Mapping[str, Any], label: str) -> None:
    """Refuses figures that are no numbers: no file of a run could hold them."""
    broken = [site for site, figures in evaluation["sites"].items() if not np.isfinite(figures["nll"]).all()]
    if broken:
        advice = (
            "its weights or model.dtype do not serve"
            if label == "base model"
            else "training has blown up: start again with a lower training.optimizer.learning_rate"
        )
        raise UserError(f"the {label}'s held-out loss is not finite at {', '.join(broken)}; {advice}")


def export(prepared: Prepared, state: RoundState, folder: Path) -> None:
    """Writes ``adapter/`` in PEFT's format; where sites have their own, ``adapters/<site>/`` for every site."""
    assert prepared.plan is not None
    if not personal(prepared.plan):
        whole = low_rank.join(state.adapters, prepared.frozen)
        _write(prepared, state, folder / "adapter", whole)
        return
    names = [client.name for client in prepared.plan.clients]
    for name, own in adapters_of(prepared.plan, names, state).items():
        _write(prepared, state, folder / "adapters" / name, own)


def _write(prepared: Prepared, state: RoundState, folder: Path, adapters: Adapters) -> None:
    """Writes adapters for the untouched base model: what was moved into its weights goes into the factors."""
    assert prepared.plan is not None
    lora, moved = prepared.lora, effective.moved(prepared.plan, state.server_state)
    whole = low_rank.whole(adapters)
    if moved:
        products = low_rank.products(whole)
        change = {path: lora.scaling * product + moved.get(path, 0.0) for path, product in products.items()}
        lora, whole = low_rank.factored(change, lora)
    peft.write_adapter(folder, whole, lora, prepared.base.name, prepared.base.model, encryption.seal)


def summarise(
    prepared: Prepared, evaluation: Mapping[str, Any], folder: Path, stopped: str | None = None
) -> dict[str, Any]:
    """``summary.json``. What is not in ``TIMING`` is a function of the configuration, bit for bit."""
    experiment = prepared.experiment
    seed, resamples = experiment.seed, experiment.evaluation.bootstrap_resamples
    trainable = low_rank.size(prepared.adapters) if prepared.plan is not None else 0
    lines = _lines(prepared, folder)
    figures = {name: summarise_evaluation(evaluation[name], seed, resamples) for name in ("base", "final")}
    pair = (evaluation["base"], evaluation["final"], seed, resamples)
    return {
        "setting": experiment.setting,
        "rounds": experiment.federation.rounds if prepared.plan is not None else 0,
        "sites": site_counts(prepared),
        "parameters": prepared.base.size,
        "trainable_parameters": trainable,
        "trainable_fraction": trainable / prepared.base.size,
        "lengths": {"train": length_counts(prepared.lengths), "test": length_counts(prepared.held_out.lengths)},
        **_training(prepared, lines),
        **figures,
        "difference": {"macro": macro_paired_difference(*pair), "sites": paired_difference(*pair)},
        "data": {"version": prepared.dataset.version, "citation": prepared.dataset.citation},
        "model": {"name": prepared.base.name, "fingerprint": prepared.base.fingerprint},
        "privacy": privacy_of(prepared, folder, stopped),
        "secure": disclosed(prepared, lines),
        "seed": experiment.seed,
    }


def privacy_of(prepared: Prepared, folder: Path, stopped: str | None) -> dict[str, Any] | None:
    """What the run may say about its privacy, from its ledger; ``None`` without differential privacy."""
    experiment, plan = prepared.experiment, prepared.plan
    if plan is None or plan.mechanism is None or prepared.population is None:
        return None
    privacy, evaluation = experiment.privacy, experiment.evaluation
    charged = ledger.charged(ledger.read(folder / ledger.LEDGER))
    limits = statement.not_covered(
        held_out=bool(prepared.held_out.test or evaluation.validation_every),
        selects_best=experiment.output.select == "best",
    )
    shared = prepared.population.shared
    epsilons = guarantee.spent(plan.mechanism, charged, privacy.delta, privacy.accountant, shared)
    parts = (privacy, plan.mechanism, prepared.population, charged, epsilons, limits, stopped)
    return statement.statement(*parts)


def _lines(prepared: Prepared, folder: Path) -> list[dict[str, Any]]:
    """The rounds' metrics."""
    log = folder / "metrics.jsonl"
    return metrics.read(log) if prepared.plan is not None and log.exists() else []


def _training(prepared: Prepared, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the rounds, from their metrics; a resumed run counts all its parts."""
    seconds, compiling = (sum(line["timing"][name] for line in lines) for name in ("seconds", "compile_seconds"))
    tokens = sum(line["tokens"] for line in lines)
    model = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(prepared.base.params))
    each = [[site["download_bytes"] + site["upload_bytes"] for site in line["sites"].values()] for line in lines]
    exchanged = totals(
        download=sum(line["download_bytes"] for line in lines),
        upload=sum(line["upload_bytes"] for line in lines),
        longest=sum(max(sizes, default=0) for sizes in each),
        full_model=model if prepared.experiment.setting == "federated" else 0,
        client_rounds=sum(len(line["cohort"]) for line in lines),
        rounds=len(lines),
        bandwidth_mbps=prepared.experiment.output.bandwidth_mbps,
    )
    return {
        "rounds_done": len(lines),
        "tokens_trained": tokens,
        "padded_tokens": sum(line["padded_tokens"] for line in lines),
        "train_seconds": seconds,
        "tokens_per_second": tokens / (seconds - compiling) if seconds > compiling else 0.0,
        "compile_seconds": compiling,
        "peak_rss_bytes": max([environment.peak_rss_bytes(), *(line["timing"]["peak_rss_bytes"] for line in lines)]),
        "excluded_updates": sum(len(line["excluded"]) for line in lines),
        **exchanged,
    }


def site_counts(prepared: Prepared) -> dict[str, dict[str, int]]:
    """Records by split, and training examples, of every site."""
    examples = {name: len(found) for name, found in prepared.train}
    return {
        site.name: {
            "train_records": len(site.train),
            "train_examples": examples[site.name],
            "held_out_records": len(site.validation) + len(site.test),
        }
        for site in prepared.sites
    }


def length_counts(lengths: Mapping[str, LengthReport]) -> dict[str, int]:
    """Examples of all sites that were longer than ``data.max_length``, by what became of them."""
    return {name: sum(getattr(report, name) for report in lengths.values()) for name in ("truncated", "dropped")}


def without_timing(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a summary that does not depend on how fast the machine was."""
    return {key: value for key, value in summary.items() if key not in TIMING}
