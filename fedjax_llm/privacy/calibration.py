"""From a target (epsilon, delta) back to noise, rounds or sampling, by the same accounting that later states the cost.

Every search is over a grid of values that are stated as they are (noise multipliers in thousandths, ...), and ends with
a value whose own epsilon was computed and is within the target.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.accounting import Accountant, check_accountant, check_probability, guarantee
from fedjax_llm.privacy.disk_cache import remembered
from fedjax_llm.privacy.events import Event, merge

_PER_UNIT = 1000
_MOST_NOISE = 10_000
_SAMPLING_STEPS = 10**6


def noise_multipliers(
    templates: Sequence[Event],
    epsilon: float,
    delta: float,
    accountant: Accountant = "pld",
    progress: Callable[[int, int], Any] | None = None,
) -> list[float]:
    """For each template the least noise multiplier with which it alone is (epsilon, delta)-private.

    Equal templates are calibrated once, and results are kept on disk.

    Args:
      templates: all events of one account each; their own noise multipliers do not matter.
      epsilon: the target, for adding or removing one unit.
      delta: in (0, 1).
      accountant: ``pld`` or ``rdp``.
      progress: called with (done, total) over the distinct templates.

    Returns:
      Multiples of 1e-3, rounded up, in the order of the templates.

    Raises:
      UserError: an impossible target or template, or no noise multiplier up to 10000 that meets the target.

    Examples:
      >>> noise_multipliers([Event("gaussian", 1.0, count=16)], epsilon=8.0, delta=1e-5)  # any multiplier
      [2.401]
    """
    distinct = dict.fromkeys(replace(template, noise_multiplier=1.0) for template in templates)
    found: dict[Event, float] = {}
    for done, template in enumerate(distinct):
        if progress:
            progress(done, len(distinct))
        found[template] = noise_multiplier_of_all([[template]], epsilon, delta, accountant)
    if progress:
        progress(len(distinct), len(distinct))
    return [found[replace(template, noise_multiplier=1.0)] for template in templates]


def noise_multiplier_of_all(
    compositions: Sequence[Sequence[Event]],
    epsilon: float,
    delta: float,
    accountant: Accountant = "pld",
    progress: Callable[[int, int], Any] | None = None,
) -> float:
    """The least noise multiplier that, common to all events, makes every composition (epsilon, delta)-private.

    It is for noise that is added once to what many accounts share, where they differ in sampling and participations.

    Args:
      compositions: all events of one account each; their own noise multipliers do not matter.
      epsilon: the target for each account, for adding or removing one unit.
      delta: in (0, 1).
      accountant: ``pld`` or ``rdp``.
      progress: called with (done, total) over the distinct compositions.

    Returns:
      A multiple of 1e-3, rounded up.

    Raises:
      UserError: an impossible target or event, or no noise multiplier up to 10000 that meets the target.
    """
    _check_target(epsilon, delta, accountant)
    distinct = list(dict.fromkeys(_with_noise(composition, 1.0) for composition in compositions))
    # The costliest first: the others then need one look each, as a rule.
    distinct.sort(key=lambda events: sum(e.count * e.sampling_probability**2 for e in events), reverse=True)
    inputs = {"target": epsilon, "delta": delta, "accountant": accountant}

    def compute() -> int:
        least = 1
        for done, events in enumerate(distinct):
            if progress:
                progress(done, len(distinct))
            least = _least_noise(events, epsilon, delta, accountant, least)
        return least

    thousandths = remembered(
        "noise multiplier", {**inputs, "compositions": [[asdict(e) for e in events] for events in distinct]}, compute
    )
    if progress:
        progress(len(distinct), len(distinct))
    return thousandths / _PER_UNIT


def rounds_within(
    event: Event, epsilon: float, delta: float, accountant: Accountant = "pld", most: int = 1_000_000
) -> int:
    """In how many rounds the event can be released within a budget; 0 if in none, ``most`` if in more than that.

    Args:
      event: what one round releases, with its ``count``.
      epsilon: the budget, for adding or removing one unit.
      delta: in (0, 1).
      accountant: ``pld`` or ``rdp``.
      most: where to stop looking.

    Raises:
      UserError: an impossible budget or event, or the event of an unamplified matrix mechanism, whose noise is made for
        one number of steps.

    Examples:
      >>> rounds_within(Event("gaussian", noise_multiplier=4.0), epsilon=8.0, delta=1e-5)
      44
    """
    _check_target(epsilon, delta, accountant)
    if event.kind == "matrix":
        raise UserError(
            "a matrix mechanism's noise is made for a fixed number of steps: state the rounds and calibrate the noise"
        )
    inputs = {"event": asdict(event), "budget": epsilon, "delta": delta, "accountant": accountant, "most": most}

    def too_many(rounds: int) -> bool:
        return _cost([replace(event, count=event.count * rounds)], delta, accountant) > epsilon

    def compute() -> int:
        return _first(too_many, 1, most + 1, guess=1) - 1

    return remembered("rounds", inputs, compute)


def sampling_probability_within(event: Event, epsilon: float, delta: float, accountant: Accountant = "pld") -> float:
    """The largest sampling probability with which the event stays within a budget; times the units: the batch size.

    Args:
      event: all that is released, with its noise multiplier and count; its own sampling probability does not matter.
      epsilon: the budget, for adding or removing one unit.
      delta: in (0, 1).
      accountant: ``pld`` or ``rdp``.

    Returns:
      A multiple of 1e-6, rounded down; 0 if even 1e-6 is too much.

    Raises:
      UserError: an impossible budget or event, or the event of an unamplified matrix mechanism, which does not sample.
    """
    _check_target(epsilon, delta, accountant)
    if event.kind == "matrix":
        raise UserError("an unamplified matrix mechanism does not sample: calibrate its noise")
    alike = replace(event, sampling_probability=1.0)
    inputs = {"event": asdict(alike), "budget": epsilon, "delta": delta, "accountant": accountant}

    def too_likely(step: int) -> bool:
        probability = step / _SAMPLING_STEPS
        return _cost([replace(event, sampling_probability=probability)], delta, accountant) > epsilon

    def compute() -> int:
        return _first(too_likely, 1, _SAMPLING_STEPS + 1, guess=_SAMPLING_STEPS // 100) - 1

    return remembered("sampling probability", inputs, compute) / _SAMPLING_STEPS


def check_delta(delta: float, units: Mapping[str, int]) -> None:
    """Refuses a delta that is not small beside the number of units: publishing one of n units costs delta = 1 / n.

    Args:
      delta: of the guarantee.
      units: account (a site; ``every site``) -> how many units it protects: records, patients, or sites.

    Raises:
      UserError: delta is not in (0, 1), or larger than 1 / (10 n) for some account; with the largest that is allowed.
    """
    check_probability("delta", delta)
    most = {name: 1 / (10 * max(count, 1)) for name, count in units.items()}
    refused = sorted((name for name in most if delta > most[name]), key=most.__getitem__)
    if refused:
        shown = ", ".join(f"{name!r} has {units[name]} (delta at most {_down(most[name]):g})" for name in refused)
        raise UserError(
            f"delta = {delta:g} is too large for the number of units: publishing one unit in {round(1 / delta)} whole "
            f"would count as private. It must be at most 1 / (10 n) where n units are protected: {shown}.\n"
            f"Set delta to {_down(most[refused[0]]):g} or less."
        )


def _least_noise(events: tuple[Event, ...], epsilon: float, delta: float, accountant: Accountant, least: int) -> int:
    """The least noise multiplier for one composition, in thousandths, from ``least`` on."""

    def enough(thousandths: int) -> bool:
        return _cost(_with_noise(events, thousandths / _PER_UNIT), delta, accountant) <= epsilon

    end = _MOST_NOISE * _PER_UNIT + 1
    found = _first(enough, least, end, guess=least if least > 1 else _PER_UNIT)
    if found == end:
        raise UserError(
            f"no noise multiplier up to {_MOST_NOISE} gives epsilon {epsilon:g} at delta {delta:g} for "
            f"{sum(event.count for event in events)} releases: set a larger epsilon or delta, or fewer rounds"
        )
    return found


def _first(test: Callable[[int], bool], low: int, end: int, guess: int) -> int:
    """The first number in [low, end) that passes a test that all after it pass too; ``end`` where none does.

    Gallops from the guess, then bisects: a test costs a tenth of a second.
    """
    test = functools.cache(test)
    high = min(guess, end)
    if high < end and test(high):
        while high > low and test(max(low, high // 2)):
            high = max(low, high // 2)
        low = max(low, high // 2)
    else:
        while high < end and not test(high):
            low, high = high + 1, min(2 * high, end)
    return low + bisect_left(range(low, high), True, key=test)


def _cost(events: Sequence[Event], delta: float, accountant: Accountant) -> float:
    """Epsilon, not kept on disk: of a search only the result is worth a file."""
    return guarantee(events, delta, accountant, keep=False).epsilon


def _with_noise(events: Sequence[Event], noise_multiplier: float) -> tuple[Event, ...]:
    """The composition with one noise multiplier for all."""
    return merge(replace(event, noise_multiplier=noise_multiplier) for event in events)


def _check_target(epsilon: float, delta: float, accountant: str) -> None:
    """Refuses what no mechanism can meet, or every one does."""
    if not 0 < epsilon < math.inf:
        raise UserError(f"the target epsilon is {epsilon}; it must be positive and finite")
    check_probability("delta", delta)
    check_accountant(accountant)


def _down(value: float) -> float:
    """Rounded down to two significant digits."""
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return math.floor(value * scale * (1 + 1e-12)) / scale
