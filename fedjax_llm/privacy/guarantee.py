"""What a run promises: the configuration of privacy, the mechanism made from it, and what was spent of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting, calibration, participation, refusals
from fedjax_llm.privacy.accounting import Accountant
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import EVERY_SITE, Budget, Mechanism, Population, Regime
from fedjax_llm.privacy.noise import Randomness
from fedjax_llm.types import Unit


@dataclass(frozen=True)
class Privacy:
    """The guarantee that a run shall give.

    Attributes:
      mechanism: how (``DpSgd``, ``DpFedSgd``, ``DpFedAvg``, ``LocalDp``); ``None``: no differential privacy.
      unit: whose presence is hidden: one ``record``, one ``patient`` with all records, or one ``site``.
      target_epsilon: noise is calibrated so that the whole run spends this much, where the mechanism has no noise
        multiplier of its own.
      budget_epsilon: a round that would spend more than this does not run; ``None``: ``target_epsilon``, if given.
      delta: of the guarantee; well below one over the number of units.
      accountant: ``pld``: numerical and tight; or ``rdp``.
      randomness: where noise and samples come from: ``reproducible``: the seed, which whoever knows it can subtract;
        ``secret``: the operating system.
      real_data: whether real people are in the data; with reproducible randomness the guarantee then carries a warning.
        Say no for text that is public anyway.
    """

    mechanism: Any = None
    unit: Unit = "record"
    target_epsilon: float | None = None
    budget_epsilon: float | None = None
    delta: float = 1e-5
    accountant: Accountant = "pld"
    randomness: Randomness = "reproducible"
    real_data: bool = True

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        refusals.one_of("privacy.unit", self.unit, Unit)
        refusals.one_of("privacy.accountant", self.accountant, Accountant)
        refusals.one_of("privacy.randomness", self.randomness, Randomness)
        for name in ("target_epsilon", "budget_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"privacy.{name} is {value}; it must be positive and finite")
        if not 0 < self.delta < 1:
            raise UserError(f"privacy.delta is {self.delta}; it must be between 0 and 1")

    @property
    def budget(self) -> float | None:
        """What no round may exceed."""
        return self.target_epsilon if self.budget_epsilon is None else self.budget_epsilon

    @property
    def draws_cohorts(self) -> bool:
        """Whether the mechanism draws each round's cohort by itself: then a site may take part in every round."""
        mechanism = self.mechanism
        return isinstance(mechanism, DpFedAvg) and mechanism.noise is None and mechanism.distributed is None

    def check(self, regime: Regime) -> None:
        """Refuses an experiment that the mechanism cannot protect, or noise that is not decided.

        Raises:
          UserError: with the reason and the way out.
        """
        if self.mechanism is None:
            for name in ("target_epsilon", "budget_epsilon"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"privacy.{name} is {getattr(self, name)}, but privacy.mechanism is None, which protects "
                        f"nothing. Choose a mechanism (such as DpSgd()), or set privacy.{name} to None too"
                    )
            return
        name, own = type(self.mechanism).__name__, getattr(self.mechanism, "noise_multiplier", None)
        refusals.noise_source(name, own, self.target_epsilon)
        self.mechanism.check(regime)


def build(
    privacy: Privacy, regime: Regime, population: Population, progress: Callable[[int, int], Any] | None = None
) -> Mechanism | None:
    """The mechanism of a run, with its noise; ``None`` where there is no differential privacy.

    Args:
      privacy: what is asked for.
      regime: the experiment.
      population: who is protected.
      progress: called with (done, total) while noise is calibrated.

    Raises:
      UserError: the experiment cannot be protected, delta is too large, or no noise meets the target.
    """
    privacy.check(regime)
    if privacy.mechanism is None:
        return None
    inside = dict(zip(population.sites, population.units, strict=True))
    calibration.check_delta(privacy.delta, {EVERY_SITE: len(inside)} if privacy.unit == "site" else inside)
    budget = Budget(privacy.target_epsilon, privacy.delta, privacy.accountant, progress)
    return privacy.mechanism.make(regime, population, budget)


def spent(
    mechanism: Mechanism,
    charged: Mapping[str, Sequence[Event]],
    delta: float,
    accountant: Accountant = "pld",
    shared: Sequence[Sequence[str]] = (),
) -> dict[str, float]:
    """Epsilon by account, from what was released.

    Args:
      mechanism: whose events were released.
      charged: what was released, under the names that ``mechanism.releases`` charges.
      delta: of the guarantee.
      accountant: ``pld`` or ``rdp``.
      shared: the population's sets of sites that share an owner.

    Returns:
      See :func:`epsilons`.
    """
    return epsilons(participation.accounts(tuple(mechanism.events), shared), charged, delta, accountant)


def epsilons(
    accounts: Mapping[str, Sequence[str]],
    charged: Mapping[str, Sequence[Event]],
    delta: float,
    accountant: Accountant = "pld",
) -> dict[str, float]:
    """Epsilon by account; 0 where nothing was released.

    Args:
      accounts: account -> the names that it is charged for (``participation.accounts``).
      charged: what was released, by name.
      delta: of the guarantee.
      accountant: ``pld`` or ``rdp``.
    """
    return {
        account: accounting.epsilon([event for name in names for event in charged.get(name, ())], delta, accountant)
        for account, names in accounts.items()
    }
