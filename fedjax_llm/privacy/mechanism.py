"""The contract between a mechanism and the rounds: what is clipped, where noise comes in, what that releases.

A mechanism is a frozen dataclass in a file of its own with ``check(regime)``, which refuses what it cannot protect, and
``make(regime, population, budget) -> Mechanism``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.events import Event
from fedjax_llm.types import Setting, Unit

EVERY_SITE = "every site"
"""The account of a site-level mechanism at the server: each round charges all sites alike, whoever takes part."""


class Regime(NamedTuple):
    """What a mechanism must know of an experiment, as plain values.

    Attributes:
      setting: of the run.
      unit: of privacy.
      rounds: how many.
      cohort: sites a round; ``None``: all.
      weighting: ``examples`` or ``uniform``.
      batch_size: (expected) units a local step.
      local_steps: a round.
      local_epochs: passes over shuffled data a round instead of steps, or ``None``.
      normalise: ``example`` or ``token``.
      optimizer: the clients' optimiser by name and options, its learning rate, and whether its schedules are constant.
      learning_rate: see ``optimizer``.
      constant_rate: see ``optimizer``.
      proximal: FedProx's mu.
      adapter_dtype: of the adapters.
      server_view: ``Sum`` or ``Stack``, as text: what the aggregator must see.
      messages: ``deltas`` if clients send nothing else, or what is ``other``.
      probes: whether clients tell loss and gradient without noise.
      ranks: whether clients train adapters of different ranks.
      compressed: whether what clients send is compressed with loss.
      asynchronous: whether clients train at times of their own.
      unreliable: whether clients that are selected may not answer.
      over_selection: how many times the cohort is selected.
      finetunes: whether sites train on alone after the rounds.
      personal: whether some factors stay at the clients.
      attacked: whether malicious clients make messages of what they see of others'.
      poisoned: whether malicious sites move text between their records.
      own: whether each client trains adapters of its own besides the shared ones.
      values: how many numbers a message holds; 0 while the model is not known.
      secure: whether messages are added up under secure aggregation.
      survivors: the least number of clients in a secure sum; with fewer, there is none.
      colluders: how many parties may pool what they know, their own shares of the noise too, with the server.
    """

    setting: Setting
    unit: Unit
    rounds: int
    cohort: int | None
    weighting: Literal["examples", "uniform"]
    batch_size: int
    local_steps: int
    local_epochs: int | None
    normalise: Literal["example", "token"]
    optimizer: str
    learning_rate: float
    constant_rate: bool
    proximal: float
    adapter_dtype: str
    server_view: Literal["Sum", "Stack"]
    messages: Literal["deltas", "other"] = "deltas"
    probes: bool = False
    ranks: bool = False
    own: bool = False
    compressed: bool = False
    asynchronous: bool = False
    unreliable: bool = False
    over_selection: float = 1.0
    finetunes: bool = False
    personal: bool = False
    attacked: bool = False
    poisoned: bool = False
    values: int = 0
    secure: bool = False
    survivors: int = 0
    colluders: int = 0


class Population(NamedTuple):
    """Who is protected.

    Attributes:
      sites: names, [N].
      units: how many privacy units each site trains on (1 for the unit ``site``). Treated as public.
      participations: in how many rounds each site takes part, where the cohort is fixed by the (public) seed; all
        rounds where the mechanism draws the cohort by itself.
      min_separation: the least distance in rounds between two participations of each site (the number of rounds where
        it takes part once).
      shared: for every set of sites that share an owner (unit ``patient``), the sites' names.
    """

    sites: tuple[str, ...]
    units: tuple[int, ...]
    participations: tuple[int, ...]
    min_separation: tuple[int, ...]
    shared: tuple[tuple[str, ...], ...] = ()


class Budget(NamedTuple):
    """What noise is calibrated to.

    Attributes:
      epsilon: the target; ``None``: the mechanism's own noise multiplier holds.
      delta: of the guarantee.
      accountant: ``pld`` or ``rdp``.
      progress: called with (done, total) while calibrating.
    """

    epsilon: float | None
    delta: float
    accountant: Literal["pld", "rdp"] = "pld"
    progress: Callable[[int, int], Any] | None = None


@dataclass(frozen=True)
class AdaptiveClip:
    """Clipping at a quantile of the update norms, found privately (Andrew et al. 2021, arXiv 1905.03871).

    Attributes:
      quantile: gamma, the share of updates that shall not be clipped.
      learning_rate: eta_C of the geometric update.
      count_noise: sigma_b, the standard deviation of the noise on the (shifted) count of unclipped updates, in clients;
        ``None``: a twentieth of the cohort. At most that; less leaves less room for noise on the updates.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None


