"""An audit of a run's differential privacy: its rounds with canaries among the data, and what they show of epsilon.

The rounds are the experiment's own, with its mechanism as it was calibrated: a canary is one more unit, and the claim
holds for every unit. Half of the canaries are in, each by a coin of its own; the auditor sees what the guarantee lets
everyone see, the sums that the server's algorithm is given, and knows every canary's gradient.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from fedjax_llm import lora as low_rank
from fedjax_llm.config import Experiment, to_json
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import audit_report
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.prepare import Load, Prepared, prepare
from fedjax_llm.federation.cohorts import cohort_of
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.leakage import audit as audits
from fedjax_llm.leakage.audit import CONTRADICTED, Bound
from fedjax_llm.leakage.gradient_canaries import evidence, projections, with_canaries, with_canary_clients
from fedjax_llm.models.loading import load
from fedjax_llm.privacy import guarantee
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Mechanism, releases
from fedjax_llm.runs import directory
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.types import PyTree

_RESULT = "audit.json"


@dataclass(frozen=True)
class Audit:
    """An audit of an experiment.

    Attributes:
      experiment: with differential privacy, for the unit that the canaries are.
      kind: ``gradient``: canaries are records with gradients in directions of their own; ``client``: sites with
        updates in such directions.
      canaries: how many, in and out.
      significance: probability with which a lower bound may be above the true epsilon.
      seed: of the coins that decide which canaries are in.
      noise_factor: what all noise is multiplied by behind the accountant's back. Anything but 1 is sabotage, which an
        audit shall find.
    """

    experiment: Experiment
    kind: Literal["gradient", "client"] = "gradient"
    canaries: int = 1000
    significance: float = 0.05
    seed: int = 0
    noise_factor: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what cannot be audited."""
        unit = self.experiment.privacy.unit
        if self.kind not in ("gradient", "client"):
            raise UserError(f"kind is {self.kind!r}; it must be 'gradient' or 'client'")
        if self.experiment.privacy.mechanism is None:
            raise UserError("experiment.privacy.mechanism is None: there is no claim to audit; choose a mechanism")
        if (unit == "site") is not (self.kind == "client"):
            raise UserError(
                f"kind is {self.kind!r}, but privacy.unit is {unit!r}: what is audited is the presence of one unit. "
                f"Set kind to {'client' if unit == 'site' else 'gradient'!r}"
            )
        if self.canaries < 2:
            raise UserError(f"canaries is {self.canaries}; an audit needs hundreds to show anything")
        if not 0 < self.significance < 0.5:
            raise UserError(f"significance is {self.significance}; it must be between 0 and 0.5")
        if not 0 <= self.noise_factor < np.inf:
            raise UserError(f"noise_factor is {self.noise_factor}; it must be finite and not negative")


class Released(NamedTuple):
    """What an auditor sees of T rounds.

    Attributes:
      sums: that the server's algorithm was given, leaves [T, ...].
      clip_norms: f64 [T].
      claim: the epsilon that the accountant states for these rounds.
    """

    sums: PyTree
    clip_norms: np.ndarray
    claim: float


def run_audit(audit: Audit, folder: Path, console: Console, load_model: Load = load) -> int:
    """Audits an experiment, and writes ``audit.json``, ``audit.md`` and ``audit.svg`` into a folder.

    Args:
      audit: what to do.
      folder: for the results; one that holds those of the same audit tells them again.
      console: where to show progress.
      load_model: gives the base model.

    Returns:
      0; or 3 where a lower bound contradicts the claim.

    Raises:
      UserError: something that the user can put right.
    """
    experiment, config = audit.experiment, to_json(audit)
    if (folder / directory.CONFIG).exists():
        folder = directory.reopen(folder, config)
        if (folder / _RESULT).exists():
            return _tell(directory.read_json(folder / _RESULT), folder, console)
    else:
        folder = directory.create(folder, config)
    use_compilation_cache()
    coins = np.random.default_rng([audit.seed, 4]).random(audit.canaries) < 0.5
    with RunProgress(experiment.federation.rounds, console) as progress:
        prepared = prepare(experiment, progress, load_model)
        plan = audited_plan(audit, prepared, coins)
        released = _rounds(audit, plan, prepared, progress)
        with progress.phase("Scoring the canaries"):
            bounds, scores = judge(audit, plan, released, coins)
    found = _found(audit, low_rank.size(prepared.adapters), released.claim, bounds, coins, scores)
    directory.write_text(folder / "audit.md", audit_report.table(found))
    directory.write_text(folder / "audit.svg", audit_report.picture(found))
    directory.write_json(folder / _RESULT, found)
    return _tell(found, folder, console)


