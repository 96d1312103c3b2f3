"""A site's own privacy budget: it is charged before anything is computed from records, whatever the server says.

One ledger at the site holds what all runs released about its units. A round is charged there, on the disk, or it does
not run. The server cannot raise the limit, change a run's noise on the way, or have a round twice for the price of one.
"""

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting, ledger, site_ledger
from fedjax_llm.privacy.accounting import Accountant
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.gaussian_releases import checked
from fedjax_llm.privacy.mechanism import adjacency
from fedjax_llm.privacy.site_ledger import CORRELATED, Charge, Terms
from fedjax_llm.privacy.statement import at_most
from fedjax_llm.types import Unit

_ROUNDING = 1e-9  # relative: what the accountant may add to noise that was calibrated to the limit


class BudgetSpent(UserError):
    """A round would exceed the site's budget. Nothing was charged, and nothing may be computed."""


@dataclass(frozen=True)
class Standing:
    """What a site has spent.

    Attributes:
      spent: epsilon of all releases together.
      limit: epsilon that no round may exceed.
      runs: that the site joined or was charged for.
      releases: how many rounds were charged.
    """

    spent: float
    limit: float
    runs: int
    releases: int


@dataclass(frozen=True)
class SiteBudget:
    """The budget of one site, for all runs that it takes part in.

    Every call reads the ledger anew and holds a lock meanwhile, so that processes may come and go.

    Attributes:
      path: of the ledger, made with the first call. Beside it stand a lock and ``.head``, the hash of the newest line:
        a ledger that loses lines at its end, or is gone, is noticed.
      epsilon: what all runs together may spend.
      delta: of the guarantee; well below one over the number of units. It cannot be changed later.
      site: the name of the site.
      unit: whose presence is hidden. Runs for another unit are refused: their epsilons do not add up with others.
      accountant: ``pld`` or ``rdp``.
    """

    path: Path
    epsilon: float
    delta: float
    site: str
    unit: Unit = "record"
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not 0 < self.epsilon < math.inf:
            raise UserError(f"the budget's epsilon is {self.epsilon}; it must be positive and finite")
        accounting.check_probability("the budget's delta", self.delta)
        accounting.check_accountant(self.accountant)

    def agree(self, run: str, terms: Terms | None) -> None:
        """Joins a run on its terms, or sees that they are those that the site joined it on.

        Args:
          run: its id.
          terms: from ``site_ledger.terms_of``; ``None``: the run has no mechanism.

        Raises:
          UserError: no mechanism, noise or another unit than the site wants; or other terms than before. Nothing may be
            computed from records.
        """
        if terms is None:
            raise UserError(
                f"run {run!r} has no differential privacy, and site {self.site!r} has a privacy budget: it takes part "
                "in private runs alone. Set privacy.mechanism of the run"
            )
        if terms.unit != self.unit:
            raise UserError(
                f"run {run!r} protects one {terms.unit}, and the budget of site {self.site!r} is for one {self.unit}: "
                f"their epsilons do not add up. Set privacy.unit of the run to {self.unit!r}"
            )
        if checked(terms.event).noise_multiplier == 0:
            raise UserError(f"run {run!r} adds no noise; site {self.site!r} takes part in runs that do alone")
        with self._opened() as books:
            agreed = site_ledger.agreements(books.contents).get(run)
            if agreed is not None:
                _check_same(self.site, run, agreed, terms)
                return
            _check_event(self.site, run, site_ledger.charges(books.contents), terms.event)
            ledger.append(books, 0, site_ledger.agreement_note(run, terms), {}, repeatable=False)

    def charge(
        self,
        round: int,  # noqa: A002
        attempt: int,
        event: Event,
        *,
        run: str = "",
        computation: str = "",
    ) -> bool:
        """Charges a round; when this returns, the charge is on the disk and the round may be computed.

        Args:
          round: of the run, from 1.
          attempt: how often the server released the round before with other noise.
          event: what the round releases about the site.
          run: the run's id.
          computation: a hash of all that decides the bits that the site releases: the adapters that it received, its
            records, configuration and keys. A round with the same one is not charged again. Empty: not known.

        Returns:
          Whether it was charged now; ``False`` where the very same bits had been charged before.

        Raises:
          BudgetSpent: all runs together would exceed the budget.
          UserError: a round and attempt that were charged for other bits; an event that is not the run's; a ledger that
            is damaged, shorter than it was, or cannot be written. Nothing may be computed from records.
        """
        if round < 1 or attempt < 0:
            raise UserError(
                f"run {run!r} asks for round {round}, attempt {attempt}; rounds count from 1, attempts from 0"
            )
        asked = Charge(run, round, attempt, computation, checked(event))
        with self._opened() as books:
            past = site_ledger.charges(books.contents)
            agreed = site_ledger.agreements(books.contents).get(run)
            if agreed is not None and agreed.event != event:
                raise _other_event(self.site, run, agreed.event, event)
            _check_event(self.site, run, past, event)
            if computation and asked in past:
                return False
            _check_new(self.site, past, asked)
            spent = self._epsilon((*past, asked))
            if spent > self.epsilon * (1 + _ROUNDING):
                raise BudgetSpent(
                    f"round {round} of run {run!r} would bring site {self.site!r} to {at_most(spent)} at delta "
                    f"{self.delta:g} ({adjacency(self.unit)}), above its budget of {self.epsilon:g} for all runs: it "
                    "takes no part in it"
                )
            note = site_ledger.charge_note(run, attempt, computation)
            ledger.append(books, round, note, {self.site: event}, repeatable=False)
        return True

    def standing(self) -> Standing:
        """What has been spent, by the ledger."""
        with self._opened() as books:
            past = site_ledger.charges(books.contents)
            runs = {charge.run for charge in past} | site_ledger.agreements(books.contents).keys()
        return Standing(self._epsilon(past), self.epsilon, len(runs), len(past))

    def with_rounds(self, event: Event, rounds: int) -> float:
        """The epsilon of all that was released and so many rounds of a new run."""
        with self._opened() as books:
            past = site_ledger.charges(books.contents)
        run = "\0new"  # no id of a run
        return self._epsilon((*past, *(Charge(run, number, 0, "", event) for number in range(1, rounds + 1))))

    def _epsilon(self, found: Sequence[Charge]) -> float:
        """Of releases, counted anew: a cache on the disk is not asked."""
        events = site_ledger.composed(found)
        return accounting.guarantee(events, self.delta, self.accountant, keep=False).epsilon

    @contextmanager
    def _opened(self) -> Generator[ledger.Ledger]:
        """The ledger, for this process alone; its head is kept as soon as an entry is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = self.path.with_name(self.path.name + ".head")
        with FileLock(self.path.with_name(self.path.name + ".lock")):
            known = head.read_text("ascii").strip() if head.exists() else None
            if known is not None and (not self.path.exists() or not ledger.contains(ledger.read(self.path), known)):
                raise UserError(
                    f"{self.path} lacks entries that it had before (see {head.name} beside it): going on would charge "
                    "less than was released. Restore the newest copy of the ledger"
                )
            header = site_ledger.header_of(self.site, self.unit, self.delta, self.accountant)
            books = ledger.reopen(self.path, header, None)
            yield books
            if ledger.head(books.contents) != known:
                _keep(head, ledger.head(books.contents))


def _check_same(site: str, run: str, agreed: Terms, terms: Terms) -> None:
    """Refuses terms that are not those that were agreed on."""
    before, now = asdict(agreed), asdict(terms)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        raise UserError(
            f"run {run!r} has changed since site {site!r} joined it: {'; '.join(changed)}. The server must go on as it "
            "began, or start a new run"
        )


def _check_event(site: str, run: str, past: Sequence[Charge], event: Event) -> None:
    """Refuses an event unlike those that the run was charged for."""
    for charge in past:
        if charge.run == run and charge.event != event:
            raise _other_event(site, run, charge.event, event)


def _other_event(site: str, run: str, agreed: Event, event: Event) -> UserError:
    """The error for a round that releases something else than agreed."""
    return UserError(
        f"run {run!r} asks site {site!r} for a round with {event}, but what it joined is {agreed}. The server must "
        "go on as it began, or start a new run"
    )


def _check_new(site: str, past: Sequence[Charge], asked: Charge) -> None:
    """Refuses a round that was released before, unless it is a new attempt with independent noise."""
    earlier = [charge for charge in past if (charge.run, charge.round) == (asked.run, asked.round)]
    where = f"round {asked.round} of run {asked.run!r}"
    if any(charge.attempt == asked.attempt for charge in earlier):
        raise UserError(
            f"{where}, attempt {asked.attempt}, was charged at site {site!r} before, for other bits: it is not "
            "computed again. A server that releases a round anew must count the attempt up"
        )
    if asked.event.kind in CORRELATED and (earlier or asked.attempt > 0):
        raise UserError(
            f"{where} is asked for again with other noise, but noise is correlated over the run: all its rounds are "
            "one release, which does not allow that. Start a new run"
        )


def _keep(path: Path, digest: str) -> None:
    """Writes the newest hash, whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(digest + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