class Shares(NamedTuple):
    """Integer noise, split among the sites, under a secure sum modulo a power of two.

    Attributes:
      kind: how a share is distributed.
      bits: the sum is modulo ``2 ** bits``.
      scale: s: integers a unit of the message; a power of two.
      bound: D2: the L2 norm, in integers, of what one unit changes in the sum.
      clip_norm: c, of a whole message (``conditional``), or of one unit's gradient in it.
      conditional: a site's whole message is the unit: it is rounded again until its norm is within ``bound``.
      stddev: of one site's share, in integers. As many shares as are sure to be there, and secret, are enough.
      draw: (32-byte key, size) -> int64 [size], the share of one site. A key is used once.
    """

    kind: Literal["discrete gaussian", "skellam"]
    bits: int
    scale: float
    bound: float
    clip_norm: float
    conditional: bool
    stddev: float
    draw: Callable[[bytes, int], np.ndarray]


class Mechanism(NamedTuple):
    """What the rounds do, so that the events say exactly what is released.

    Attributes:
      name: of the mechanism's class.
      unit: of privacy.
      clip: the clip norm, and whether it is over all adapters or split over layers.
      clipped: what is clipped: every unit's ``gradients`` in each local step, or every site's ``deltas`` of a round.
      noised: where noise comes in: every site adds it to the summed gradients of each of its ``steps``, or to its
        ``deltas``; or it is added once to the ``sum`` over the sites; or every site adds one of the ``shares``, in
        integers, of which the sum alone is seen.
      stddev: f64 [N]: the standard deviation of the noise that a site adds, over the clip norm (all equal where it is
        added to the sum). With ``correlated``, of the independent noise before it is mixed. With ``shares``, for
        display: of the noise that is sure to be in the sum.
      weight: public constant that the noised sum over the sites is divided by (``sum`` and ``shares``); else 0.
      denominators: f64 [N]: public constants that a site's summed gradients are divided by.
      sampling: f64 [N]: with which probability a unit takes part in a local step; ``None`` where units are not sampled.
      examples_per_unit: at most so many examples of a sampled unit, chosen at random, make up its gradient.
      cohort_probability: with which a site takes part in a round (Poisson); ``None``: the cohort is as the experiment
        says, and gives no amplification.
      site_weights: what a site's delta is multiplied by, from its number of examples; ``None``: 1.
      correlated: how noise is correlated over steps or rounds (``privacy/correlated.py``); ``None``: independent.
      adaptive: the clip norm follows a quantile, with a number for ``count_noise``; ``None``: it is fixed.
      events: account -> what one round releases about it, if it takes part.
      adversary: who the guarantee holds against, as a sentence.
      assumptions: what it rests on, as sentences.
      shares: how messages become integers with noise (``noised == "shares"``).
    """

    name: str
    unit: Unit
    clip: Clip
    clipped: Literal["gradients", "deltas"]
    noised: Literal["steps", "deltas", "sum", "shares"]
    stddev: np.ndarray
    weight: float
    denominators: np.ndarray
    sampling: np.ndarray | None
    examples_per_unit: int
    cohort_probability: float | None
    site_weights: Callable[[int], float] | None
    correlated: Any
    adaptive: AdaptiveClip | None
    events: Mapping[str, Event]
    adversary: str
    assumptions: tuple[str, ...]
    shares: Shares | None = None


class MechanismConfig(Protocol):
    """A frozen dataclass of a mechanism's parameters."""

    def check(self, regime: Regime) -> None:
        """Refuses an experiment that it cannot protect.

        Raises:
          UserError: with the reason and the way out.
        """
        ...

    def make(self, regime: Regime, population: Population, budget: Budget) -> Mechanism:
        """The mechanism for these sites, with noise for the budget."""
        ...


def releases(mechanism: Mechanism, cohort: Sequence[str]) -> dict[str, Event]:
    """What a round of ``cohort`` releases, by account.

    The cohort of a mechanism that samples it is secret: every round is charged, to all.
    """
    if EVERY_SITE in mechanism.events:
        return {EVERY_SITE: mechanism.events[EVERY_SITE]}
    return {name: mechanism.events[name] for name in cohort}


def accounted_by(mechanism: Mechanism, accountant: str) -> str:
    """Which accountant's figures are stated: integer noise is accounted for by Renyi divergences, whatever is asked."""
    return accountant if mechanism.shares is None else "rdp"


def adjacency(unit: Unit) -> str:
    """The neighbouring relation in words."""
    whole = {"record": "one record", "patient": "all records of one patient", "site": "all data of one site"}
    return f"add or remove {whole[unit]}"
