"""How units take part in the releases of a run, as events to calibrate and to charge."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import calibration
from fedjax_llm.privacy.correlated import Correlation
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Budget, Population, Regime
from fedjax_llm.types import Unit

GENERATOR = (
    "noise is float32 from JAX's counter-based generator: of research grade, neither discrete nor from a cryptographic "
    "generator"
)
"""What the guarantee of every mechanism rests on whose noise is of real numbers."""
INTEGERS = (
    "every site draws its share of the noise by itself, in integers, from a cryptographic stream (AES-256) whose key "
    "nobody else has"
)
"""What takes its place where noise is shared out."""
SAMPLES = "which units a step samples comes from JAX's counter-based generator, of research grade"
"""What is left of it there."""


class Participation(NamedTuple):
    """How the units of each site take part in its steps.

    Attributes:
      probability: f64 [N]: with which a unit is sampled, in a step that its group can take part in.
      expected: f64 [N]: units a step on average; a public constant.
      runs: what each site's steps of the whole run release about it, for a noise multiplier of 1.
      correlation: of the noise over the steps; ``None``: independent.
      sensitivity: standard deviation of the independent noise over (clip norm times the event's noise multiplier).
      assumptions: what this rests on, as sentences.
    """

    probability: np.ndarray
    expected: np.ndarray
    runs: tuple[Event, ...]
    correlation: Correlation | None
    sensitivity: float
    assumptions: tuple[str, ...]


def in_steps(
    regime: Regime, population: Population, probability: float | None, noise: Any, steps: np.ndarray
) -> Participation:
    """Units in the local steps of their site, which draws a Poisson sample of them in each.

    With amplified banded noise the units of a site are dealt to groups, and step i of the site's run samples from group
    i modulo their number alone. With other correlated noise a unit may be in any step, even in all of them, and
    sampling does not count.

    Args:
      regime: the experiment.
      population: the sites.
      probability: with which a unit takes part in a step, on average over the groups; ``None``: see :func:`poisson`.
      noise: how it is correlated over a site's steps.
      steps: [N]: each site's in the whole run.
    """
    sampled, longest = poisson(regime, population, probability), int(max(steps))
    correlation = None if noise is None else correlate(noise, population, longest, 1, longest)
    return _participation(population, sampled, steps, correlation)


def in_rounds(regime: Regime, population: Population, probability: float | None, noise: Any) -> Participation:
    """Units in the rounds of their site, with one noise for all sites; as :func:`in_steps`, but for whole rounds.

    Raises:
      UserError: amplified banded noise where sites take turns.
    """
    sampled, rounds = poisson(regime, population, probability), np.maximum(1, population.participations)
    if noise is None:
        return _participation(population, sampled, rounds, None)
    schema = (min(population.min_separation), int(max(rounds)))
    correlation = correlate(noise, population, regime.rounds, *schema)
    if correlation.cyclic > 1 and min(population.participations) < regime.rounds:
        raise UserError(
            "sites take turns, and banded noise is amplified: that counts on groups of units which take part in every "
            f"{correlation.cyclic} rounds, and a site that misses rounds does not keep step. Let every site take part "
            "in every round (federation.cohort=None), or set the noise's amplified to False"
        )
    return _participation(population, sampled, rounds, correlation)


def correlate(noise: Any, population: Population, steps: int, min_separation: int, participations: int) -> Correlation:
    """The correlation over so many releases, for units that take part in them like this.

    Raises:
      UserError: units at several sites, whose releases it does not compose; or noise that brings nothing.
    """
    if population.shared:
        raise UserError(
            f"the sites {', '.join(population.shared[0])} hold data of the same patient, and noise is correlated: such "
            "noise is charged as one release of the whole run, which does not add up over sites. Set the mechanism's "
            "noise to None, or keep each patient's records at one site"
        )
    return noise.make(steps, min_separation, participations)


def _participation(
    population: Population, sampled: np.ndarray, counts: np.ndarray, correlation: Correlation | None
) -> Participation:
    """With independent noise, or with the correlation's groups, sensitivity and events."""
    groups = 1 if correlation is None else correlation.cyclic
    # The few units of a small site's group all take part when it is their turn.
    within = np.minimum(1.0, groups * sampled)
    expected = within * np.asarray(population.units, np.float64) / groups
    releases = [(float(q), int(count)) for q, count in zip(within, counts, strict=True)]
    hidden = ("which units a step samples stays secret",)
    if correlation is None:
        runs = tuple(Event("gaussian", 1.0, q, count) for q, count in releases)
        return Participation(within, expected, runs, None, 1.0, hidden)
    runs = tuple(correlation.event(1.0, q, count) for q, count in releases)
    return Participation(within, expected, runs, correlation, correlation.sensitivity, hidden if groups > 1 else ())


def assumptions(unit: Unit, generators: Sequence[str] = (GENERATOR,)) -> tuple[str, ...]:
    """What every guarantee for units inside the sites rests on, and where its noise and samples come from."""
    what = {
        "record": "a record is what the data source calls one: a copy of it is another record, and so is what has the "
        "same id at another site",
        "patient": "a patient is told by the owner's id in the data: one with two ids is two patients",
    }
    return (what[unit], "how many units each site trains on is public", *generators)


def summed(what: str, secure: bool) -> str:
    """What noise that is added once to a sum rests on.

    Args:
      what: is added up.
      secure: whether under secure aggregation.
    """
    if secure:
        return (
            f"{what} are added up under secure aggregation, and the server adds the noise: it sees the sum before "
            "that, and is trusted with it, not with what single sites send"
        )
    return (
        f"{what} are added up, and noise is drawn, before anybody looks: by a server that is trusted with them, or "
        "under secure aggregation"
    )


def poisson(regime: Regime, population: Population, probability: float | None) -> np.ndarray:
    """f64 [N]: ``probability``, or what makes ``regime.batch_size`` units a step on average (at most 1).

    Raises:
      UserError: a site has no unit.
    """
    for site, units in zip(population.sites, population.units, strict=True):
        if units < 1:
            raise UserError(f"site {site!r} trains on no {regime.unit}; leave it out, or give it data")
    units = np.asarray(population.units, np.float64)
    return (
        np.minimum(1.0, regime.batch_size / units) if probability is None else np.full(len(units), float(probability))
    )


def accounts(names: Sequence[str], shared: Sequence[Sequence[str]] = ()) -> dict[str, tuple[str, ...]]:
    """Account -> the names that it is charged for: one each, and one for every set of sites that share an owner.

    Args:
      names: what events are charged to: sites, or ``EVERY_SITE``, beside which no set has an account.
      shared: sets of sites.
    """
    # The name of a site holds no slash, so that a set is never called like a site.
    together = {" / ".join(group): tuple(group) for group in shared if set(group) <= set(names)}
    return {name: (name,) for name in names} | together


def per_site(runs: Sequence[Event], population: Population, budget: Budget, own: float | None) -> np.ndarray:
    """f64 [N]: each site's noise multiplier: the mechanism's own, or what just meets the target.

    Sites that share owners (directly, or by way of others) get one multiplier, for the worst of their accounts.

    Args:
      runs: what each site releases in the whole run; the noise multipliers are replaced.
      population: the sites.
      budget: the target.
      own: the mechanism's own noise multiplier, for all sites.
    """
    if own is not None:
        return np.full(len(runs), float(own))
    assert budget.epsilon is not None
    target = (budget.epsilon, budget.delta, budget.accountant, budget.progress)
    found: dict[str, float] = {}
    run_of = dict(zip(population.sites, runs, strict=True))
    groups = _connected(population.shared)
    alone = [site for site in population.sites if not any(site in group for group in groups)]
    if alone:
        multipliers = calibration.noise_multipliers([run_of[site] for site in alone], *target)
        found |= dict(zip(alone, multipliers, strict=True))
    for group in groups:
        compositions = [[run_of[site] for site in sites] for sites in population.shared if group.issuperset(sites)]
        found |= dict.fromkeys(group, calibration.noise_multiplier_of_all(compositions, *target))
    return np.asarray([found[site] for site in population.sites], np.float64)


def common(
    runs: Sequence[Event], population: Population, budget: Budget, own: float | None
) -> tuple[float, np.ndarray]:
    """Where noise is added once to the sum over the sites: its multiplier, and what each site's events hold [N].

    An owner at m sites adds up to m clipped gradients to one sum. Noise of multiplier z is the sum of m independent
    noises of multiplier z / sqrt(m); had each of these sites released its own sum with one of them, the sum of the
    releases would be the same. So the events of such sites hold z / sqrt(m), and compose like those of other sites.

    Args:
      runs: what each site's steps of the whole run release; the noise multipliers are replaced.
      population: the sites.
      budget: the target.
      own: the mechanism's own noise multiplier.
    """
    most = dict.fromkeys(population.sites, 1)
    for group in population.shared:
        for site in group:
            most[site] = max(most[site], len(group))
    share = np.sqrt([most[site] for site in population.sites])
    if own is not None:
        return float(own), own / share
    assert budget.epsilon is not None
    target = (budget.epsilon, budget.delta, budget.accountant, budget.progress)
    run_of = dict(zip(population.sites, runs, strict=True))
    everyone = accounts(population.sites, population.shared)
    needed = []
    for size in sorted(set(most.values())):
        # The largest share among an account's sites decides; an account of one site is no exception.
        compositions = [
            [run_of[site] for site in sites] for sites in everyone.values() if max(most[site] for site in sites) == size
        ]
        needed.append(np.sqrt(size) * calibration.noise_multiplier_of_all(compositions, *target))
    return float(max(needed)), max(needed) / share


def _connected(groups: Sequence[Sequence[str]]) -> list[set[str]]:
    """Groups that have a site in common as one."""
    joined: list[set[str]] = []
    for group in groups:
        touching = [other for other in joined if other & set(group)]
        joined = [other for other in joined if other not in touching] + [set(group).union(*touching)]
    return joined
