"""How fine integers are, and how much noise a site's share holds, so that the sum fits the modulus and the budget.

What one unit changes in the sum of rounded messages, in integers (D2), from what it changes in the messages (c):

- A site's whole message is the unit: it is rounded at random, again until its norm is within the bound of Kairouz, Liu
  & Steinke 2021 (arXiv 2102.06387, theorem 1), which all but a share ``beta`` of the draws meet.
- The unit is inside a site, whose message is a sum of clipped gradients: both sums, with the unit and without, are
  rounded to the nearest integers. A coordinate's difference moves by at most 1 in that, so that the whole of it moves
  by at most sqrt(d) in L2: D2 = c s (1 + slack) + sqrt(d).

The slack is for float32. The sum of N gradients of norm at most c rounds partial sums of norm at most j c, each by
2^-24 of itself, so the sum is off by at most c N^2 2^-25, and two sums by c N^2 2^-24: within a thousandth of c up to
N = 129, and what :func:`slack` gives beyond. Rotation in float64 adds less than 1e-12 of N c.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.discrete_noise import LARGEST_STDDEV
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Regime, Shares

LEAST_SLACK = 1e-3
BITS = (16, 32)
_LARGEST_BOUND = 2.0**31
"""Of D2: squares of integer norms then fit 63 bits."""
_EXPONENTS = range(60, -60, -1)


class Noise(Protocol):
    """A distribution of shares: ``DDGauss`` or ``Skellam``.

    Attributes:
      bits: the sum is modulo ``2 ** bits``.
      tail: how many standard deviations of the sum fit the modulus.
      beta: how many draws of conditional rounding are refused at most.
      kind: of the events.
    """

    @property
    def bits(self) -> int:
        """Of the modulus."""
        ...

    @property
    def tail(self) -> float:
        """Standard deviations."""
        ...

    @property
    def beta(self) -> float:
        """A share of draws."""
        ...

    @property
    def kind(self) -> Literal["discrete gaussian", "skellam"]:
        """As events name it."""
        ...

    def draw(self, stddev: float) -> Callable[[bytes, int], np.ndarray]:
        """(32-byte key, size) -> int64 [size] of this standard deviation."""
        ...


@dataclass(frozen=True)
class Integers:
    """What shares of any distribution have in common.

    Attributes:
      bits: a message's values travel as integers of so many bits, 16 or 32; the sum is modulo ``2 ** bits``.
      tail: how many standard deviations of the sum fit the modulus; what is beyond wraps around, which is an error, not
        a leak.
      beta: how many draws of a message's random rounding are refused at most (unit ``site``).
    """

    bits: int = 32
    tail: float = 6.0
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        check(type(self).__name__, self.bits, self.tail, self.beta)


class Messages(NamedTuple):
    """What is added up in a round, as far as integers and noise depend on it.

    Attributes:
      values: d, integers in a message: a power of two, after padding.
      clip_norm: c, of what one unit changes.
      units: in a sum, on average.
      sites: in a sum, if none drops out.
      secret: m, shares that are sure to be in a sum and unknown to everybody: only they count.
      conditional: a site's whole message is the unit.
      slack: by how much more float32 may move a sum, over c.
    """

    values: int
    clip_norm: float
    units: float
    sites: int
    secret: int
    conditional: bool
    slack: float = 0.0


def check(name: str, bits: int, tail: float, beta: float) -> None:
    """Refuses parameters that no noise has.

    Raises:
      UserError: with the value.
    """
    if bits not in BITS:
        raise UserError(f"{name}.bits is {bits}; it must be 16 or 32, which whole words hold")
    if not 1 <= tail < math.inf:
        raise UserError(f"{name}.tail is {tail}; it counts standard deviations, and must be at least 1 (6 is safe)")
    if not 0 < beta < 1:
        raise UserError(f"{name}.beta is {beta}; it is a share of draws, in (0, 1)")


def encoded_length(values: int) -> int:
    """How many integers a message of so many values becomes: the next power of two.

    It costs up to twice the bytes, and with a unit inside a site up to sqrt(2) of the rounding's sqrt(d).
    """
    return 1 << max(values - 1, 0).bit_length()


def messages_of(regime: Regime, clip_norm: float, units: float, sites: int, **kind: Any) -> Messages:
    """The messages of an experiment.

    Args:
      regime: with the number of values known.
      clip_norm: see :class:`Messages`.
      units: see there.
      sites: see there.
      **kind: ``conditional`` and ``slack``.

    Raises:
      UserError: the model is not known yet, or no share is sure to be there.
    """
    if regime.survivors - regime.colluders < 1:
        raise UserError(f"a secure sum of {regime.survivors} sites less {regime.colluders} colluders holds no noise")
    if regime.values < 1:
        raise UserError("noise in integers depends on how many values a message holds: load the model first")
    return Messages(encoded_length(regime.values), clip_norm, units, sites, regime.survivors - regime.colluders, **kind)


def slack(expected: float) -> float:
    """What float32 may add to one unit's share of a site's sum, over the clip norm.

    Args:
      expected: units in the sum on average. More than ``expected + 9 sqrt(expected) + 9`` of a Poisson sample have a
        probability below 1e-12.
    """
    return max(LEAST_SLACK, (expected + 9 * math.sqrt(expected) + 9) ** 2 * 2.0**-24)


def bound(messages: Messages, scale: float, beta: float) -> float:
    """D2, what one unit changes in the sum, in integers."""
    d, within = messages.values, messages.clip_norm * scale * (1 + messages.slack)
    worst = within + math.sqrt(d)
    if not messages.conditional:
        return worst
    likely = within**2 + d / 4 + math.sqrt(2 * math.log(1 / beta)) * (within + math.sqrt(d) / 2)
    return min(worst, math.sqrt(likely))


def event(noise: Noise, messages: Messages, scale: float) -> Event:
    """One round's release about one unit, unsampled, for a noise multiplier of 1."""
    found = bound(messages, scale, noise.beta)
    return Event(noise.kind, 1.0, summands=messages.secret, sensitivity=found, values=messages.values)


