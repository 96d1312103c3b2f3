"""A site's own ledger: what all runs together released about its units, whoever ran them.

It is an ordinary ledger (``ledger.py``) with one account, the site. An entry's ``computation`` is JSON that says whose
release it is: ``{"run", "attempt", "computation"}``. An entry of round 0 releases nothing: it holds the terms that the
site takes part in a run on, ``{"run", "terms"}``. Epsilons of runs add up: they are computed from the same records.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fedjax_llm.privacy.accounting import Accountant
from fedjax_llm.privacy.events import LATTICE, Event, merge
from fedjax_llm.privacy.gaussian_releases import releases_of
from fedjax_llm.privacy.ledger import Contents, Header, config_hash
from fedjax_llm.privacy.mechanism import EVERY_SITE, Mechanism, adjacency
from fedjax_llm.privacy.noise import Randomness
from fedjax_llm.types import Unit

MECHANISM = "that of each run"
"""What stands for the mechanism in the header of a site's ledger."""
CORRELATED = ("banded", "matrix")
"""Kinds of events whose noise is mixed over a whole run, so that no round of it can be released twice."""


@dataclass(frozen=True)
class Terms:
    """What a run does with a site's records, as far as its guarantee rests on it.

    Attributes:
      mechanism: its name.
      unit: of privacy.
      noised: where noise comes in (``mechanism.Mechanism.noised``).
      clip_norm: the bound on a unit's gradient, or on the site's message; where it is adaptive, the first one.
      scope: of clipping.
      adaptive: whether the clip norm follows a quantile of the norms.
      event: what one round with this site in it releases about it.
      randomness: where noise comes from.
    """

    mechanism: str
    unit: Unit
    noised: str
    clip_norm: float
    scope: str
    adaptive: bool
    event: Event
    randomness: Randomness


@dataclass(frozen=True)
class Charge:
    """One release in a site's ledger.

    Attributes:
      run: whose.
      round: of that run.
      attempt: of that round, as the server counts.
      computation: a hash of all that decides the bits that the site releases; empty where that is not known.
      event: what is released.
    """

    run: str
    round: int
    attempt: int
    computation: str
    event: Event


def header_of(site: str, unit: Unit, delta: float, accountant: Accountant = "pld") -> Header:
    """The first line of a site's ledger. How many units a site has may change; it is not in there (0)."""
    return Header(
        unit=unit,
        adjacency=adjacency(unit),
        mechanism=MECHANISM,
        delta=delta,
        accountant=accountant,
        randomness="secret",
        accounts={site: 0},
        shared=(),
        config=config_hash({"site": site}),
    )


def terms_of(mechanism: Mechanism, site: str, randomness: Randomness) -> Terms:
    """The terms of a run, for one site.

    Where the server draws cohorts in secret, all sites are charged for every round, at a price that counts on the
    secret. A site knows when it takes part, and cannot see how it was drawn: its own ledger has the rounds with the
    site in them alone, each without amplification.
    """
    if EVERY_SITE in mechanism.events:
        event = replace(mechanism.events[EVERY_SITE], sampling_probability=1.0)
    else:
        event = mechanism.events[site]
    return Terms(
        mechanism=mechanism.name,
        unit=mechanism.unit,
        noised=mechanism.noised,
        clip_norm=float(mechanism.clip.norm),
        scope=mechanism.clip.scope,
        adaptive=mechanism.adaptive is not None,
        event=event,
        randomness=randomness,
    )


def agreement_note(run: str, terms: Terms) -> str:
    """The ``computation`` of the entry that holds a run's terms."""
    return _json({"run": run, "terms": asdict(terms)})


def charge_note(run: str, attempt: int, computation: str) -> str:
    """The ``computation`` of the entry of a release."""
    return _json({"run": run, "attempt": attempt, "computation": computation})


def agreements(contents: Contents) -> dict[str, Terms]:
    """The terms of every run that the site has joined."""
    found = {}
    for entry in contents.entries:
        if not entry.events:
            note: dict[str, Any] = json.loads(entry.computation)
            terms = Terms(**note["terms"])
            found[note["run"]] = replace(terms, event=Event(**note["terms"]["event"]))
    return found


def charges(contents: Contents) -> tuple[Charge, ...]:
    """All releases in a site's ledger, in the order in which they were charged."""
    found = []
    for entry in contents.entries:
        for event in entry.events.values():
            note: Mapping[str, Any] = json.loads(entry.computation)
            found.append(Charge(note["run"], entry.round, note["attempt"], note["computation"], event))
    return tuple(found)


def composed(found: Iterable[Charge]) -> tuple[Event, ...]:
    """What all releases together are, as events that may be merged and accounted for.

    Steps of correlated noise are one release within a run, and are counted out for each run before runs are put
    together: equal noise of two runs is two releases.
    """
    by_run: dict[str, list[Event]] = {}
    for charge in found:
        by_run.setdefault(charge.run, []).append(charge.event)
    return merge(event for events in by_run.values() for event in _independent(events))


def _independent(events: Iterable[Event]) -> tuple[Event, ...]:
    """A run's events without correlation: integer noise as it is, the rest as plain Gaussian releases."""
    events = tuple(events)
    kind: Literal["gaussian"] = "gaussian"
    plain = releases_of([event for event in events if event.kind not in LATTICE])
    return (
        *(event for event in events if event.kind in LATTICE),
        *(Event(kind, release.noise_multiplier, release.sampling_probability, release.count) for release in plain),
    )


def _json(fields: Mapping[str, Any]) -> str:
    """JSON with one way to write each value."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
