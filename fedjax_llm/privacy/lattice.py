"""Rényi divergences of integer noise that is a sum of independent shares, by which its releases are accounted for.

The discrete Gaussian is not closed under sums, so a sum of m of them is only close to one (Kairouz, Liu & Steinke 2021,
arXiv 2102.06387); a sum of Skellam variables is one (Agarwal, Kairouz & Liu 2021, arXiv 2110.04995). Shares beyond the
m that an event counts on are independent noise on top, which never costs privacy.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedjax_llm.privacy.events import LATTICE, Event

ORDERS = np.arange(2, 257)
"""Integers: the bound for Skellam noise and the sum for samples are for no others."""
_LEAST_STDDEV = 0.5
"""Of a discrete Gaussian share: below it the theorem does not hold."""
_ROUNDING = 1e-12
"""More than the logarithms of binomial coefficients and their sum can lose."""


def holds(events: Sequence[Event]) -> bool:
    """Whether any of the events is about integer noise."""
    return any(event.kind in LATTICE for event in events)


def renyi(event: Event) -> np.ndarray:
    """Rényi divergences of ``event.count`` releases: f64, by :data:`ORDERS`; infinite where nothing is shown.

    Args:
      event: of one of the kinds of ``events.LATTICE``.
    """
    if event.noise_multiplier == 0:
        return np.full(len(ORDERS), math.inf if event.count else 0.0)
    whole = discrete_gaussian(event) if event.kind == "discrete gaussian" else skellam(event)
    return event.count * poisson_sampled(whole, event.sampling_probability)


def l1(sensitivity: float, values: int) -> float:
    """How much one unit changes ``values`` integers in L1 if it changes them by ``sensitivity`` in L2.

    At most sqrt(d) D2 by Cauchy-Schwarz, and D2^2 as no integer is larger than its square.
    """
    return sensitivity * min(math.sqrt(values), sensitivity)


def discrete_gaussian(event: Event) -> np.ndarray:
    """One release with a sum of discrete Gaussians: f64, by :data:`ORDERS`.

    Kairouz et al. 2021, proposition 14: with tau = 10 sum_{k<m} exp(-2 pi^2 s^2 k / (k + 1)) for shares of parameter s,
    the smallest of three bounds.

    Args:
      event: its sampling is ignored.
    """
    share = event.noise_multiplier * event.sensitivity / math.sqrt(event.summands)
    if share < _LEAST_STDDEV:
        return np.full(len(ORDERS), math.inf)
    k = np.arange(1, event.summands)
    tau = 10 * float(np.exp(-2 * math.pi**2 * share**2 * k / (k + 1)).sum())
    ratio, d = 1 / event.noise_multiplier, event.values
    far = l1(event.sensitivity, d) / event.sensitivity * ratio
    bounds = (
        ORDERS / 2 * ratio**2 + tau * d,
        ORDERS / 2 * (ratio**2 + 2 * far * tau + tau**2 * d),
        ORDERS / 2 * (ratio + math.sqrt(d) * tau) ** 2,
    )
    return np.minimum.reduce(bounds)


def skellam(event: Event) -> np.ndarray:
    """One release with Skellam noise of variance mu = (z D2)^2: f64, by :data:`ORDERS`.

    Agarwal et al. 2021, in their main theorem: a D2^2 / (2 mu) + min(((2a - 1) D2^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu)).

    Args:
      event: its sampling is ignored.
    """
    d2, d1 = event.sensitivity, l1(event.sensitivity, event.values)
    mu = (event.noise_multiplier * d2) ** 2
    more = np.minimum(((2 * ORDERS - 1) * d2**2 + 6 * d1) / (4 * mu**2), 3 * d1 / (2 * mu))
    return ORDERS * d2**2 / (2 * mu) + more


def poisson_sampled(whole: np.ndarray, probability: float) -> np.ndarray:
    """Divergences of a mechanism on a Poisson sample, from those of the mechanism on everything.

    Given all else that is random, a release without the unit has a distribution P of noise around integers, one with it
    (1 - q) P + q Q, and Q is P moved by integers v. For an integer order the moments of (1 - q) + q Q / P under P are
    the binomial sum of those of Q / P. The divergence in the other direction is no larger: noise is symmetric, so that
    x -> v - x (around the centre of P) changes P and Q into each other, and theorem 5 of Mironov, Talwar & Zhang 2019
    (arXiv 1908.10530) holds. Mixtures over all else only lower both. Without symmetry the terms of order 3 and more
    count three times (Zhu & Wang 2019, Poisson Subsampled Rényi Differential Privacy, ICML, theorem 5), which takes
    several times the noise.

    Args:
      whole: f64, by :data:`ORDERS`, of a mechanism with symmetric noise.
      probability: q.

    Returns:
      f64, by :data:`ORDERS`; never more than ``whole``.
    """
    if probability == 1 or not np.isfinite(whole).all():
        return whole
    from scipy.special import logsumexp

    q, out, orders = math.log(probability), math.log1p(-probability), ORDERS
    first = (orders - 1) * out + np.log(orders * probability - probability + 1)  # orders 0 and 1 of the sum
    rest = np.maximum(orders[:, None] - orders, 0)
    terms = _log_binomials() + rest * out + orders * q + (orders - 1) * whole
    total = logsumexp(np.concatenate([first[:, None], terms], axis=1), axis=1) + _ROUNDING
    return np.minimum(whole, total / (orders - 1))


@lru_cache(maxsize=1)
def _log_binomials() -> np.ndarray:
    """The logarithms of C(a, j) for orders a and j, -inf where j is larger."""
    from scipy.special import gammaln

    a, j = ORDERS[:, None], ORDERS
    found = gammaln(a + 1) - gammaln(j + 1) - gammaln(np.maximum(a - j, 0) + 1)
    return np.where(j <= a, found, -math.inf)
