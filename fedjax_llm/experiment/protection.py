"""From an experiment to its privacy mechanism: what a mechanism must know of it, and of whom it protects."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm.config import Experiment, regime_of
from fedjax_llm.data.records import unit_name
from fedjax_llm.data.splits import SplitSite
from fedjax_llm.federation.availability import selected_size
from fedjax_llm.federation.sampling import attendance
from fedjax_llm.privacy import guarantee
from fedjax_llm.privacy.mechanism import Mechanism, Population
from fedjax_llm.types import Unit


def seed_keys(experiment: Experiment) -> tuple[jax.Array, jax.Array]:
    """The keys of fresh adapters, and of what is random in a run's rounds but no secret."""
    init_key, run_key = jax.random.split(jax.random.key(experiment.seed))
    return init_key, run_key


def population_of(experiment: Experiment, sites: Sequence[SplitSite]) -> Population:
    """Whom an experiment's mechanism protects.

    Units are counted over training records, whether or not they leave tokens behind.

    Args:
      experiment: its setting decides whether the sites or one holder of everything is meant.
      sites: split into training, validation and test records.
    """
    unit = experiment.privacy.unit
    units = {site.name: _units(site, unit) for site in sites}
    shared = _shared(units) if unit == "patient" else ()
    if experiment.setting == "centralised":
        # Records of two sites are two; a patient of two sites is one.
        together = {(site, name) if name[0] == "record" else name for site, own in units.items() for name in own}
        return Population(("all",), (len(together),), (experiment.federation.rounds,), (1,))
    rounds, cohort = experiment.federation.rounds, experiment.federation.cohort
    fixed = None if experiment.privacy.draws_cohorts or cohort is None else cohort
    if fixed is not None and experiment.federation.availability is not None and experiment.setting == "federated":
        # Whoever is selected may send something, and is charged for it, whether or not the server uses it.
        fixed = selected_size(fixed, len(units), experiment.federation.availability)
    present = attendance(seed_keys(experiment)[1], rounds, len(units), fixed)
    return Population(
        sites=tuple(units),
        units=tuple(len(own) for own in units.values()),
        participations=tuple(int(count) for count in present.sum(axis=0)),
        min_separation=tuple(_separation(column, rounds) for column in present.T),
        shared=shared,
    )


def depends_on_values(experiment: Experiment) -> bool:
    """Whether the noise depends on how many numbers a message holds, which is known when the model is."""
    return getattr(experiment.privacy.mechanism, "distributed", None) is not None


def selected(experiment: Experiment, sites: int) -> int:
    """How many sites a round selects."""
    federation = experiment.federation
    cohort = sites if federation.cohort is None else federation.cohort
    return cohort if federation.availability is None else selected_size(cohort, sites, federation.availability)


def protection(
    experiment: Experiment,
    sites: Sequence[SplitSite],
    progress: Callable[[int, int], Any] | None = None,
    values: int = 0,
) -> tuple[Mechanism, Population] | None:
    """The mechanism of an experiment with its noise, and whom it protects; ``None`` without differential privacy.

    Args:
      experiment: what to do.
      sites: split into training, validation and test records.
      progress: called with (done, total) while noise is calibrated.
      values: how many numbers a message holds, where :func:`depends_on_values`.

    Raises:
      UserError: the mechanism cannot protect this, or no noise meets the target.
    """
    if experiment.privacy.mechanism is None or experiment.setting == "base":
        return None
    population = population_of(experiment, sites)
    regime = regime_of(experiment)
    if experiment.setting == "centralised":  # the one client does the steps of the whole cohort
        regime = regime._replace(local_steps=regime.local_steps * (experiment.federation.cohort or len(sites)))
    if experiment.secured is not None:
        terms = experiment.secured.make(selected(experiment, len(sites)))
        regime = regime._replace(values=values, survivors=terms.survivors)
    mechanism = guarantee.build(experiment.privacy, regime, population, progress)
    assert mechanism is not None
    return mechanism, population


def _units(site: SplitSite, unit: Unit) -> set[tuple[str, str]]:
    """The privacy units that a site trains on."""
    return {unit_name(record.id, record.owner, unit) for record in site.train}


def _shared(units: dict[str, set[tuple[str, str]]]) -> tuple[tuple[str, ...], ...]:
    """Every set of two sites or more that an owner belongs to."""
    places: dict[tuple[str, str], list[str]] = {}
    for site, own in units.items():
        for name in own:
            if name[0] == "owner":
                places.setdefault(name, []).append(site)
    return tuple(sorted({tuple(found) for found in places.values() if len(found) > 1}))


def _separation(present: np.ndarray, rounds: int) -> int:
    """The least distance of two rounds in which a site is present; all rounds where there are no two."""
    numbers = np.flatnonzero(present)
    return int(np.diff(numbers).min()) if len(numbers) > 1 else rounds
