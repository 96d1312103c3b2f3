"""DP-SGD inside each site: every step clips each sampled unit's gradient and adds noise before anything else is done.

Abadi et al. 2016 (arXiv 1607.00133), for many sites: each has its own sampling probability, noise and epsilon. Sites
hold disjoint units, so a unit's epsilon is that of its site; a patient of several sites has an account of its own.
What follows a step (optimisers, further steps, weighting, aggregation) is post-processing.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedjax_llm.privacy import participation, refusals
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.mechanism import Budget, Mechanism, Population, Regime

_ADVERSARIES = {
    "federated": "everyone outside the site: the server, the other sites, and whoever gets the adapters",
    "local": "everyone outside the site who gets its adapters",
    "centralised": "everyone who gets the adapters, but not whoever holds the pooled data",
}


@dataclass(frozen=True)
class DpSgd:
    """Noise at the site, in every local step; for the units ``record`` and ``patient``.

    Attributes:
      clip_norm: C, the bound on one unit's gradient, over all adapters together.
      noise_multiplier: standard deviation of the noise on a step's summed gradients over C, the same at all sites;
        ``None``: calibrated for each site to ``privacy.target_epsilon``.
      scope: of clipping: ``flat``, or ``layers``.
      sampling_probability: with which a unit takes part in a step; ``None``: at each site what makes
        ``training.batch_size`` units a step on average (all of them where the site has fewer).
      examples_per_unit: at most so many examples of a sampled unit make up its gradient.
      noise: how noise is correlated over the steps (``privacy/correlated.py``); ``None``: independent. With it, the
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
        refusals.parameters("DpSgd", Clip(self.clip_norm, self.scope), self.noise_multiplier)
        refusals.sampling("DpSgd", self.sampling_probability, self.examples_per_unit)

    def check(self, regime: Regime) -> None:
        """Refuses an experiment that it cannot protect.

        Raises:
          UserError: with the reason and the way out.
        """
        refusals.basics("DpSgd", regime, refusals.GRADIENT_UNITS, ("federated", "centralised", "local"))
        refusals.gradients("DpSgd", regime)
        refusals.availability("DpSgd", regime, self.noise is not None)

    def make(self, regime: Regime, population: Population, budget: Budget) -> Mechanism:
        """The mechanism for these sites, each with noise of its own.

        ``regime.local_steps`` is what one client does in a round, in the setting centralised too.
        """
        refusals.noise_source("DpSgd", self.noise_multiplier, budget.epsilon)
        # A site that never takes part releases nothing; one participation keeps its calibration well-defined.
        steps = regime.local_steps * np.maximum(1, population.participations)
        taking_part = participation.in_steps(regime, population, self.sampling_probability, self.noise, steps)
        z = participation.per_site(taking_part.runs, population, budget, self.noise_multiplier)
        rounds = zip(population.sites, taking_part.runs, z, strict=True)
        return Mechanism(
            name="DpSgd",
            unit=regime.unit,
            clip=Clip(self.clip_norm, self.scope),
            clipped="gradients",
            noised="steps",
            stddev=z * taking_part.sensitivity,
            weight=0.0,
            denominators=taking_part.expected,
            sampling=taking_part.probability,
            examples_per_unit=self.examples_per_unit,
            cohort_probability=None,
            site_weights=None,
            correlated=taking_part.correlation,
            adaptive=None,
            events={
                site: replace(run, noise_multiplier=float(own), count=regime.local_steps) for site, run, own in rounds
            },
            adversary=_ADVERSARIES[regime.setting],
            assumptions=(*participation.assumptions(regime.unit), *taking_part.assumptions),
        )
