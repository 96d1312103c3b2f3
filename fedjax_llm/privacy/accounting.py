"""What releases cost: epsilon and delta of a composition of events, by dp_accounting.

Every figure is an upper bound for adding or removing one unit (record, patient or site) of the account that the events
were charged to. REPLACE_ONE is never used: dp_accounting's PLD accountant doubles the sensitivity for it and its RDP
accountant does not, so that one noise multiplier would mean two things.

Integer noise (``privacy/lattice.py``) has no privacy loss distribution: compositions that hold some go by Rényi
divergences whatever accountant is asked for.
"""

import functools
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.privacy import lattice
from fedjax_llm.privacy.disk_cache import remembered
from fedjax_llm.privacy.events import LATTICE, Event, merge
from fedjax_llm.privacy.gaussian_releases import Release, checked, dp_event, releases_of

# dp_accounting (scipy) takes seconds to import, so that it is imported where it is used: runs without privacy, and
# figures from the cache, do without.

Accountant = Literal["pld", "rdp"]
Method = Literal["pld", "rdp", "gaussian", "none"]

_GRID = 1e-3
_GRID_POINTS = 2**19
_NO_ANSWER = math.nan


class Guarantee(NamedTuple):
    """An (epsilon, delta) guarantee under add-or-remove-one, and how it was found.

    Attributes:
      epsilon: infinite where something is released without noise.
      delta: see ``epsilon``.
      accountant: ``pld`` or ``rdp``; ``gaussian``: the closed form of Gaussian releases without amplification by
        sampling (Balle & Wang 2018, arXiv 1805.06530); ``none``: nothing was released, or something without noise.
    """

    epsilon: float
    delta: float
    accountant: Method


def epsilon(events: Sequence[Event], delta: float, accountant: Accountant = "pld") -> float:
    """The epsilon of :func:`guarantee`: 0 for no events, infinite where something is released without noise.

    Examples:
      >>> epsilon([], delta=1e-5)
      0.0
      >>> round(epsilon([Event("gaussian", noise_multiplier=2.0, count=4)], delta=1e-5), 3)  # as one of multiplier 1
      4.377
    """
    return guarantee(events, delta, accountant).epsilon


def guarantee(events: Sequence[Event], delta: float, accountant: Accountant = "pld", keep: bool = True) -> Guarantee:
    """The least epsilon that the accountant can show for the events of one account.

    ``pld`` composes privacy loss distributions; where nothing is sampled the closed form is exact and takes its place,
    and where PLD has no answer (a delta near its rounding error, memory) RDP or the closed form without amplification
    does, whichever is smaller. ``rdp`` gives the (larger) figure of Rényi accounting, or the closed form where it has
    no answer. Where noise is of integers both are ``rdp``, and so is what the answer says.

    Args:
      events: of one account, in any order.
      delta: in (0, 1).
      accountant: ``pld`` or ``rdp``.
      keep: the answer in the cache, and look for it there.

    Raises:
      UserError: an impossible event or delta, or an unknown accountant.
    """
    check_probability("delta", delta)
    if lattice.holds(events):
        return Guarantee(_of_integers("epsilon", events, delta, accountant, keep), delta, "rdp")
    releases = releases_of(events)
    asked: Mapping[Method, Callable[[], float]] = {
        "pld": lambda: _pld_epsilon(releases, delta),
        "rdp": lambda: _rdp_epsilon(releases, delta),
        "gaussian": lambda: _gaussian_epsilon(releases, delta),
    }
    value, method = _answer("epsilon", releases, delta, accountant, asked, math.inf, keep)
    return Guarantee(value, delta, method)


def delta_of(events: Sequence[Event], epsilon: float, accountant: Accountant = "pld") -> float:
    """The least delta that the accountant can show at this epsilon; 0 for no events, 1 without noise.

    Args:
      events: of one account, in any order.
      epsilon: at least 0.
      accountant: as for :func:`guarantee`.

    Raises:
      UserError: an impossible event or epsilon, or an unknown accountant.
    """
    if not 0 <= epsilon < math.inf:
        raise UserError(f"epsilon is {epsilon}; it must be finite and not negative")
    if lattice.holds(events):
        return _of_integers("delta", events, epsilon, accountant, keep=True)
    releases = releases_of(events)
    asked: Mapping[Method, Callable[[], float]] = {
        "pld": lambda: _pld_delta(releases, epsilon),
        "rdp": lambda: _rdp_accountant(releases).get_delta(epsilon) or _NO_ANSWER,
        "gaussian": lambda: _gaussian_delta(releases, epsilon),
    }
    return min(1.0, _answer("delta", releases, epsilon, accountant, asked, 1.0, keep=True)[0])


