"""How units take part in the releases of a run, as events to calibrate and to charge."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import calibration
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Budget, Population, Regime
from fedjax_llm.types import Unit

GENERATOR = (
    "noise is float32 from JAX's counter-based generator: of research grade, neither discrete nor from a cryptographic "
    "generator"
)
"""What the guarantee of every mechanism rests on."""


class Participation(NamedTuple):
    """How the units of each site take part in its steps.

    Attributes:
      probability: f64 [N]: with which a unit is sampled, in a step that its group can take part in.
      expected: f64 [N]: units a step on average; a public constant.
      runs: what each site's steps of the whole run release about it, for a noise multiplier of 1.
      correlation: how noise is correlated over the steps; ``None``: independent.
      sensitivity: standard deviation of the independent noise over (clip norm times the event's noise multiplier).
      assumptions: what this rests on, as sentences.
    """

    probability: np.ndarray
    expected: np.ndarray
    runs: tuple[Event, ...]
    correlation: Any
    sensitivity: float
    assumptions: tuple[str, ...]


def in_steps(
    regime: Regime, population: Population, probability: float | None, noise: Any, steps: Sequence[int] | np.ndarray
) -> Participation:
    """Units in the local steps of their site, which draws a Poisson sample of them in each.

    With banded noise the units of a site are dealt to as many groups as there are bands, and step i of the site's run
    samples from group i modulo their number alone (cyclic Poisson sampling). With other correlated noise every unit may
    be in any step, even in all of them, and sampling does not count.

    Args:
      regime: the experiment.
      population: the sites.
      probability: with which a unit takes part in a step, on average over the groups; ``None``: see :func:`poisson`.
      noise: how it is correlated over a site's steps.
      steps: [N]: each site's in the whole run.
    """
    sampled = poisson(regime, population, probability)
    longest = int(max(steps))
    return _participation(population, sampled, noise, steps, longest, (1, longest))


def in_rounds(regime: Regime, population: Population, probability: float | None, noise: Any) -> Participation:
    """Units in the rounds of their site, with one noise for all sites; as :func:`in_steps`, but for whole rounds.

    Raises:
      UserError: banded noise where sites take turns.
    """
    sites = len(population.sites)
    if noise is not None and (regime.cohort or sites) < sites and _is_banded(noise):
        raise UserError(
            f"federation.cohort is {regime.cohort} of {sites} sites: banded noise is accounted for by groups of units "
            "that take part in every so many rounds, which a site that misses rounds does not do. Let every site take "
            "part (federation.cohort=None), or choose BufferedToeplitz"
        )
    rounds = np.maximum(1, population.participations)
    schema = (min(population.min_separation), int(max(rounds)))
    sampled = poisson(regime, population, probability)
    return _participation(population, sampled, noise, rounds, regime.rounds, schema)


def _participation(
    population: Population,
    sampled: np.ndarray,
    noise: Any,
    counts: Sequence[int] | np.ndarray,
    longest: int,
    schema: tuple[int, int],
) -> Participation:
    """Events by site for independent, banded, or other correlated noise over ``longest`` releases at most."""
    units = np.asarray(population.units, np.float64)
    hidden = "which units a step samples stays secret"
    if noise is None:
        runs = [Event("gaussian", 1.0, float(q), int(count)) for q, count in zip(sampled, counts, strict=True)]
        return Participation(sampled, sampled * units, tuple(runs), None, 1.0, (hidden,))
    if population.shared:
        raise UserError(
            f"the sites {', '.join(population.shared[0])} hold data of the same patient, and noise is correlated: such "
            "noise is charged as one release of the whole run, which does not add up over sites. Set the mechanism's "
            "noise to None, or keep each patient's records at one site"
        )
    if _is_banded(noise):
        within = np.minimum(1.0, sampled * noise.bands)
        runs = [
            Event("banded", 1.0, float(q), int(count), noise.bands) for q, count in zip(within, counts, strict=True)
        ]
        # The cost of cyclic sampling is that of one participation in each turn of the groups.
        correlation, sensitivity = correlate(noise, longest, noise.bands, 1)
        expected = within * units / noise.bands
        return Participation(within, expected, tuple(runs), correlation, sensitivity, (hidden,))
    correlation, sensitivity = correlate(noise, longest, *schema)
    runs = [Event("matrix", 1.0, 1.0, int(count)) for count in counts]
    return Participation(sampled, sampled * units, tuple(runs), correlation, sensitivity, ())


def correlate(noise: Any, steps: int, min_separation: int, participations: int) -> tuple[Any, float]:
    """The correlation over so many releases, and its sensitivity to a unit that takes part in them like this."""
    correlation = noise.make(steps, min_separation, participations)
    return correlation, float(correlation.sensitivity)


def assumptions(unit: Unit) -> tuple[str, ...]:
    """What every guarantee for units inside the sites rests on."""
    what = {
        "record": "a record is what the data source calls one: a copy of it is another record",
        "patient": "a patient is told by the owner's id in the data: one with two ids is two patients",
    }
    return (what[unit], "how many units each site trains on is public", GENERATOR)


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


def _is_banded(noise: Any) -> bool:
    """Whether units are to be dealt to groups for this noise."""
    from fedjax_llm.privacy.correlated import BandedToeplitz

    return isinstance(noise, BandedToeplitz)
