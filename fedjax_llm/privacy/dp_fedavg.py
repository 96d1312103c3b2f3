"""DP-FedAvg: every site's update is clipped, and noise is added once to the sum over a secret cohort.

McMahan et al. 2018 (arXiv 1710.06963), with the fixed denominator; with clipping at a private quantile, Andrew et al.
2021 (arXiv 1905.03871). The unit is a whole site, so it serves many sites: with a few, the noise that protects one of
them drowns the rest.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import calibration, participation, refusals, shares
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.correlated import Correlation
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import EVERY_SITE, AdaptiveClip, Budget, Mechanism, Population, Regime

_COUNT_NOISE_SHARE = 1 / 20
"""The noise on the count of unclipped updates, over the cohort, that Andrew et al. recommend."""


@dataclass(frozen=True)
class DpFedAvg:
    """Noise on the sum of the sites' clipped updates; for the unit ``site``.

    Attributes:
      clip_norm: S, the bound on one site's update, over all adapters together; with ``adaptive`` in the first round.
      noise_multiplier: z of what a round releases altogether; ``None``: calibrated to ``privacy.target_epsilon``.
      scope: of clipping: ``flat``, or ``layers``.
      adaptive: the clip norm follows a quantile of the updates' norms; ``None``: it is fixed.
      examples_cap: with ``federation.weighting="examples"``, a site of n examples weighs min(n, cap) / cap.
      cohort_is_secret: whether nobody that the guarantee holds against learns who takes part in a round. Only then does
        sampling a cohort count.
      noise: how noise is correlated over the rounds (``privacy/correlated.py``); ``None``: independent. With it,
        cohorts are those of the experiment's (public) seed, and do not count.
      distributed: ``Skellam()`` or ``DDGauss()``: every site adds a share of the noise, in integers, under secure
        aggregation; ``None``: noise is added once. With it, the noise multiplier is that of the shares which are sure
        to be in a sum and secret, over what one site changes in its integers; and cohorts are those of the experiment's
        seed, and do not count, as the server knows them.
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    scope: Literal["flat", "layers"] = "flat"
    adaptive: AdaptiveClip | None = None
    examples_cap: int | None = None
    cohort_is_secret: bool = True
    noise: Any = None
    distributed: Any = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        refusals.parameters("DpFedAvg", Clip(self.clip_norm, self.scope), self.noise_multiplier)
        if self.examples_cap is not None and self.examples_cap < 1:
            raise UserError(f"DpFedAvg.examples_cap is {self.examples_cap}; it must be at least 1")
        if self.adaptive is not None:
            _check_adaptive(self.adaptive)
        if self.adaptive is not None and self.noise is not None:
            raise UserError(
                "DpFedAvg has adaptive clipping and correlated noise: noise that is spread over rounds has one "
                "sensitivity for all of them, which a clip norm that changes does not keep. Leave one out"
            )

    def check(self, regime: Regime) -> None:
        """Refuses an experiment that it cannot protect.

        Raises:
          UserError: with the reason and the way out.
        """
        refusals.basics("DpFedAvg", regime, ("site",), ("federated",))
        refusals.sum_view("DpFedAvg", regime)
        refusals.distributed("DpFedAvg", regime, self.distributed, self.noise, self.adaptive)
        refusals.availability("DpFedAvg", regime, self.noise is not None)
        if regime.over_selection != 1:
            raise UserError(
                f"federation.availability.over_selection is {regime.over_selection}, but DpFedAvg draws every site by "
                "itself, and which of them are the fastest depends on the others. Set it to 1"
            )
        if regime.weighting == "examples" and self.examples_cap is None:
            raise UserError(
                "federation.weighting is 'examples': a weight multiplies a site's clipped update, so that the noise "
                "would have to cover the largest weight that any site could have. Set federation.weighting to "
                "'uniform', or bound the weights with DpFedAvg(examples_cap=...)"
            )
        if regime.weighting == "uniform" and self.examples_cap is not None:
            raise UserError(
                f"DpFedAvg.examples_cap is {self.examples_cap}, but federation.weighting is 'uniform', which has no "
                "weights to bound. Leave examples_cap out, or set federation.weighting to 'examples'"
            )

    def make(self, regime: Regime, population: Population, budget: Budget) -> Mechanism:
        """The mechanism for these sites."""
        refusals.noise_source("DpFedAvg", self.noise_multiplier, budget.epsilon)
        if self.distributed is not None:
            return self._distributed(regime, population, budget)
        sites = len(population.sites)
        cohort = min(regime.cohort or sites, sites)
        probability = cohort / sites
        if probability < 1 and regime.secure and self.noise is None:
            raise UserError(
                f"federation.cohort is {cohort} of {sites} sites under secure aggregation, which tells every site of a "
                "round, and the server, who else is in it: no cohort is secret, and DpFedAvg counts on that. Let every "
                "site take part (federation.cohort=None), or share out the noise, which does not count on it "
                "(DpFedAvg(distributed=Skellam()))"
            )
        if probability < 1 and not self.cohort_is_secret and self.noise is None:
            raise UserError(
                f"federation.cohort is {cohort} of {sites} sites and DpFedAvg.cohort_is_secret is False: sampling "
                "sites hides a site only from those who do not see the cohort. Let every site take part "
                "(federation.cohort=None), add noise at the sites (LocalDp), or keep cohorts secret from everyone that "
                "the guarantee shall hold against (cohort_is_secret=True)"
            )
        run, correlation = Event("gaussian", 1.0, probability, regime.rounds), None
        if self.noise is not None:
            correlation = _correlation(self.noise, regime, population)
            run = correlation.event(1.0, 1.0, regime.rounds)
        z = self.noise_multiplier
        if z is None:
            assert budget.epsilon is not None
            (z,) = calibration.noise_multipliers(
                [run], budget.epsilon, budget.delta, budget.accountant, budget.progress
            )
        on_updates, adaptive = z, self.adaptive
        if adaptive is not None:
            adaptive = replace(adaptive, count_noise=count_noise(adaptive, cohort))
            on_updates = update_noise(z, adaptive, cohort)
        return Mechanism(
            name="DpFedAvg",
            unit=regime.unit,
            clip=Clip(self.clip_norm, self.scope),
            clipped="deltas",
            noised="sum",
            stddev=np.full(sites, on_updates * (correlation.sensitivity if correlation else 1.0)),
            weight=float(cohort),
            denominators=np.ones(sites),
            sampling=None,
            examples_per_unit=1,
            cohort_probability=None if self.noise is not None else probability,
            site_weights=None if self.examples_cap is None else partial(_weight, cap=self.examples_cap),
            correlated=correlation,
            adaptive=adaptive,
            events={EVERY_SITE: replace(run, noise_multiplier=float(z), count=1)},
            adversary="everyone who sees the noised sums alone: the sites, and whoever gets the adapters",
            assumptions=_assumptions(regime.secure, secret=probability < 1 and self.noise is None),
        )

    def _distributed(self, regime: Regime, population: Population, budget: Budget) -> Mechanism:
        """With shares of the noise from every site. Each is charged for the rounds that it takes part in."""
        sites = len(population.sites)
        cohort = min(regime.cohort or sites, sites)
        counted = [Event("gaussian", 1.0, 1.0, max(1, rounds)) for rounds in population.participations]
        messages = shares.messages_of(regime, self.clip_norm, float(cohort), cohort, conditional=True)

        def multiplier(template: Event) -> float:
            if self.noise_multiplier is not None:
                return self.noise_multiplier
            assert budget.epsilon is not None
            runs = [[run] for run in shares.runs_with(counted, template)]
            return calibration.noise_multiplier_of_all(
                runs, budget.epsilon, budget.delta, budget.accountant, budget.progress
            )

        shared, event = shares.fit(self.distributed, messages, multiplier)
        return Mechanism(
            name="DpFedAvg",
            unit=regime.unit,
            clip=Clip(self.clip_norm, self.scope),
            clipped="deltas",
            noised="shares",
            stddev=np.full(sites, event.noise_multiplier * shares.central(shared)),
            weight=float(cohort),
            denominators=np.ones(sites),
            sampling=None,
            examples_per_unit=1,
            cohort_probability=None,
            site_weights=None if self.examples_cap is None else partial(_weight, cap=self.examples_cap),
            correlated=None,
            adaptive=None,
            events=dict.fromkeys(population.sites, event),
            adversary=shares.adversary(regime),
            assumptions=(
                *shares.assumptions(regime, messages),
                "the number of sites is public",
                participation.INTEGERS,
            ),
            shares=shared,
        )


