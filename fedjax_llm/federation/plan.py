"""What stays the same from round to round, and what a round reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.data.packing import Shape
from fedjax_llm.errors import UserError
from fedjax_llm.federation.clients import Client
from fedjax_llm.privacy.mechanism import Mechanism
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Aggregation, Setting, Stack


@dataclass(frozen=True)
class Federation:
    """Rounds and cohorts.

    Attributes:
      rounds: how many.
      cohort: sites that take part in a round; ``None``: all.
      weighting: whether a client's update weighs as many training ``examples`` as its site holds, or all weigh alike.
        Where examples are hidden in privacy units, as many as its site holds of those.
    """

    rounds: int = 10
    cohort: int | None = None
    weighting: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.rounds < 1:
            raise UserError(f"federation.rounds is {self.rounds}; it must be at least 1")
        if self.cohort is not None and self.cohort < 1:
            raise UserError(f"federation.cohort is {self.cohort}; it must be at least 1, or None for all sites")


@dataclass(frozen=True)
class Execution:
    """How the computation is laid out. Nothing here may change a result (beyond the rounding of f32 sums).

    Attributes:
      clients_per_chunk: clients whose local states are held at a time.
      tokens_per_microbatch: padded tokens of a training step; bounds its memory.
      buckets: row lengths that are compiled.
      evaluation_buckets: the same for held-out evaluation, which needs no backward pass.
      remat: recompute activations in the backward pass.
      trunk_megabytes: of host memory for the hidden states of examples below the lowest adapted layer, which are then
        computed once; 0: none are kept.
    """

    clients_per_chunk: int = 16
    tokens_per_microbatch: int = 512
    buckets: int = 3
    evaluation_buckets: int = 3
    remat: bool = False
    trunk_megabytes: int = 1024

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("clients_per_chunk", "tokens_per_microbatch", "buckets", "evaluation_buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"execution.{name} is {getattr(self, name)}; it must be at least 1")
        if self.trunk_megabytes < 0:
            raise UserError(f"execution.trunk_megabytes is {self.trunk_megabytes}; it must not be negative")


class RoundPlan(NamedTuple):
    """All that stays the same from round to round.

    Attributes:
      setting: of the run.
      trainer: the static half of local training.
      aggregation: the server's algorithm.
      federation: rounds and cohorts.
      local: what clients do.
      execution: chunks.
      shapes: of microbatches.
      clients: all of them, in the order of the client axis of a run's state.
      cohort: clients a round; the expected number where the mechanism samples them.
      key: of what is random but no secret: fixed cohorts, orders of examples, dropout.
      frozen: factors of the adapters that are not trained.
      mechanism: of privacy; ``None``: no differential privacy.
      secret_key: of what privacy rests on: who is sampled, and the noise.
      trunk: keeps the hidden states below the adapters; ``None``: they are computed each time.
      ranks: how many components of the adapters each client trains, [N]; empty: all of them.
      offset: what is added to the frozen weights of adapted modules (PiSSA's remainder), module -> [in, out].
      codec: compresses what clients send; ``None``: it travels as it is.
      malicious: which clients do the bidding of ``corrupt``, bool [N]; empty: none.
      corrupt: what malicious clients make of their messages (``adversaries/``); ``None``: nothing.
      measure_error: whether each round measures what averaging the factors loses.
    """

    setting: Setting
    trainer: Trainer
    aggregation: Aggregation
    federation: Federation
    local: LocalTraining
    execution: Execution
    shapes: tuple[Shape, ...]
    clients: tuple[Client, ...]
    cohort: int
    key: Array
    frozen: Adapters = {}  # noqa: RUF012  (never written to)
    mechanism: Mechanism | None = None
    secret_key: Array | None = None
    trunk: TrunkCache | None = None
    ranks: tuple[int, ...] = ()
    offset: dict[str, Array] = {}  # noqa: RUF012  (never written to)
    codec: Codec | None = None
    malicious: tuple[bool, ...] = ()
    corrupt: Callable[[Stack, Array, Array], Stack] | None = None
    measure_error: bool = True


@dataclass(frozen=True)
class ClientReport:
    """What a client did in a round.

    ``loss`` is in nats a target token, ``None`` where no example was sampled; ``included`` says whether the update was
    finite. ``rank`` is that of its adapters, where clients differ.
    """

    name: str
    loss: float | None
    tokens: int
    examples: int
    update_norm: float
    included: bool
    download_bytes: int = 0
    upload_bytes: int = 0
    rank: int | None = None


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Tokens are counted without and with padding. ``clip_norm`` is the bound on a unit's contribution, if there is one.
    ``aggregation_error`` is the distance of the server's effective weights' change from the weighted mean of the
    clients', relative to that mean (Frobenius norms over all adapted modules); ``None`` where it is not measured.
    """

    clients: tuple[ClientReport, ...]
    tokens: int
    padded_tokens: int
    update_norm: float
    clip_norm: float | None = None
    aggregation_error: float | None = None
