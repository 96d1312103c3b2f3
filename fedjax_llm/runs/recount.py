"""A run's epsilon recomputed from its ledger alone, beside what the run itself claims."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting, ledger
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.ledger import Contents, Header
from fedjax_llm.privacy.participation import accounts
from fedjax_llm.runs import directory, metrics, statement

DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""What epsilon is tabled at, besides the ledger's own delta."""
_TOLERANCE = 1e-6  # relative: an accountant gives the same digits on every machine, but for the rounding of sums
_MOST_ACCOUNTS = 40
Spent = Mapping[str, tuple[Event, ...]]


@dataclass(frozen=True)
class Claim:
    """An epsilon that the run states, beside the ledger's at the same point and the same delta.

    Attributes:
      place: where it stands.
      unit: that it is for.
      delta: that it is at.
      claimed: account -> epsilon, with ``maximum``; infinity for an unbounded one.
      recounted: the same accounts by the ledger.
    """

    place: str
    unit: str
    delta: float
    claimed: Mapping[str, float]
    recounted: Mapping[str, float]

    def understated(self) -> dict[str, tuple[float, float]]:
        """Account -> (claimed, recounted), where the claim is smaller than what the ledger gives."""
        both = {name: (value, self.recounted.get(name, 0.0)) for name, value in self.claimed.items()}
        return {name: pair for name, pair in both.items() if pair[0] < pair[1] * (1 - _TOLERANCE)}


@dataclass(frozen=True)
class Recount:
    """What :func:`recount` finds.

    Attributes:
      header: of the ledger.
      rounds: that were charged.
      again: entries for rounds that had been charged before.
      delta: that was asked for.
      released: account -> events; with an account for every set of sites that share a unit.
      epsilon: account -> epsilon at ``delta``.
      table: (delta, the largest epsilon of any account), by falling delta.
      claims: of the run itself; empty where it made none yet.
      notices: what else is worth knowing.
    """

    header: Header
    rounds: int
    again: int
    delta: float
    released: Spent
    epsilon: Mapping[str, float]
    table: tuple[tuple[float, float], ...]
    claims: tuple[Claim, ...]
    notices: tuple[str, ...]

    @property
    def maximum(self) -> float:
        """The largest epsilon of any account."""
        return max(self.epsilon.values(), default=0.0)

    @property
    def sound(self) -> bool:
        """Whether the run claims nothing smaller, and nothing about another unit, than its ledger bears out."""
        return not any(claim.understated() or claim.unit != self.header.unit for claim in self.claims)


def recount(
    folder: Path, delta: float | None = None, deltas: Sequence[float] = DELTAS, config: str | None = None
) -> Recount:
    """Recomputes what a run has spent, finished or not.

    Args:
      folder: of the run.
      delta: to give epsilon at; ``None``: the ledger's.
      deltas: of the table.
      config: hash of the run's ``config.json``, as its ledger should have it; ``None``: not compared.

    Raises:
      UserError: no ledger, or a damaged one; a delta that is none.
    """
    if delta is not None and not 0 < delta < 1:
        raise UserError(f"delta is {delta}; it must be above 0 and below 1, and far below 1 over the number of units")
    contents = ledger.read(_ledger_in(folder))
    header = contents.header

    @cache  # sites of equal sizes release the same; figures that runs left on the disk are not asked
    def epsilon(events: tuple[Event, ...], at: float) -> float:
        return accounting.guarantee(events, at, header.accountant, keep=False).epsilon

    def largest(at: float) -> float:
        return max(
            (accounting.epsilon(events, at, header.accountant) for events in set(released.values())), default=0.0
        )

    released = _by_account(header, ledger.charged(contents))
    delta = header.delta if delta is None else delta
    rounds = {entry.round for entry in contents.entries}
    return Recount(
        header=header,
        rounds=len(rounds),
        again=len(contents.entries) - len(rounds),
        delta=delta,
        released=released,
        epsilon={name: epsilon(events, delta) for name, events in released.items()},
        table=tuple((at, largest(at)) for at in sorted({*deltas, header.delta, delta}, reverse=True)),
        claims=tuple(_claims(folder, contents, epsilon)),
        notices=tuple(_notices(contents, config)),
    )


