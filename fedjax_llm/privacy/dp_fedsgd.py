"""DP-FedSGD: one step a round; sites send sums of clipped gradients, and noise is added once, to the sum over them.

The same step as DP-SGD on the pooled data (McMahan et al. 2018, arXiv 1710.06963, with records in place of users):
one noise for all sites instead of one for each, so that the sum over C sites holds sqrt(C) less of it. It needs
somebody who adds up and draws noise before anybody looks: a trusted server; or secure aggregation, under which every
site adds a share of the noise (``distributed``).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import participation, refusals, shares
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Budget, Mechanism, Population, Regime, Shares

_ADVERSARY = "everyone who sees the noised sums alone: the other sites, and whoever gets the adapters"


@dataclass(frozen=True)
class DpFedSgd:
    """Noise on the sum over the sites; for the units ``record`` and ``patient``.

    Attributes:
      clip_norm: C, the bound on one unit's gradient, over all adapters together.
      noise_multiplier: standard deviation of the noise on the sum over C; ``None``: calibrated so that the worst site
        meets ``privacy.target_epsilon``.
      scope: of clipping: ``flat``, or ``layers``.
      sampling_probability: with which a unit takes part in a round of its site; ``None``: at each site what makes
        ``training.batch_size`` units on average (all of them where the site has fewer).
      examples_per_unit: at most so many examples of a sampled unit make up its gradient.
      noise: how noise is correlated over the rounds (``privacy/correlated.py``); ``None``: independent. With it, the
        noise multiplier is that of the independent noise before it is mixed, over C times its sensitivity.
      distributed: ``Skellam()`` or ``DDGauss()``: every site adds a share of the noise, in integers, under secure
        aggregation; ``None``: noise is added once. With it, the noise multiplier is that of the shares which are sure
        to be in a sum and secret, over what one unit changes in its integers.
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    scope: Literal["flat", "layers"] = "flat"
    sampling_probability: float | None = None
    examples_per_unit: int = 1
    noise: Any = None
    distributed: Any = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        refusals.parameters("DpFedSgd", Clip(self.clip_norm, self.scope), self.noise_multiplier)
        refusals.sampling("DpFedSgd", self.sampling_probability, self.examples_per_unit)

    def check(self, regime: Regime) -> None:
        """Refuses an experiment that it cannot protect.

        Raises:
          UserError: with the reason and the way out.
        """
        refusals.basics("DpFedSgd", regime, refusals.GRADIENT_UNITS, ("federated",))
        refusals.gradients("DpFedSgd", regime)
        refusals.availability("DpFedSgd", regime, self.noise is not None)
        refusals.sum_view("DpFedSgd", regime)
        refusals.distributed("DpFedSgd", regime, self.distributed, self.noise)
        _check_one_step(regime)
        if regime.weighting != "uniform":
            raise UserError(
                "federation.weighting is 'examples': a weight would multiply every clipped gradient of a large site, "
                "and the noise on the sum would be too small for it. Sums of gradients count every unit alike "
                "already; set federation.weighting to 'uniform'"
            )

    def make(self, regime: Regime, population: Population, budget: Budget) -> Mechanism:
        """The mechanism for these sites, with one noise for all."""
        refusals.noise_source("DpFedSgd", self.noise_multiplier, budget.epsilon)
        taking_part = participation.in_rounds(regime, population, self.sampling_probability, self.noise)
        sites = len(population.sites)
        cohort = min(regime.cohort or sites, sites)
        # What a round sums up on average, over the draw of cohorts: a public constant, whoever takes part.
        weight = float(cohort / sites * taking_part.expected.sum())
        runs, own, shared = taking_part.runs, self.noise_multiplier, None
        generators: tuple[str, ...] = (participation.GENERATOR,)
        rests_on: tuple[str, ...] = (participation.summed("the sums of the sites", regime.secure),)
        if self.distributed is not None:
            shared, event, rests_on = self._shares(regime, population, budget, taking_part, weight, cohort)
            runs, own = shares.runs_with(runs, event), event.noise_multiplier
            generators = (participation.INTEGERS, participation.SAMPLES)
        z, held = participation.common(runs, population, budget, own)
        rounds = zip(population.sites, runs, held, strict=True)
        return Mechanism(
            name="DpFedSgd",
            unit=regime.unit,
            clip=Clip(self.clip_norm, self.scope),
            clipped="gradients",
            noised="sum" if shared is None else "shares",
            stddev=np.full(sites, z * (taking_part.sensitivity if shared is None else shares.central(shared))),
            weight=weight,
            denominators=np.ones(sites),
            sampling=taking_part.probability,
            examples_per_unit=self.examples_per_unit,
            cohort_probability=None,
            site_weights=None,
            correlated=taking_part.correlation,
            adaptive=None,
            events={site: replace(run, noise_multiplier=float(own), count=1) for site, run, own in rounds},
            adversary=_ADVERSARY if shared is None else shares.adversary(regime),
            assumptions=(
                *participation.assumptions(regime.unit, generators),
                *taking_part.assumptions,
                *rests_on,
            ),
            shares=shared,
        )

    def _shares(
        self,
        regime: Regime,
        population: Population,
        budget: Budget,
        taking_part: participation.Participation,
        units: float,
        cohort: int,
    ) -> tuple[Shares, Event, tuple[str, ...]]:
        """How sites add noise in integers, what a sum of it releases, and what that rests on."""
        if population.shared and self.distributed.kind != "skellam":
            raise UserError(
                f"the sites {', '.join(population.shared[0])} hold data of the same patient, which are accounted for "
                "by taking the noise of a sum apart: that can be done with Skellam noise, not with a sum of discrete "
                "Gaussians. Set DpFedSgd.distributed to Skellam(), or keep each patient's records at one site"
            )
        most = shares.slack(float(taking_part.expected.max()))
        messages = shares.messages_of(regime, self.clip_norm, units, cohort, conditional=False, slack=most)

        def multiplier(template: Event) -> float:
            runs = shares.runs_with(taking_part.runs, template)
            return participation.common(runs, population, budget, self.noise_multiplier)[0]

        shared, event = shares.fit(self.distributed, messages, multiplier)
        return shared, event, shares.assumptions(regime, messages)


def _check_one_step(regime: Regime) -> None:
    """Refuses all that makes an upload other than the sum of one step's clipped gradients."""
    if regime.local_steps != 1:
        raise UserError(
            f"training.local_steps is {regime.local_steps}: after the first step without noise one {regime.unit} "
            "changes every later gradient, so the clip norm does not bound what it changes in the sum. Set "
            "training.local_steps to 1, or choose DpSgd, which adds noise in every step"
        )
    if regime.optimizer != "sgd" or regime.learning_rate != 1.0 or not regime.constant_rate:
        rate = f"{regime.optimizer!r} with learning rate {regime.learning_rate}"
        schedule = "" if regime.constant_rate else " that changes by a schedule"
        raise UserError(
            f"the clients' optimiser is {rate}{schedule}: under DpFedSgd a site sends the plain sum of its clipped "
            "gradients, and the server's aggregator takes the step. Set training.optimizer to sgd with learning rate "
            "1.0 and constant schedules, and choose the learning rate of the aggregator (such as "
            "FedAdam(server_lr=...))"
        )
    if regime.proximal:
        raise UserError(
            f"training.proximal is {regime.proximal}: it pulls later local steps back to the server's adapters, and "
            "DpFedSgd takes one step from them. Set training.proximal to 0"
        )