def epsilon_curve(
    events_by_round: Sequence[Sequence[Event]], delta: float, accountant: Accountant = "pld"
) -> list[float]:
    """Epsilon of one account after each round; rounds that release nothing about it cost no accounting.

    Args:
      events_by_round: what each round released.
      delta: in (0, 1).
      accountant: as for :func:`guarantee`.

    Raises:
      UserError: an impossible event or delta, or an unknown accountant.
    """
    curve: list[float] = []
    so_far: tuple[Event, ...] = ()
    for events in events_by_round:
        so_far = merge((*so_far, *events))
        curve.append(epsilon(so_far, delta, accountant) if events or not curve else curve[-1])
    return curve


def check_probability(name: str, value: float) -> None:
    """Refuses what is not strictly between 0 and 1.

    Raises:
      UserError: naming the value.
    """
    if not 0 < value < 1:
        raise UserError(f"{name} is {value}; it must be larger than 0 and smaller than 1")


def check_accountant(accountant: str) -> None:
    """Refuses an accountant that does not exist.

    Raises:
      UserError: with the nearest one that does.
    """
    if accountant not in get_args(Accountant):
        raise UserError(f"unknown accountant {accountant!r}{nearest(accountant, get_args(Accountant))}")


def _answer(
    question: str,
    releases: tuple[Release, ...],
    given: float,
    accountant: Accountant,
    asked: Mapping[Method, Callable[[], float]],
    none: float,
    keep: bool,
) -> tuple[float, Method]:
    """The smallest of the bounds that the accountant stands for, and whose it is; ``none`` where nothing is private."""
    check_accountant(accountant)
    if not releases or releases[0].noise_multiplier == 0:  # they are sorted
        return (none if releases else 0.0), "none"
    sampled = any(release.sampling_probability < 1 for release in releases)

    def compute() -> list[Any]:
        bounds: dict[Method, float] = {}
        if accountant == "rdp" or sampled:
            bounds[accountant] = float(asked[accountant]())
        lacking = math.isnan(bounds.get(accountant, 0.0))
        if accountant == "pld" or lacking:
            bounds["gaussian"] = float(asked["gaussian"]())
        if accountant == "pld" and lacking:
            bounds["rdp"] = float(asked["rdp"]())
        return min([value, method] for method, value in bounds.items() if not math.isnan(value))

    inputs = {"releases": releases, "given": given, "accountant": accountant}
    value, method = remembered(question, inputs, compute) if keep else compute()
    return value, method


def _of_integers(
    question: Literal["epsilon", "delta"], events: Sequence[Event], given: float, accountant: Accountant, keep: bool
) -> float:
    """Epsilon at a delta, or delta at an epsilon, of a composition with integer noise in it."""
    check_accountant(accountant)
    events = merge(checked(event) for event in events)

    def compute() -> float:
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        answer = rdp.compute_epsilon if question == "epsilon" else rdp.compute_delta
        return float(answer(lattice.ORDERS.tolist(), _divergences(events).tolist(), given)[0])

    # In an order that does not depend on theirs.
    inputs = {"events": sorted((asdict(event) for event in events), key=repr), "given": given}
    return remembered(f"{question} with integers", inputs, compute) if keep else compute()


def _divergences(events: Sequence[Event]) -> np.ndarray:
    """Rényi divergences of the composition at the integer orders of ``lattice.ORDERS``."""
    total = sum((lattice.renyi(event) for event in events if event.kind in LATTICE), np.zeros(len(lattice.ORDERS)))
    others = releases_of([event for event in events if event.kind not in LATTICE])
    return total + _rdp_accountant(others, lattice.ORDERS).rdp if others else total


def _pld_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """By privacy loss distributions, which lose to rounding where delta is tiny."""
    rounding = _rounding(releases)
    if delta < 100 * rounding:
        return _NO_ANSWER
    try:
        value = float(_loss_distribution(releases).get_epsilon_for_delta(delta - rounding))
    except (MemoryError, OverflowError):  # losses so large that no grid within range or memory holds them
        return _NO_ANSWER
    return value if math.isfinite(value) else _NO_ANSWER


