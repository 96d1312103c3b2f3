"""What a private run owes: each round is charged in the ledger before its noise is drawn, or it does not run."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fedjax_llm
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.federation.cohorts import cohort_of
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.privacy import guarantee, ledger
from fedjax_llm.privacy.events import Event, merge
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.ledger import Ledger
from fedjax_llm.privacy.mechanism import Mechanism, Population, adjacency, releases
from fedjax_llm.privacy.statement import at_most
from fedjax_llm.types import RoundState


@dataclass(frozen=True)
class Account:
    """The open ledger of a private run, and what its entries mean.

    Attributes:
      ledger: open for appending.
      experiment: with the privacy asked for.
      mechanism: what the rounds release.
      population: whom it protects.
      computation: a hash of what decides the bits of a round beside the state that it begins with.
    """

    ledger: Ledger
    experiment: Experiment
    mechanism: Mechanism
    population: Population
    computation: str

    @property
    def head(self) -> str:
        """The ledger's newest hash, for the checkpoint."""
        return ledger.head(self.ledger.contents)


@dataclass(frozen=True)
class Charge:
    """A round that was charged: which attempt it is, and what has been spent with it (``metrics.jsonl``)."""

    attempt: int
    epsilon: dict[str, Any]


class BudgetSpent(Exception):
    """A round would exceed the budget. The message says by how much; nothing was charged."""


def open_account(prepared: Prepared, folder: Path, known: str | None, fingerprint: str) -> Account | None:
    """Opens the run's ledger; ``None`` without differential privacy.

    Args:
      prepared: the run.
      folder: of the run.
      known: the head of the ledger in the checkpoint that the run goes on from.
      fingerprint: of the model and the text.

    Raises:
      UserError: the ledger is missing, damaged, shorter than the checkpoint, or of other settings.
    """
    plan, experiment = prepared.plan, prepared.experiment
    if plan is None or plan.mechanism is None or prepared.population is None:
        return None
    header = header_of(experiment, plan.mechanism, prepared.population)
    books = ledger.reopen(folder / ledger.LEDGER, header, known)
    return Account(books, experiment, plan.mechanism, prepared.population, _computation(experiment, fingerprint))


def header_of(experiment: Experiment, mechanism: Mechanism, population: Population) -> ledger.Header:
    """The first line of a run's ledger."""
    privacy = experiment.privacy
    return ledger.Header(
        unit=privacy.unit,
        adjacency=adjacency(privacy.unit),
        mechanism=mechanism.name + _correlation(mechanism),
        delta=privacy.delta,
        accountant=privacy.accountant,
        randomness=privacy.randomness,
        accounts=dict(zip(population.sites, population.units, strict=True)),
        shared=population.shared,
        config=ledger.config_hash(to_json(experiment), MAY_CHANGE),
    )


def _correlation(mechanism: Mechanism) -> str:
    """What pins correlated noise down for the whole run: all its rounds must be mixed by one matrix."""
    correlated = mechanism.correlated
    if correlated is None:
        return ""
    digest = hashlib.sha256(np.asarray(correlated.coefficients, np.float32).tobytes())
    digest.update(f"{correlated.steps} {correlated.sensitivity!r} {correlated.cyclic}".encode())
    return f" with correlated noise {digest.hexdigest()[:16]}"


def charge(account: Account, plan: RoundPlan, state: RoundState) -> Charge:
    """Charges the next round, on the disk, before any of its noise is drawn.

    Raises:
      BudgetSpent: it would exceed the budget; it must not run.
      UserError: the ledger cannot be written.
    """
    number = int(state.round) + 1
    cohort = [plan.clients[place].name for place in cohort_of(plan, number)]
    events = releases(account.mechanism, cohort)
    # The bits of a round depend on the state that it begins with; on a CPU, and with keys from the seed, on nothing
    # else that is not in the hash.
    computation = hashlib.sha256(f"{account.computation} {_digest(state)}".encode()).hexdigest()
    repeatable = account.experiment.privacy.randomness == "reproducible" and jax.default_backend() == "cpu"
    contents = account.ledger.contents
    repeated = repeatable and ledger.repeats(contents, number, computation, events)
    if account.mechanism.correlated is not None and not repeated and any(e.round >= number for e in contents.entries):
        raise UserError(
            f"round {number} was released before with correlated noise, and would now be released again with other "
            "noise (randomness is secret, or the layout, the versions or the processor have changed): the noise of all "
            "rounds is one release, which does not allow that. Resume as the run was started, or start a new run"
        )
    if repeated:  # as it was when this round was charged: later rounds, charged before the kill, will be repeated too
        after = dict(ledger.spent_by_round(contents))[number]
    else:
        after = _with(ledger.charged(contents), events)
    spent = spent_of(account, after)
    privacy = account.experiment.privacy
    if exceeds(privacy, spent["max"]):
        raise BudgetSpent(
            f"round {number} would bring it to {at_most(spent['max'])} at delta {spent['delta']:g} "
            f"({adjacency(account.mechanism.unit)}), above the budget of {privacy.budget:g}: it does not run"
        )
    attempt = ledger.append(account.ledger, number, computation, events, repeatable)
    return Charge(attempt, spent)


def exceeds(privacy: Privacy, epsilon: float) -> bool:
    """Whether an epsilon is above the budget, by more than what rounding may add to noise that was calibrated to it."""
    return privacy.budget is not None and epsilon > privacy.budget * (1 + 1e-9)


def spent_of(account: Account, charged: Mapping[str, tuple[Event, ...]]) -> dict[str, Any]:
    """The entry ``epsilon`` of a line of metrics."""
    privacy = account.experiment.privacy
    shared = account.population.shared
    accounts = guarantee.spent(account.mechanism, charged, privacy.delta, privacy.accountant, shared)
    return {"unit": privacy.unit, "delta": privacy.delta, "max": max(accounts.values()), "accounts": accounts}


def _with(charged: Mapping[str, tuple[Event, ...]], events: Mapping[str, Event]) -> dict[str, tuple[Event, ...]]:
    """What is charged with one more round."""
    return dict(charged) | {name: merge((*charged.get(name, ()), event)) for name, event in events.items()}


def _computation(experiment: Experiment, fingerprint: str) -> str:
    """A hash of what decides the bits of a round: configuration with its layout, data, code, settings, processor.

    What does not decide them, but is in it, costs a second charge at worst.
    """
    libraries = {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax", "flax", "jax_privacy")}
    matters = ("threefry", "prng", "random", "x64", "precision", "numpy", "jit")
    settings = {name: str(value) for name, value in jax.config.values.items() if any(word in name for word in matters)}
    machine = [jax.default_backend(), jax.device_count(), _processor(), os.environ.get("XLA_FLAGS", "")]
    facts = [to_json(experiment), fingerprint, libraries, settings, machine]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for source in sorted(Path(fedjax_llm.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _processor() -> list[Any]:
    """The model and the instructions of the processor, as far as the system tells, and how many cores are ours."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [platform.machine(), platform.processor(), told, cores]


def _digest(state: RoundState) -> str:
    """A hash of a state's bits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
