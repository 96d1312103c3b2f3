"""DP-FedSGD: one step a round; sites send sums of clipped gradients, and noise is added once, to the sum over them.

The same step as DP-SGD on the pooled data (McMahan et al. 2018, arXiv 1710.06963, with records in place of users):
one noise for all sites instead of one for each, so that the sum over C sites holds sqrt(C) less of it. It needs
somebody who adds up and draws noise before anybody looks: a trusted server, or secure aggregation.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import participation, refusals
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.mechanism import Budget, Mechanism, Population, Regime


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
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    scope: Literal["flat", "layers"] = "flat"
    sampling_probability: float | None = None
    examples_per_unit: int = 1
    noise: Any = None

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
        z, held = participation.common(taking_part.runs, population, budget, self.noise_multiplier)
        sites = len(population.sites)
        share = min(regime.cohort or sites, sites) / sites
        rounds = zip(population.sites, taking_part.runs, held, strict=True)
        return Mechanism(
            name="DpFedSgd",
            unit=regime.unit,
            clip=Clip(self.clip_norm, self.scope),
            clipped="gradients",
            noised="sum",
            stddev=np.full(sites, z * taking_part.sensitivity),
            # What a round sums up on average, over the draw of cohorts: a public constant, whoever takes part.
            weight=float(share * taking_part.expected.sum()),
            denominators=np.ones(sites),
            sampling=taking_part.probability,
            examples_per_unit=self.examples_per_unit,
            cohort_probability=None,
            site_weights=None,
            correlated=taking_part.correlation,
            adaptive=None,
            events={site: replace(run, noise_multiplier=float(own), count=1) for site, run, own in rounds},
            adversary="everyone who sees the noised sums alone: the other sites, and whoever gets the adapters",
            assumptions=(
                *participation.assumptions(regime.unit),
                *taking_part.assumptions,
                "the sums of the sites are added up, and noise is drawn, before anybody looks: by a server that is "
                "trusted with them, or under secure aggregation",
            ),
        )


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
