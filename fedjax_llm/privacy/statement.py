"""What may be said about a run's privacy: never an epsilon without its unit, adjacency, delta and limits."""

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from fedjax_llm.privacy import participation
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import EVERY_SITE, Mechanism, Population, accounted_by, adjacency
from fedjax_llm.types import Unit

NOT_COVERED = (
    "losses, update norms, cohorts, and counts of sampled examples and tokens by site and round, in the run's own "
    "files and report: computed without noise, for those who may see the data",
    "the run's checkpoints: with correlated noise they hold what subtracts it, and optimisers of sites may be in them",
    "hyper-parameters chosen by comparing runs on the same data; other runs on it, whose epsilons add up",
    "how many units each site holds: taken to be public",
)
"""What no mechanism covers."""
_HELD_OUT = (
    "held-out figures and generations: computed from private records without noise; those records trained nothing"
)
_SELECTION = "the choice of the round by validation: it depends on private held-out records without noise"

_UP = Context(prec=400, rounding=ROUND_CEILING)  # any finite float has fewer digits before the point

_REPRODUCIBLE = (
    "real data with reproducible randomness: whoever knows the seed can subtract the noise, so this run protects "
    "nobody from them. Set privacy.randomness to 'secret' for anything that leaves the site"
)


def not_covered(*, held_out: bool, selects_best: bool) -> tuple[str, ...]:
    """What the guarantee of a run does not cover, as sentences.

    Args:
      held_out: whether anything is measured on held-out records.
      selects_best: whether the result is the round with the best validation.
    """
    return ((_HELD_OUT,) if held_out else ()) + ((_SELECTION,) if selects_best else ()) + NOT_COVERED


def line(unit: Unit, delta: float, epsilons: Mapping[str, float], shared: int = 0) -> str:
    """One sentence: the largest epsilon, rounded up, with all that gives it a meaning.

    Args:
      unit: of privacy.
      delta: of the guarantee.
      epsilons: by account.
      shared: how many of the accounts are of units that several sites hold.
    """
    worst = max(epsilons.values(), default=0.0)
    return f"{at_most(worst)} at delta {delta:g} for one {unit} ({adjacency(unit)}), {_scope(epsilons, shared)}"


def at_most(epsilon: float) -> str:
    """``epsilon <= 7.98``, never rounded down; ``no finite epsilon`` for none."""
    return f"epsilon <= {bound(epsilon)}" if math.isfinite(epsilon) else "no finite epsilon"


def bound(epsilon: float | None) -> str:
    """An epsilon with two decimals, rounded up because it is an upper bound; ``unbounded`` for none.

    Examples:
      >>> bound(3.2101), bound(8.0), bound(321_456.0), bound(None)
      ('3.22', '8.00', '321,456.00', 'unbounded')
    """
    if epsilon is None or not math.isfinite(epsilon):
        return "unbounded"
    # From the shortest decimal form: 1.1 as a binary fraction lies above 1.1.
    return f"{Decimal(repr(float(epsilon))).quantize(Decimal('0.01'), context=_UP):,f}"


def statement(
    privacy: Privacy,
    mechanism: Mechanism,
    population: Population,
    charged: Mapping[str, Sequence[Event]],
    epsilons: Mapping[str, float],
    limits: Sequence[str],
    stopped: str | None = None,
) -> dict[str, Any]:
    """What ``summary.json`` holds under ``privacy``.

    Args:
      privacy: what was asked for.
      mechanism: what the rounds did.
      population: who is protected.
      charged: what was released, by the names that it is charged to.
      epsilons: by account, from ``guarantee.spent``.
      limits: from :func:`not_covered`.
      stopped: why the run ended before its last round, if the budget did that.
    """
    accounts = participation.accounts(tuple(mechanism.events), population.shared)
    return {
        "mechanism": mechanism.name,
        "unit": mechanism.unit,
        "adjacency": adjacency(mechanism.unit),
        "delta": privacy.delta,
        "epsilon": max(epsilons.values(), default=0.0),
        "accounts": {
            name: {"epsilon": epsilons[name], **_account(mechanism, population, charged, name, names)}
            for name, names in accounts.items()
        },
        "clip_norm": mechanism.clip.norm,
        "scope": mechanism.clip.scope,
        "adversary": mechanism.adversary,
        "assumptions": list(mechanism.assumptions),
        "not_covered": list(limits),
        "randomness": privacy.randomness,
        "warning": warning(privacy),
        "budget": privacy.budget,
        "target": privacy.target_epsilon,
        "accountant": accounted_by(mechanism, privacy.accountant),
        "stopped": stopped,
        "line": line(mechanism.unit, privacy.delta, epsilons, sum(len(names) > 1 for names in accounts.values())),
    }


def warning(privacy: Privacy) -> str | None:
    """What goes with a claim about real data whose noise can be drawn again."""
    return _REPRODUCIBLE if privacy.real_data and privacy.randomness == "reproducible" else None


def _account(
    mechanism: Mechanism,
    population: Population,
    charged: Mapping[str, Sequence[Event]],
    account: str,
    names: Sequence[str],
) -> dict[str, Any]:
    """The least noise, the likeliest sampling, all releases and the units (``None``: not counted) of an account."""
    events = [mechanism.events[name] for name in names]
    units = dict(zip(population.sites, population.units, strict=True))
    return {
        "noise_multiplier": min(event.noise_multiplier for event in events),
        "sampling_probability": max(event.sampling_probability for event in events),
        "releases": sum(event.count for name in names for event in charged.get(name, ())),
        "units": len(population.sites) if account == EVERY_SITE else units.get(account),
    }


def _scope(epsilons: Mapping[str, float], shared: int) -> str:
    """Over which accounts the epsilon is the worst."""
    if EVERY_SITE in epsilons:
        return "the same for every site"
    if len(epsilons) == 1:
        return f"at {next(iter(epsilons))!r}, the only site"
    groups = f" and {shared} {'set' if shared == 1 else 'sets'} of sites that share patients" if shared else ""
    return f"the worst of {len(epsilons) - shared} sites{groups}"