def count_noise(adaptive: AdaptiveClip, cohort: int) -> float:
    """Standard deviation of the noise on the count of unclipped updates: as given, or a twentieth of the cohort.

    Args:
      adaptive: see :func:`update_noise`.
      cohort: sites a round, on average.
    """
    return cohort * _COUNT_NOISE_SHARE if adaptive.count_noise is None else adaptive.count_noise


def update_noise(noise_multiplier: float, adaptive: AdaptiveClip, cohort: int) -> float:
    """The noise multiplier of the updates where a part of a round's budget goes into finding the clip norm.

    A site moves the sum of updates by 1 clip norm and the count of unclipped updates, shifted by a half, by 1/2. Both
    together are one Gaussian release of multiplier z if z^-2 = z_updates^-2 + (2 sigma_b)^-2 (Andrew et al. 2021,
    arXiv 1905.03871, theorem 1).

    Args:
      noise_multiplier: z, of both releases together.
      adaptive: sigma_b is its :func:`count_noise`.
      cohort: sites a round, on average.

    Raises:
      UserError: the cohort is too small for so much noise.
    """
    sigma_b, largest = count_noise(adaptive, cohort), cohort * _COUNT_NOISE_SHARE
    if sigma_b > largest:
        raise UserError(
            f"adaptive clipping counts unclipped updates with noise of standard deviation {sigma_b:g} "
            f"among {cohort} sites a round, where at most a twentieth of the cohort, {largest:g}, leaves a usable "
            f"count; and that allows noise multipliers below {2 * largest:g} only. Leave count_noise out, set "
            "clip_norm by hand (adaptive=None), or let more sites take part in a round"
        )
    if noise_multiplier >= 2 * sigma_b:
        out = "let more sites take part in a round, or set clip_norm by hand (adaptive=None)"
        if sigma_b < largest:
            out = f"leave count_noise out ({largest:g}, which allows multipliers below {2 * largest:g}), {out}"
        raise UserError(
            f"the noise multiplier is {noise_multiplier:.4g}, but adaptive clipping with count_noise "
            f"{sigma_b:g} among {cohort} sites a round alone has spent more than that by itself: it allows noise "
            f"multipliers below {2 * sigma_b:g}. Ways out: {out}"
        )
    return float((noise_multiplier**-2 - (2 * sigma_b) ** -2) ** -0.5)


