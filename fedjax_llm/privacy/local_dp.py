"""Local differential privacy: every site clips its update and adds noise itself before it leaves.

The baseline that trusts nobody (Kasiviswanathan et al. 2011, arXiv 0803.0924, with the Gaussian mechanism): no sampling
hides who took part, and the noise of every site is that of one site alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedjax_llm.privacy import participation, refusals
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Budget, Mechanism, Population, Regime


@dataclass(frozen=True)
class LocalDp:
    """Noise at the site, on its update of a round; for the unit ``site``.

    Who receives an update knows that the site took part, so the question is not whether its data are there but which:
    the guarantee is for any data of the site in place of any other. Two clipped updates are up to 2 C apart, so noise
    of standard deviation z C is charged as a noise multiplier of z / 2 (more than add-or-remove needs).

    Attributes:
      clip_norm: C, the bound on the update, over all adapters together.
      noise_multiplier: z, standard deviation of the noise over C; ``None``: calibrated for each site to
        ``privacy.target_epsilon``.
      scope: of clipping: ``flat``, or ``layers``.
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    scope: Literal["flat", "layers"] = "flat"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        refusals.parameters("LocalDp", Clip(self.clip_norm, self.scope), self.noise_multiplier)

    def check(self, regime: Regime) -> None:
        """Refuses an experiment that it cannot protect. Aggregation, weighted or not, is post-processing.

        Raises:
          UserError: with the reason and the way out.
        """
        refusals.basics("LocalDp", regime, ("site",), ("federated",))
        refusals.deltas("LocalDp", regime)

    def make(self, regime: Regime, population: Population, budget: Budget) -> Mechanism:
        """The mechanism for these sites, each with noise for as many rounds as it takes part in."""
        refusals.noise_source("LocalDp", self.noise_multiplier, budget.epsilon)
        runs = [Event("gaussian", 1.0, 1.0, max(1, rounds)) for rounds in population.participations]
        own = None if self.noise_multiplier is None else self.noise_multiplier / 2
        charged = participation.per_site(runs, population, budget, own)
        return Mechanism(
            name="LocalDp",
            unit=regime.unit,
            clip=Clip(self.clip_norm, self.scope),
            clipped="deltas",
            noised="deltas",
            stddev=2 * charged,
            weight=0.0,
            denominators=np.ones(len(runs)),
            sampling=None,
            examples_per_unit=1,
            cohort_probability=None,
            site_weights=None,
            correlated=None,
            adaptive=None,
            events={site: Event("gaussian", float(z)) for site, z in zip(population.sites, charged, strict=True)},
            adversary="everyone outside the site: the server, the other sites, and whoever gets the adapters",
            assumptions=(
                "a site's epsilon also covers replacing all of its data by any other; that the site takes part, and "
                "what it weighs (its number of examples), is public",
                "two clipped updates are up to 2 clip norms apart, so the noise multipliers of the accounts are half "
                "of LocalDp's own, which is over one clip norm",
                participation.GENERATOR,
            ),
        )