def fit(noise: Noise, messages: Messages, multiplier: Callable[[Event], float]) -> tuple[Shares, Event]:
    """The finest integers whose sum fits the modulus, with the noise that they need.

    The noise depends on the scale, as rounding adds to what a unit changes, and the scale on the noise. From the least
    noise, that of endlessly fine integers, the scale only falls, in a few steps.

    Args:
      noise: the kind, and the modulus.
      messages: that are added up.
      multiplier: template -> its noise multiplier z: calibrated, or given.

    Returns:
      the shares, and :func:`event` at their scale with its noise multiplier.

    Raises:
      UserError: no integers fit.
    """
    z = multiplier(Event(noise.kind, 1.0, summands=messages.secret, sensitivity=_LARGEST_BOUND, values=messages.values))
    scale = _finest(noise, messages, z)
    template = event(noise, messages, scale)
    while not fits(noise, messages, scale, z := max(z, multiplier(template))):
        scale = _finest(noise, messages, z)
        template = event(noise, messages, scale)
    stddev = z * template.sensitivity / math.sqrt(messages.secret)
    shares = Shares(
        kind=noise.kind,
        bits=noise.bits,
        scale=scale,
        bound=template.sensitivity,
        clip_norm=messages.clip_norm,
        conditional=messages.conditional,
        stddev=stddev,
        draw=noise.draw(stddev),
    )
    return shares, replace(template, noise_multiplier=z)


def runs_with(runs: Sequence[Event], template: Event) -> tuple[Event, ...]:
    """Runs of Gaussian releases as runs of integer ones like the template."""
    like = {"kind": template.kind, "summands": template.summands}
    return tuple(replace(run, **like, sensitivity=template.sensitivity, values=template.values) for run in runs)


def central(shares: Shares) -> float:
    """Standard deviation of the noise that is sure to be in a sum, over the clip norm times the noise multiplier."""
    return shares.bound / (shares.scale * shares.clip_norm)


def adversary(regime: Regime) -> str:
    """Who the guarantee holds against."""
    together = f"together with up to {regime.colluders} site{'s' * (regime.colluders > 1)}"
    alone = "and nobody among the sites, each of which knows its own share of the noise"
    return f"the server and whoever gets the adapters, {together if regime.colluders else alone}"


def assumptions(regime: Regime, messages: Messages) -> tuple[str, ...]:
    """What the guarantee rests on beside its unit."""
    known = f", less those of {regime.colluders} that may tell the server theirs" if regime.colluders else ""
    shared = (
        f"a secure sum holds at least {regime.survivors} sites, or is abandoned: their shares of the noise{known}, are "
        "enough, and the protocol's own assumptions hold"
    )
    exact = (
        f"what float32 does to a sum of clipped gradients before it is rounded to integers is within "
        f"{messages.slack:.1%} of the clip norm"
    )
    return (shared,) if messages.conditional else (shared, exact)


def fits(noise: Noise, messages: Messages, scale: float, z: float) -> bool:
    """Whether ``tail`` standard deviations of the sum fit half the modulus, and the share fits its sampler.

    A rotation spreads a sum of norm N s c over d values about as Gaussians do, with the standard deviation
    N s c / sqrt(d) at most (rho = 1 in Kairouz et al. 2021, section 4.4). What wraps around nevertheless is an error,
    never a leak.
    """
    found = bound(messages, scale, noise.beta)
    share = z * found / math.sqrt(messages.secret)
    spread = (scale * messages.clip_norm * messages.units) ** 2 / messages.values
    deviation = math.sqrt(spread + messages.sites * (0.25 + share**2))
    return noise.tail * deviation <= 2.0 ** (noise.bits - 1) and share <= LARGEST_STDDEV and found <= _LARGEST_BOUND


def _finest(noise: Noise, messages: Messages, z: float) -> float:
    """The largest power of two that :func:`fits`."""
    for exponent in _EXPONENTS:
        if fits(noise, messages, 2.0**exponent, z):
            return 2.0**exponent
    raise UserError(
        f"the noise does not fit the integers: a sum of {messages.sites} sites' messages of {messages.values} values, "
        f"with a noise multiplier of {z:g}, is too wide for {noise.bits} bits and {noise.tail:g} standard deviations. "
        "Set bits to 32, a larger target epsilon, or train fewer values"
    )
