"""Sampled Gaussian releases: what events with real-valued noise come down to, and how dp_accounting says it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, get_args

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.privacy.events import LATTICE, Event, Kind, merge

# dp_accounting (scipy) takes seconds to import: runs without privacy, and figures from the cache, do without.
if TYPE_CHECKING:
    import dp_accounting


class Release(NamedTuple):
    """``count`` releases with independent Gaussian noise, each of a fresh sample: what every kind comes down to."""

    noise_multiplier: float
    sampling_probability: float
    count: int


def releases_of(events: Sequence[Event]) -> tuple[Release, ...]:
    """The events as sampled Gaussian releases, in an order that does not depend on theirs.

    Equal events are merged first, so the steps of a matrix mechanism may be charged one by one: ``bands`` steps of a
    banded one are one release (the last, incomplete, band counts whole), all steps of an unamplified one are one.

    Raises:
      UserError: an event has an impossible value, or integer noise, which is no Gaussian.
    """
    counts: dict[tuple[float, float], int] = {}
    # Merged steps of several sites would share an incomplete band, or one matrix release, and cost too little. They do
    # not meet here: participation.correlate refuses correlated noise where owners are at several sites, so that an
    # account of several names has gaussian events alone.
    for event in merge(checked(event) for event in events):
        if event.kind in LATTICE:
            raise UserError(
                f"noise of the kind {event.kind!r} is no sampled Gaussian, and dp_accounting has no event for it: ask "
                "accounting.guarantee, which goes by Rényi divergences"
            )
        count = {"gaussian": event.count, "banded": -(-event.count // event.bands), "matrix": min(event.count, 1)}
        alike = (float(event.noise_multiplier), 1.0 if event.kind == "matrix" else float(event.sampling_probability))
        counts[alike] = counts.get(alike, 0) + count[event.kind]
    return tuple(Release(*alike, count) for alike, count in sorted(counts.items()) if count)


def to_dp_event(events: Sequence[Event]) -> "dp_accounting.DpEvent":
    """The composition of the events of one account, in dp_accounting's words.

    Raises:
      UserError: see :func:`releases_of`.
    """
    return dp_event(releases_of(events))


def checked(event: Event) -> Event:
    """The event, if its values are possible.

    Raises:
      UserError: naming the value that is not.
    """
    wrong = None
    if event.kind not in get_args(Kind):
        wrong = f"its kind is {event.kind!r}{nearest(event.kind, get_args(Kind))}"
    elif not 0 <= event.noise_multiplier < math.inf:
        wrong = f"its noise multiplier is {event.noise_multiplier}; it must be finite and not negative"
    elif not 0 < event.sampling_probability <= 1:
        wrong = f"its sampling probability is {event.sampling_probability}; it must be in (0, 1]"
    elif event.count < 0 or event.bands < 1:
        wrong = f"its count is {event.count} (at least 0) and its bands {event.bands} (at least 1)"
    elif event.kind in LATTICE and (event.summands < 1 or event.values < 1 or not 0 < event.sensitivity < math.inf):
        wrong = f"it has {event.summands} shares, {event.values} values and sensitivity {event.sensitivity}"
    if wrong:
        raise UserError(f"an event cannot be accounted for: {wrong}")
    return event


def dp_event(releases: Sequence[Release]) -> "dp_accounting.DpEvent":
    """See :func:`to_dp_event`."""
    import dp_accounting

    events: list[dp_accounting.DpEvent] = []
    for noise_multiplier, probability, count in releases:
        event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()
        if noise_multiplier > 0:
            event = dp_accounting.GaussianDpEvent(noise_multiplier)
            if probability < 1:
                event = dp_accounting.PoissonSampledDpEvent(probability, event)
        events.append(dp_accounting.SelfComposedDpEvent(event, count) if count > 1 else event)
    if len(events) == 1:
        return events[0]
    return dp_accounting.ComposedDpEvent(events) if events else dp_accounting.NoOpDpEvent()