def _ledger_in(folder: Path) -> Path:
    """The ledger of a run; an error where there is no run, or none that is private."""
    if not (folder / directory.CONFIG).is_file():
        raise UserError(
            f"{folder} is not the folder of a run (it has no {directory.CONFIG}); experiments.run makes one"
        )
    path = folder / ledger.LEDGER
    private = directory.read_json(folder / directory.CONFIG).get("privacy") or {}
    if not path.exists() and private.get("mechanism") is None:
        raise UserError(
            f"{folder} has no {ledger.LEDGER}: it is a run without differential privacy, and nothing bounds what its "
            "model may reveal of the training text. Set privacy.mechanism for a private run"
        )
    return path


def _by_account(header: Header, spent: Spent) -> dict[str, tuple[Event, ...]]:
    """What is released about the units of each account; a unit of several sites bears the releases of all of them."""
    order = [*(name for name in header.accounts if name in spent), *(set(spent) - header.accounts.keys())]
    sites = accounts(order, header.shared)
    return {name: sum((spent.get(site, ()) for site in members), ()) for name, members in sites.items()}


def _claims(folder: Path, contents: Contents, epsilon: Callable[[tuple[Event, ...], float], float]) -> list[Claim]:
    """What the run states in ``metrics.jsonl`` after its last round, and in ``summary.json`` about all of it."""

    def claim(place: str, stated: Mapping[str, Any], largest: Any, parts: Mapping[str, Any], spent: Spent) -> Claim:
        found = {name: epsilon(events, stated["delta"]) for name, events in _by_account(contents.header, spent).items()}
        claimed = {name: math.inf if value is None else value for name, value in {**parts, "maximum": largest}.items()}
        recounted = {name: found.get(name, 0.0) for name in parts} | {"maximum": max(found.values(), default=0.0)}
        return Claim(place, stated["unit"], stated["delta"], claimed, recounted)

    claims = []
    lines = metrics.read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    private = [line for line in lines if line.get("epsilon")]
    if private:
        spent = [then for number, then in ledger.spent_by_round(contents) if number <= private[-1]["round"]]
        stated = private[-1]["epsilon"]
        place = f"metrics.jsonl, round {private[-1]['round']}"
        claims.append(claim(place, stated, stated["max"], stated["accounts"], spent[-1] if spent else {}))
    summary = directory.read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    if stated := summary.get("privacy"):
        parts = {name: figures["epsilon"] for name, figures in stated["accounts"].items()}
        claims.append(claim("summary.json", stated, stated["epsilon"], parts, ledger.charged(contents)))
    return claims


def _notices(contents: Contents, config: str | None) -> list[str]:
    """What else a reader of the recount should know."""
    header, notices = contents.header, []
    if contents.torn:
        notices.append(
            f"the ledger ends in a half-written line ({contents.torn} bytes), which does not count: it was not on the "
            "disk when noise would have been drawn"
        )
    if config is not None and config != header.config:
        notices.append("config.json is not the configuration that the ledger was begun with")
    if header.randomness == "reproducible":
        notices.append(
            "the noise comes from the experiment's seed (reproducible randomness): the epsilon holds only against "
            "those who do not know it; for real data take secret randomness"
        )
    return notices


def render(console: Console, found: Recount) -> None:
    """Prints a recount: what was released, epsilon by account and at most, at other deltas, and the run's claims."""
    header = found.header
    for line in _opening(found):
        console.print(Text(line), soft_wrap=True)
    console.print(_accounts_table(found))
    rest = len(found.epsilon) - _MOST_ACCOUNTS
    if rest > 0:
        console.print(Text(f"... and {rest:,} more, none of a larger epsilon", style="dim"))
    table = _table(f"Largest epsilon at other deltas ({header.adjacency})", "delta")
    table.add_column("epsilon", justify="right")
    for delta, epsilon in found.table:
        table.add_row(f"{delta:g}", statement.bound(epsilon))
    console.print(table)
    for notice in found.notices:
        console.print(Text(f"Notice: {notice}.", style="yellow"), soft_wrap=True)
    for verdict, bad in _verdicts(found):
        console.print(Text(verdict, style="bold red" if bad else "bold"), soft_wrap=True)


