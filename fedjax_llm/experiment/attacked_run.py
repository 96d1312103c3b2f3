"""Attacks on the adapters of a finished run, whatever run it is; the figures stay beside it as ``leakage.json``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_llm import peft
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.errors import UserError, nearest
from fedjax_llm.experiment.ground import Attacks, ground_of, trunk_of
from fedjax_llm.experiment.leak_report import run_sections, run_table
from fedjax_llm.experiment.measures import Tuned, measure, shadow_statistics
from fedjax_llm.experiment.memory import set_up_process
from fedjax_llm.experiment.prepare import Load
from fedjax_llm.experiment.stored import experiment_of
from fedjax_llm.leakage.audit import CONTRADICTED
from fedjax_llm.models.causal_lm import lowest_adapted
from fedjax_llm.models.loading import BaseModel, load
from fedjax_llm.runs import directory, encryption, environment, leak_page
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.types import Adapters

LEAKAGE = "leakage.json"


def attack_run(
    run: Path,
    attacks: Attacks,
    console: Console,
    *,
    site: str | None = None,
    experiment: Experiment | None = None,
    load_model: Load = load,
) -> int:
    """Attacks a run's tuned model, prints the figures and writes ``leakage.json``, ``leakage.html`` and ``leakage.md``.

    Args:
      run: its folder.
      attacks: how hard.
      console: where to show progress.
      site: whose adapters to attack, where every site has its own.
      experiment: of the run; ``None``: as its folder holds it.
      load_model: gives the base model.

    Returns:
      0, or ``CONTRADICTED`` if an audit shows more than the run claims.

    Raises:
      UserError: there is no such run, it has no adapters, or is another experiment's.
    """
    set_up_process()
    experiment = _experiment(run, experiment)
    folder = adapter_folder(run, site)
    encryption.vault_of(run)
    claim = claim_of(run)
    with RunProgress(1, console) as progress:
        with progress.phase(f"Loading the model {experiment.model.name}"):
            base = load_model(experiment.model.name, experiment.model.dtype, experiment.model.quantise)
        lora, adapters = peft.read_adapter_for(folder, base.model, encryption.read)
        with progress.phase("Laying out the attacks"):
            ground = ground_of(experiment, attacks, base)
        tuned = Tuned(lora, adapters, trunk_of(ground, attacks, lowest_adapted(adapters)))
        shadows = shadow_statistics(ground, tuned, attacks, progress.phase) if attacks.shadows else None
        figures = measure(ground, tuned, attacks, progress.phase, shadows_of=shadows, claim=claim)
        found = keep(run, figures, attacks, claim, base, adapters, site)
        leak_page.write(run, f"What {run.name} gives away", *run_sections(found))
    for table in run_table(found):
        console.print(table)
    console.print(f"Figures: {run / LEAKAGE}   Report: {run / 'leakage.html'}", soft_wrap=True)
    return verdict(found, console)


def keep(
    run: Path,
    figures: Mapping[str, Any],
    attacks: Attacks,
    claim: Mapping[str, Any] | None,
    base: BaseModel,
    adapters: Adapters,
    site: str | None,
) -> dict[str, Any]:
    """Writes ``leakage.json``: figures, with all that they depend on."""
    found = {
        "run": run.name,
        "site": site,
        "attacks": asdict(attacks),
        "model": {"name": base.name, "fingerprint": base.fingerprint},
        "adapted_modules": len(adapters),
        "claim": claim,
        "environment": environment.describe(),
        **figures,
    }
    directory.write_json(run / LEAKAGE, found)
    return found


def verdict(found: Mapping[str, Any], console: Console) -> int:
    """Says loudly if an audit contradicts a claim; the exit status."""
    shown = found["audit"]
    if shown is None or not shown["contradicted"]:
        return 0
    console.print(
        f"AUDIT FAILED: the attacks show epsilon >= {shown['lower_bound']:.2f} (confidence {shown['confidence']:.0%}), "
        f"but the run claims at most {shown['claimed']:.2f} at delta {shown['delta']:g}. The claim is wrong: do not "
        "rely on it.",
        style="bold red",
        soft_wrap=True,
    )
    return CONTRADICTED


def adapter_folder(run: Path, site: str | None) -> Path:
    """Where the adapters are that shall be attacked.

    Raises:
      UserError: there are none, every site has its own and none is named, or the other way round.
    """
    own = sorted(path.name for path in (run / "adapters").iterdir()) if (run / "adapters").is_dir() else []
    if site is not None:
        if site not in own:
            why = f"no site {site!r}{nearest(site, own)}" if own else "one adapter for all sites; leave out --site"
            raise UserError(f"{run} has {why}")
        return run / "adapters" / site
    if own:
        raise UserError(f"in {run} every site has adapters of its own; name one by --site: {', '.join(own)}")
    if not (run / "adapter").is_dir():
        raise UserError(f"{run} has no adapter to attack: it is written when a run ends that trains any")
    return run / "adapter"


def claim_of(run: Path) -> dict[str, Any] | None:
    """What a run claims: the largest epsilon of its accounts, delta and unit; ``None`` without differential privacy.

    Raises:
      UserError: the run has not ended.
    """
    if not (run / "summary.json").is_file():
        raise UserError(f"{run} has no summary.json: the run has not ended; go on with it by --resume")
    privacy = directory.read_json(run / "summary.json")["privacy"]
    if privacy is None:
        return None
    return {"epsilon": float(privacy["epsilon"]), "delta": float(privacy["delta"]), "unit": privacy["unit"]}


def _experiment(run: Path, given: Experiment | None) -> Experiment:
    """The run's experiment: as its folder holds it, or the given one if it is the same."""
    if given is None:
        return experiment_of(run)
    if not (run / directory.CONFIG).is_file():
        raise UserError(f"{run} is not the folder of a run (it has no {directory.CONFIG})")
    stored, advice = directory.read_json(run / directory.CONFIG), "give the configuration that it was started with"
    directory.check_same(stored, to_json(given), f"the run in {run} was started with", advice, MAY_CHANGE)
    return given
