"""What a configuration will guarantee, before anything is trained and without its model."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.config import Experiment
from fedjax_llm.data.splits import SplitSite
from fedjax_llm.experiment.charging import exceeds
from fedjax_llm.experiment.planning import cohort_size
from fedjax_llm.experiment.prepare import load_dataset, split_sites, trained_values
from fedjax_llm.experiment.protection import depends_on_values, population_of, protection
from fedjax_llm.models.loading import load
from fedjax_llm.privacy import accounting, calibration, guarantee, statement
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.events import LATTICE, Event
from fedjax_llm.privacy.mechanism import EVERY_SITE, Mechanism, Population, adjacency
from fedjax_llm.privacy.participation import accounts
from fedjax_llm.runs.progress import RunProgress, privacy_table, settings_table
from fedjax_llm.runs.recount import in_words

NOISE_FACTORS = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)
"""Of the configuration's noise, in the table."""
ROUND_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the configuration's rounds, in the table."""
MOST_ROUNDS = 1_000_000
"""Where to stop looking for what fits a budget."""
_MOST_EVENTS = 12


@dataclass(frozen=True)
class Grid:
    """Epsilon of one account over noise and rounds.

    Attributes:
      account: the one with the largest epsilon under the configuration itself.
      rounds: of the columns; the configuration's own alone where noise is correlated without amplification: it is made
        for one number of rounds.
      noise: noise multipliers of the rows.
      epsilon: ``[noise][rounds]``.
    """

    account: str
    rounds: tuple[int, ...]
    noise: tuple[float, ...]
    epsilon: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Fit:
    """What fits the budget in one account, with the configuration's noise.

    Attributes:
      rounds: in how many rounds what the account is charged for can be released, sampled as configured; at most
        ``MOST_ROUNDS``, 0 where not even one fits.
      probability: the largest sampling probability that fits the configuration's rounds, a multiple of 1e-6 rounded
        down; 0 where none fits; ``None`` where sampling does not count.
    """

    rounds: int
    probability: float | None


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a private configuration will guarantee.

    Attributes:
      mechanism: with its noise.
      planned: what the whole run will release, by the names that it is charged to.
      statement: as a run's ``summary.json`` will hold it, if all rounds are run.
      grid: epsilon over noise and rounds.
      fit: what fits the budget in the grid's account; ``None``: see :func:`fit`.
    """

    mechanism: Mechanism
    planned: Mapping[str, tuple[Event, ...]]
    statement: Mapping[str, Any]
    grid: Grid
    fit: Fit | None


def forecast(experiment: Experiment, progress: RunProgress) -> Forecast | None:
    """Reads the text, calibrates noise, and accounts for all rounds; ``None`` without differential privacy.

    Raises:
      UserError: the mechanism cannot protect this experiment, no noise meets its target, or rounds are of more sites
        than there are.
    """
    if experiment.privacy.mechanism is None or experiment.setting == "base":
        return None
    with progress.phase("Reading the text"):
        sites = split_sites(experiment, load_dataset(experiment))
    cohort_size(experiment, len(sites))
    values = 0
    if depends_on_values(experiment):
        with progress.phase(f"Loading the model {experiment.model.name}"):
            values = trained_values(experiment, load(experiment.model.name, experiment.model.dtype))
    with progress.phase("Calibrating noise", unit="tries") as advance:
        found = protection(experiment, sites, lambda done, total: advance(1), values)
    assert found is not None
    mechanism, population = found
    planned = releases_planned(mechanism, population, experiment.federation.rounds)
    with progress.phase("Accounting"):
        stated = promised(experiment, mechanism, population)
    accounted = stated["accounts"]
    account = max(accounted, key=lambda name: accounted[name]["epsilon"])
    figures = len(NOISE_FACTORS) * len(_columns(experiment, mechanism))
    with progress.phase("Tabulating", figures, "figures") as advance:
        grid = grid_around(experiment, sites, mechanism, account, lambda: advance(1))
    fitting = None
    if fits_are_found(experiment, mechanism, account):
        with progress.phase("Calibrating rounds and sampling", 2, "searches") as advance:
            fitting = fit(experiment, mechanism, account, planned[account], lambda: advance(1))
    return Forecast(mechanism, planned, stated, grid, fitting)


def promised(experiment: Experiment, mechanism: Mechanism, population: Population) -> dict[str, Any]:
    """What a run's ``summary.json`` will hold under ``privacy``, if all its rounds are run."""
    privacy, fractions = experiment.privacy, experiment.data.fractions
    planned = releases_planned(mechanism, population, experiment.federation.rounds)
    epsilons = guarantee.spent(mechanism, planned, privacy.delta, privacy.accountant, population.shared)
    limits = statement.not_covered(
        held_out=fractions.test > 0 or fractions.validation > 0, selects_best=experiment.output.select == "best"
    )
    stop = _stop(experiment, epsilons)
    return statement.statement(privacy, mechanism, population, planned, epsilons, limits, stop)