def _found(
    audit: Audit, values: int, claim: float, bounds: list[Bound], coins: np.ndarray, scores: np.ndarray
) -> dict[str, Any]:
    """The content of ``audit.json``."""
    experiment, inside, outside = audit.experiment, int(coins.sum()), int((~coins).sum())
    delta = experiment.privacy.delta
    return {name: getattr(audit, name) for name in ("kind", "canaries", "significance", "seed", "noise_factor")} | {
        "unit": experiment.privacy.unit,
        "mechanism": type(experiment.privacy.mechanism).__name__,
        "rounds": experiment.federation.rounds,
        "trained_values": values,
        "delta": delta,
        "claim": claim,
        "most_shown": audits.most_shown(inside, outside, significance=audit.significance, delta=delta),
        "contradicted": any(audits.beats(bound, claim) for bound in bounds),
        "bounds": [asdict(bound) for bound in bounds],
        "scores": {"in": scores[coins].tolist(), "out": scores[~coins].tolist()},
    }


def _tell(found: Mapping[str, Any], folder: Path, console: Console) -> int:
    """Prints the outcome, and an alarm where the claim is contradicted; the exit status."""
    plain = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(audit_report.table(found), **plain)
    console.print(f"Audit: {folder}", **plain)
    if found["contradicted"]:
        console.print(audit_report.alarm(found), style="bold red", **plain)
    return CONTRADICTED if found["contradicted"] else 0


def audited_plan(audit: Audit, prepared: Prepared, coins: np.ndarray) -> RoundPlan:
    """The experiment's rounds with those canaries that are in.

    Args:
      audit: what to do.
      prepared: the experiment.
      coins: bool [canaries], which are in.

    Raises:
      UserError: the experiment is of a kind that cannot be audited.
    """
    plan, numbers = prepared.plan, [int(number) for number in np.flatnonzero(coins)]
    if plan is None:
        raise UserError("experiment.setting is 'base', which trains nothing: there is nothing to audit")
    planted = with_canaries if audit.kind == "gradient" else with_canary_clients
    assert plan.secret_key is not None, "a plan with a mechanism has a secret key"
    # Noise of its own: the same as in the experiment's real run could be subtracted from what that has released.
    return planted(
        plan._replace(secret_key=jax.random.fold_in(plan.secret_key, audit.seed)), prepared.adapters, numbers
    )


def _rounds(audit: Audit, plan: RoundPlan, prepared: Prepared, progress: RunProgress) -> Released:
    """Runs all rounds; what they charge, and what they release."""
    mechanism, privacy = plan.mechanism, audit.experiment.privacy
    assert mechanism is not None
    assert prepared.population is not None
    played, charged = sabotaged(plan, audit.noise_factor), {}
    state, sums, norms = initial_state(plan, prepared.adapters), [], []
    for number in range(1, plan.federation.rounds + 1):
        _charge(charged, mechanism, [plan.clients[place].name for place in cohort_of(plan, number)])
        state, report = run_round(played, prepared.base.params, state)
        sums.append(jax.tree.map(np.asarray, state.server_state[1]))
        norms.append(float(mechanism.clip.norm if report.clip_norm is None else report.clip_norm))
        progress.say(f"Round {number} of {plan.federation.rounds}: {report.tokens:,} tokens.")
    shared = prepared.population.shared
    spent = guarantee.spent(mechanism, charged, privacy.delta, privacy.accountant, shared)
    return Released(jax.tree.map(lambda *own: jnp.stack(own), *sums), np.array(norms), max(spent.values()))


def sabotaged(plan: RoundPlan, noise_factor: float) -> RoundPlan:
    """The rounds with all noise multiplied by a factor, of which the accountant knows nothing."""
    mechanism = plan.mechanism
    assert mechanism is not None
    return plan._replace(mechanism=mechanism._replace(stddev=mechanism.stddev * noise_factor))


def _charge(charged: dict[str, list[Event]], mechanism: Mechanism, cohort: list[str]) -> None:
    """Adds what a round of this cohort releases, by account."""
    for name, event in releases(mechanism, cohort).items():
        charged.setdefault(name, []).append(event)


def judge(audit: Audit, plan: RoundPlan, released: Released, coins: np.ndarray) -> tuple[list[Bound], np.ndarray]:
    """What the rounds show of epsilon, and the canaries' scores [k].

    Args:
      audit: what to do.
      plan: as the accountant believes it to be.
      released: by the rounds.
      coins: bool [k], which canaries are in.
    """
    mechanism, delta = plan.mechanism, audit.experiment.privacy.delta
    assert mechanism is not None
    moved = projections(released.sums, audit.canaries) / released.clip_norms[:, None]
    scores = moved.sum(axis=0)
    if mechanism.noised == "sum" and mechanism.correlated is None:
        probability = np.full(audit.canaries, mechanism.cohort_probability or 1.0)
        if mechanism.sampling is not None:
            probability = mechanism.sampling[np.arange(audit.canaries) % len(plan.clients)]
        deviation = np.full(len(moved), mechanism.stddev[0])
        scores = evidence(moved, probability, deviation)
    sides = (scores[coins], scores[~coins])
    limits = {"significance": audit.significance, "delta": delta}
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0, keepdims=True), released.sums)
    cosines = projections(total, audit.canaries)[0] / float(optax.tree.norm(total))
    dimension = sum(leaf[0].size for leaf in jax.tree.leaves(total))
    return [audits.one_run(*sides, **limits), audits.canary_clients(cosines[coins], dimension, delta=delta)], scores