def _correlation(noise: Any, regime: Regime, population: Population) -> Correlation:
    """Over the rounds, for sites that take part in them as the public seed says."""
    schema = (min(population.min_separation), max(1, *population.participations))
    correlation = participation.correlate(noise, population, regime.rounds, *schema)
    if correlation.cyclic > 1:
        raise UserError(
            "the noise of DpFedAvg is amplified: that counts on groups of sites that take turns in secret samples, but "
            "with correlated noise cohorts are those of the experiment's seed. Set the noise's amplified to False"
        )
    return correlation


def _check_adaptive(adaptive: AdaptiveClip) -> None:
    """Refuses impossible values."""
    if not 0 < adaptive.quantile < 1:
        raise UserError(f"AdaptiveClip.quantile is {adaptive.quantile}; it is a share of the updates, in (0, 1)")
    for name in ("learning_rate", "count_noise"):
        value = getattr(adaptive, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"AdaptiveClip.{name} is {value}; it must be positive and finite")


def _weight(examples: int, cap: int) -> float:
    """What the update of a site weighs, in [0, 1]."""
    return min(examples, cap) / cap


def _assumptions(secure: bool, secret: bool) -> tuple[str, ...]:
    """What the guarantee rests on."""
    cohort = "who takes part in which round stays secret (the run's own files tell it to the server)"
    return (
        participation.summed("updates", secure),
        *((cohort,) if secret else ()),
        "the number of sites is public",
        participation.GENERATOR,
    )