def releases_planned(mechanism: Mechanism, population: Population, rounds: int) -> dict[str, tuple[Event, ...]]:
    """What ``rounds`` rounds release, by the names that the mechanism charges.

    Args:
      mechanism: whose events are those of one round.
      population: with the rounds that each site takes part in.
      rounds: of the run, all of which a mechanism that draws its cohorts charges.
    """
    taking_part = dict(zip(population.sites, population.participations, strict=True)) | {EVERY_SITE: rounds}
    return {
        name: (dataclasses.replace(event, count=event.count * taking_part[name]),) if taking_part[name] else ()
        for name, event in mechanism.events.items()
    }


def grid_around(
    experiment: Experiment,
    sites: tuple[SplitSite, ...],
    mechanism: Mechanism,
    account: str,
    done: Callable[[], None] = lambda: None,
) -> Grid:
    """Epsilon of an account for less and more noise, and for fewer and more rounds, with all else as it is.

    Args:
      experiment: the configuration.
      sites: split into training, validation and test records.
      mechanism: with the configuration's noise.
      account: whose epsilon.
      done: called after each figure.
    """
    privacy, federation = experiment.privacy, experiment.federation
    names = accounts(tuple(mechanism.events), population_of(experiment, sites).shared)[account]
    rounds = _columns(experiment, mechanism)
    planned = []
    for count in rounds:
        longer = dataclasses.replace(experiment, federation=dataclasses.replace(federation, rounds=count))
        released = releases_planned(mechanism, population_of(longer, sites), count)
        planned.append([event for name in names for event in released[name]])

    def epsilon(events: list[Event], factor: float) -> float:
        scaled = [dataclasses.replace(event, noise_multiplier=event.noise_multiplier * factor) for event in events]
        found = accounting.epsilon(scaled, privacy.delta, privacy.accountant)
        done()
        return found

    least = min(mechanism.events[name].noise_multiplier for name in names)
    return Grid(
        account=account,
        rounds=rounds,
        noise=tuple(least * factor for factor in NOISE_FACTORS),
        epsilon=tuple(tuple(epsilon(events, factor) for events in planned) for factor in NOISE_FACTORS),
    )


def fits_are_found(experiment: Experiment, mechanism: Mechanism, account: str) -> bool:
    """Whether there is a budget, and one kind of releases with independent noise that can be fitted to it.

    Args:
      experiment: the configuration.
      mechanism: with its noise.
      account: of a site, of all, or of several sites that share an owner, which has several kinds of releases.
    """
    event = mechanism.events.get(account)
    independent = event is not None and event.kind in ("gaussian", *LATTICE)
    return experiment.privacy.budget is not None and independent


def fit(
    experiment: Experiment,
    mechanism: Mechanism,
    account: str,
    planned: tuple[Event, ...],
    done: Callable[[], None] = lambda: None,
) -> Fit:
    """How many rounds, or how likely sampling, fit the budget; all else as it is.

    Args:
      experiment: with a budget.
      mechanism: with the configuration's noise.
      account: one for which :func:`fits_are_found`.
      planned: what the configuration's rounds release about it.
      done: called after each of the two searches.
    """
    privacy = experiment.privacy
    assert privacy.budget is not None
    target = (privacy.budget, privacy.delta, privacy.accountant)
    rounds = calibration.rounds_within(mechanism.events[account], *target, MOST_ROUNDS)
    done()
    config = privacy.mechanism
    seen = isinstance(config, DpFedAvg) and not config.cohort_is_secret
    sampled = mechanism.sampling is not None or (mechanism.cohort_probability is not None and not seen)
    probability = calibration.sampling_probability_within(planned[0], *target) if sampled else None
    done()
    return Fit(rounds, probability)


def _columns(experiment: Experiment, mechanism: Mechanism) -> tuple[int, ...]:
    """Of the table: rounds around the configuration's, or its own alone."""
    rounds = experiment.federation.rounds
    if any(event.kind == "matrix" for event in mechanism.events.values()):
        return (rounds,)
    return tuple(sorted({max(1, round(rounds * factor)) for factor in ROUND_FACTORS}))


def render(console: Console, experiment: Experiment, found: Forecast | None) -> None:
    """Prints a forecast: what is done, what that guarantees to whom and what not, and what other noise would do."""
    if found is None:
        console.print(privacy_table(None), soft_wrap=True)
        return
    console.print(settings_table(_settings(experiment, found), title="What the run will do"))
    console.print(privacy_table(found.statement), soft_wrap=True)
    console.print(Text("Assumed:"))
    for sentence in found.statement["assumptions"]:
        console.print(Text(f"- {sentence}"), soft_wrap=True)
    console.print(_grid_table(found, experiment.federation.rounds))
    if found.fit is not None:
        console.print(_fit_table(experiment, found, found.fit))
    elif experiment.privacy.budget is not None:
        console.print(
            Text("Not computed: the rounds and the sampling that fit the budget (correlated noise, or several sites).")
        )