def _opening(found: Recount) -> list[str]:
    """What was counted."""
    header = found.header
    again = f", {found.again:,} of them again with fresh noise" if found.again else ""
    charged = f"{found.rounds + found.again:,} charged{again}"
    return [
        f"By the ledger alone: epsilon <= {statement.bound(found.maximum)} at delta {found.delta:g} for one "
        f"{header.unit} ({header.adjacency}), the largest of {len(found.epsilon):,} accounts.",
        f"mechanism {header.mechanism}; rounds {charged}; accountant {header.accountant.upper()}; randomness "
        f"{header.randomness}",
    ]


def _accounts_table(found: Recount) -> Table:
    """Epsilon and what it comes from, by account, the largest first."""
    title = f"Epsilon by account at delta {found.delta:g} ({found.header.adjacency})"
    table = _table(title, "account")
    for heading in ("epsilon", f"{found.header.unit}s", "released"):
        table.add_column(heading, justify="right" if heading != "released" else "left")
    for name, epsilon in sorted(found.epsilon.items(), key=lambda item: -item[1])[:_MOST_ACCOUNTS]:
        units = found.header.accounts.get(name)
        events = "\n".join(map(in_words, found.released[name])) or "nothing"
        table.add_row(Text(name), statement.bound(epsilon), "-" if units is None else f"{units:,}", Text(events))
    return table


def _verdicts(found: Recount) -> list[tuple[str, bool]]:
    """A sentence for every claim, and whether the ledger contradicts it."""
    verdicts = []
    for claim in found.claims:
        place, at = f"The claim of {claim.place}", f"at delta {claim.delta:g}, {found.header.adjacency}"
        if claim.unit != found.header.unit:
            verdicts.append((f"{place} is for one {claim.unit}, but the ledger is for one {found.header.unit}.", True))
        for name, (claimed, recounted) in claim.understated().items():
            less = f"{_exact(claimed)} for {name} ({at}), but the ledger gives {_exact(recounted)}"
            verdicts.append((f"{place} is too small: epsilon {less}.", True))
        if not claim.understated() and claim.unit == found.header.unit:
            claimed, recounted = claim.claimed["maximum"], claim.recounted["maximum"]
            same = math.isclose(claimed, recounted, rel_tol=_TOLERANCE) or claimed == recounted
            than = "agrees with" if same else f"is larger than, so within, the {_exact(recounted)} of"
            verdicts.append((f"{place}, epsilon {_exact(claimed)} ({at}), {than} the ledger.", False))
    return verdicts or [("The run itself has claimed no epsilon yet.", False)]


def in_words(event: Event) -> str:
    """What an event is, such as ``400 Gaussian releases, noise multiplier 1.1, of Poisson samples (q = 0.05)``."""
    many = f"{event.count:,} {{}}{'' if event.count == 1 else 's'}, noise multiplier {event.noise_multiplier:.5g}"
    sampled = f", of Poisson samples (q = {event.sampling_probability:.4g})"
    if event.kind == "matrix":
        return many.format("step") + ", correlated over the whole run: one Gaussian release in all"
    if event.kind == "banded":
        return many.format("step") + f", correlated over {event.bands} bands" + sampled.replace(" of", " of cyclic", 1)
    kind = {"gaussian": "Gaussian", "discrete gaussian": "distributed discrete Gaussian", "skellam": "Skellam"}[
        event.kind
    ]
    shares = f" in {event.summands} shares" if event.summands else ""
    return (
        many.format(f"{kind} release") + shares + (sampled if event.sampling_probability < 1 else ", without sampling")
    )


def _exact(epsilon: float) -> str:
    """An epsilon with enough digits to tell two that differ."""
    return f"{epsilon:,.6g}" if math.isfinite(epsilon) else "unbounded"


def _table(title: str, first: str) -> Table:
    """A table that is never narrower than its title."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.min_width = len(title)
    table.add_column(first, overflow="fold")
    return table
