"""What all runs together released about a site's units, recomputed from the site's own ledger alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting, ledger, site_ledger
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.ledger import Header
from fedjax_llm.privacy.site_ledger import Charge, Terms
from fedjax_llm.runs import statement
from fedjax_llm.runs.recount import DELTAS, in_words


@dataclass(frozen=True)
class RunShare:
    """One run's part of what a site released.

    Attributes:
      terms: that the site joined it on; ``None``: it was charged for without any.
      rounds: that were charged.
      again: charges for rounds that had been charged before.
      events: that were released.
      epsilon: of this run alone.
    """

    terms: Terms | None
    rounds: int
    again: int
    events: tuple[Event, ...]
    epsilon: float


@dataclass(frozen=True)
class SiteRecount:
    """What :func:`recount_site` finds.

    Attributes:
      header: of the ledger.
      site: its name.
      delta: that was asked for.
      epsilon: of all runs together, at ``delta``.
      runs: by id, in the order in which the site joined them.
      table: (delta, epsilon of all runs together), by falling delta.
      torn: bytes of a half-written line at the end, which does not count.
    """

    header: Header
    site: str
    delta: float
    epsilon: float
    runs: Mapping[str, RunShare]
    table: tuple[tuple[float, float], ...]
    torn: int


def recount_site(path: Path, delta: float | None = None, deltas: Sequence[float] = DELTAS) -> SiteRecount:
    """Recomputes what a site has spent.

    Args:
      path: of the site's ledger.
      delta: to give epsilon at; ``None``: the ledger's.
      deltas: of the table.

    Raises:
      UserError: no ledger, a damaged one, or one of a run; a delta that is none.
    """
    contents = ledger.read(path)
    header = contents.header
    if header.mechanism != site_ledger.MECHANISM:
        raise UserError(f"{path} is the ledger of a run, not of a site; to recount it, name the folder that it is in")
    delta = header.delta if delta is None else delta
    accounting.check_probability("delta", delta)
    found = site_ledger.charges(contents)

    def epsilon(charges: Sequence[Charge], at: float) -> float:
        return accounting.guarantee(site_ledger.composed(charges), at, header.accountant, keep=False).epsilon

    def share(run: str) -> RunShare:
        charges = [charge for charge in found if charge.run == run]
        rounds = len({charge.round for charge in charges})
        events = site_ledger.composed(charges)
        return RunShare(agreed.get(run), rounds, len(charges) - rounds, events, epsilon(charges, delta))

    agreed = site_ledger.agreements(contents)
    names = dict.fromkeys([*agreed, *(charge.run for charge in found)])
    at = sorted({*deltas, header.delta, delta}, reverse=True)
    return SiteRecount(
        header=header,
        site=next(iter(header.accounts)),
        delta=delta,
        epsilon=epsilon(found, delta),
        runs={name: share(name) for name in names},
        table=tuple((value, epsilon(found, value)) for value in at),
        torn=contents.torn,
    )


def render(console: Console, found: SiteRecount) -> None:
    """Prints a recount: all runs together, each run alone, and epsilon at other deltas."""
    header = found.header
    opening = (
        f"By the ledger of site {found.site!r} alone: epsilon <= {statement.bound(found.epsilon)} at delta "
        f"{found.delta:g} for one {header.unit} ({header.adjacency}), over all of its {len(found.runs):,} runs."
    )
    console.print(Text(opening), soft_wrap=True)
    table = _table(f"Each run alone at delta {found.delta:g}", ("run", "epsilon", "rounds", "again", "mechanism"))
    table.add_column("released")
    for name, share in found.runs.items():
        events = "\n".join(map(in_words, share.events)) or "nothing"
        mechanism = "-" if share.terms is None else f"{share.terms.mechanism}, clip norm {share.terms.clip_norm:g}"
        figures = (statement.bound(share.epsilon), f"{share.rounds:,}", f"{share.again:,}", Text(mechanism))
        table.add_row(Text(name), *figures, Text(events))
    console.print(table)
    table = _table(f"All runs together at other deltas ({header.adjacency})", ("delta", "epsilon"))
    for delta, epsilon in found.table:
        table.add_row(f"{delta:g}", statement.bound(epsilon))
    console.print(table)
    for notice in _notices(found):
        console.print(Text(f"Notice: {notice}.", style="yellow"), soft_wrap=True)


def _notices(found: SiteRecount) -> list[str]:
    """What else a reader should know."""
    terms = {name: share.terms for name, share in found.runs.items() if share.terms is not None}
    notices = []
    if seeded := [name for name, kept in terms.items() if kept.randomness == "reproducible"]:
        notices.append(
            f"the noise of {', '.join(seeded)} comes from a seed (reproducible randomness): the epsilon holds only "
            "against those who do not know it"
        )
    if central := [name for name, kept in terms.items() if kept.noised == "sum"]:
        notices.append(
            f"in {', '.join(central)} noise is added to the sum of the sites' messages: the epsilon holds against "
            "those who see noised sums, and not against whoever adds up"
        )
    if found.torn:
        notices.append(
            f"the ledger ends in a half-written line ({found.torn} bytes), which does not count: it was not on the "
            "disk when the round would have been computed"
        )
    return notices


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table that is never narrower than its title."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.min_width = len(title)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