def _fit_table(experiment: Experiment, found: Forecast, fitting: Fit) -> Table:
    """What fits the budget, in words."""
    stated, account = found.statement, found.grid.account
    figures, unit, step = stated["accounts"][account], stated["unit"], "round" if account == EVERY_SITE else "step"
    title = f"What fits epsilon {stated['budget']:g} at delta {stated['delta']:g} ({stated['adjacency']}) of {account}"
    rounds = f"{fitting.rounds:,}" + (" or more" if fitting.rounds == MOST_ROUNDS else "")
    planned = figures["releases"] // found.mechanism.events[account].count
    if planned < experiment.federation.rounds:
        rounds += f" that {account} takes part in (of the {experiment.federation.rounds:,} configured: {planned:,})"
    rows = [("rounds, at this noise and sampling", rounds if fitting.rounds else "none: a single round spends more")]
    if fitting.probability is not None:
        expected = math.floor(fitting.probability * figures["units"] * 100) / 100
        text = f"{fitting.probability:g}, which is {expected:,g} {unit}s a {step} on average"
        named = "sampling probability, at this noise and these rounds"
        rows.append((named, text if fitting.probability else "none: even one in a million spends more"))
    return settings_table(rows, title=title)


def _settings(experiment: Experiment, found: Forecast) -> list[tuple[str, Any]]:
    """The guarantee's terms, and the mechanism in words."""
    privacy, mechanism = experiment.privacy, found.mechanism
    clipped = {"gradients": f"every {mechanism.unit}'s gradient in each step", "deltas": "every site's update"}
    noised = {
        "steps": "by each site, to the sum of each of its steps",
        "deltas": "by each site, to its update",
        "sum": "once a round, to the sum over the sites",
        "shares": "by each site, its share of it, as integers under the masks",
    }
    events = list(dict.fromkeys(in_words(event) for released in found.planned.values() for event in released))
    more = (
        [f"... and {len(events) - _MOST_EVENTS:,} more, at sites of other sizes"] if len(events) > _MOST_EVENTS else []
    )
    rows: list[tuple[str, Any]] = [
        ("unit of privacy", mechanism.unit),
        ("adjacency", found.statement["adjacency"]),
        ("delta", f"{privacy.delta:g}"),
        (
            "mechanism",
            f"{mechanism.name}, {found.statement['accountant'].upper()} accounting, {privacy.randomness} randomness",
        ),
        ("clipped", f"{clipped[mechanism.clipped]}, to {mechanism.clip.norm:g} ({mechanism.clip.scope})"),
        ("noise is added", noised[mechanism.noised]),
        ("released in all rounds", "\n".join([*events[:_MOST_EVENTS], *more])),
    ]
    if mechanism.cohort_probability is not None:
        rows.append(("a site is in a round", f"with probability {mechanism.cohort_probability:.4g}, in secret"))
    for name in ("target", "budget"):
        if found.statement[name] is not None:
            rows.append((f"{name} epsilon", f"{found.statement[name]:g}"))
    return rows


def _grid_table(found: Forecast, own: int) -> Table:
    """Epsilon over noise multipliers and rounds; the configuration's own rounds and noise are bold."""
    grid, stated = found.grid, found.statement
    whose = f"{grid.account}, which has the largest" if len(stated["accounts"]) > 1 else grid.account
    title = f"Epsilon at delta {stated['delta']:g} ({stated['adjacency']}) of {whose}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.min_width = len(title)
    table.add_column("noise multiplier")
    for count in grid.rounds:
        table.add_column(f"{count:,} round{'' if count == 1 else 's'}", justify="right")
    for factor, noise, row in zip(NOISE_FACTORS, grid.noise, grid.epsilon, strict=True):
        cells = [
            Text(statement.bound(epsilon), style="bold" if factor == 1 and count == own else "")
            for count, epsilon in zip(grid.rounds, row, strict=True)
        ]
        table.add_row(f"{noise:.4g}", *cells)
    return table


def _stop(experiment: Experiment, epsilons: Mapping[str, float]) -> str | None:
    """What the budget will do, if it does not suffice for all rounds."""
    needed = max(epsilons.values(), default=0.0)
    if not exceeds(experiment.privacy, needed):
        return None
    return (
        f"all {experiment.federation.rounds:,} rounds would spend {statement.at_most(needed)} at delta "
        f"{experiment.privacy.delta:g} ({adjacency(experiment.privacy.unit)}), more than the budget of "
        f"{experiment.privacy.budget:g}: the run will end before that"
    )