def _pld_delta(releases: tuple[Release, ...], epsilon: float) -> float:
    """By privacy loss distributions."""
    try:
        return float(_loss_distribution(releases).get_delta_for_epsilon(epsilon)) + _rounding(releases)
    except (MemoryError, OverflowError):  # losses so large that no grid within range or memory holds them
        return _NO_ANSWER


def _rounding(releases: tuple[Release, ...]) -> float:
    """What rounding in the Fourier transforms can take off delta.

    Composition raises a spectrum of size 1 to the power ``count`` in f64. Against closed forms the error in delta was
    at most 2e-17 a release; five times that is charged.
    """
    return 1e-14 + 1e-16 * sum(release.count for release in releases)


def _loss_distribution(releases: tuple[Release, ...]) -> Any:
    """The privacy loss distribution of the composition, for adding and for removing one unit, rounded up."""
    interval = _interval(releases)
    parts = []
    for noise_multiplier, probability, count in releases:
        if probability == 1:
            parts.append(_one_distribution(noise_multiplier / math.sqrt(count), 1.0, interval))
        else:
            parts.append(_one_distribution(noise_multiplier, probability, interval).self_compose(count))
    return functools.reduce(lambda left, right: left.compose(right), parts)


@functools.lru_cache(maxsize=32)  # a curve over rounds composes the same one again and again
def _one_distribution(noise_multiplier: float, probability: float, interval: float) -> Any:
    """Of one release."""
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=probability,
        value_discretization_interval=interval,
        pessimistic_estimate=True,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _interval(releases: tuple[Release, ...]) -> float:
    """The grid for privacy losses. Any grid gives an upper bound; 1e-3 agrees with finer ones to about four digits.

    Finer where one release's loss is itself that small (a twentieth of its root mean square), coarser where the losses
    of the composition would not fit on the grid (tiny noise). A power of two, so that near compositions share it.
    """
    drift = chi_square = participations = widest = steps = 0.0
    for noise_multiplier, probability, count in releases:
        information = noise_multiplier**-2
        width = information / 2 + 10 / noise_multiplier
        # The Kullback-Leibler divergence of a release, bounded by convexity and by its chi-square divergence.
        by_chi_square = math.log1p(probability**2 * math.expm1(information)) if information < 500 else math.inf
        chi_square += count * by_chi_square
        drift += count * min(probability * information / 2, by_chi_square)
        often = count * probability
        participations += width * min(count, often + 9 * math.sqrt(often) + 9)
        widest = max(widest, width)
        steps += count
    span = min(participations, widest + 2 * chi_square + 10 * math.sqrt(2 * chi_square))
    interval = max(min(_GRID, math.sqrt(2 * drift / steps) / 20), span / _GRID_POINTS, 1e-6)
    return 2.0 ** math.floor(math.log2(interval))


def _rdp_accountant(releases: tuple[Release, ...], orders: Any = None) -> Any:
    """A Rényi accountant that holds the releases. Keywords: its arguments are not in the order of PLD's."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(
        orders=orders, neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    with _quiet():
        return accountant.compose(dp_event(releases))


@contextmanager
def _quiet() -> Generator[None]:
    """Drops the warnings that an order did not converge: one order fewer is a larger epsilon, never a smaller one."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _rdp_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """By Rényi divergences; a zero says that they were lost to rounding, and is no answer."""
    value = float(_rdp_accountant(releases).get_epsilon(delta))
    return value if 0 < value < math.inf else _NO_ANSWER


def _gaussian_multiplier(releases: tuple[Release, ...]) -> float:
    """Of the one Gaussian release that costs as much as all together without amplification; sampling only helps."""
    return sum(release.count * release.noise_multiplier**-2 for release in releases) ** -0.5


def _gaussian_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """In closed form, rounded up by more than the root finder's error."""
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(_gaussian_multiplier(releases), delta)) * (1 + 1e-9)


def _gaussian_delta(releases: tuple[Release, ...], epsilon: float) -> float:
    """In closed form (Balle & Wang 2018, theorem 8), in logarithms so that large epsilons do not overflow."""
    from scipy.special import log_ndtr

    shift = 1 / _gaussian_multiplier(releases)
    more, less = log_ndtr(shift / 2 - epsilon / shift), epsilon + log_ndtr(-shift / 2 - epsilon / shift)
    return float(-math.expm1(min(less - more, 0.0)) * math.exp(more)) * (1 + 1e-9)
