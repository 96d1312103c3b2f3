"""What stays the same from round to round, and what a round reports."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jax import Array

from fedjax_llm.compression.codec import Codec
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.shared_rows import likely_rows
from fedjax_llm.errors import UserError
from fedjax_llm.federation.availability import Asynchronous, Availability
from fedjax_llm.federation.clients import Client
from fedjax_llm.federation.hosts import here
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models.causal_lm import Remat
from fedjax_llm.privacy.mechanism import Mechanism
from fedjax_llm.secure.ring import Grid
from fedjax_llm.secure.sec_agg import Terms
from fedjax_llm.secure.simulation import Identities
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
      availability: who of a cohort answers, and when; ``None``: all do, at once.
      asynchronous: clients train all the time, and the server steps when a cohort's updates are there; ``None``: it
        waits for the clients of each round.
      finetune_rounds: after the rounds, every site trains on alone from the shared adapters for as many; they are then
        its own.
    """

    rounds: int = 10
    cohort: int | None = None
    weighting: Literal["examples", "uniform"] = "examples"
    availability: Availability | None = None
    asynchronous: Asynchronous | None = None
    finetune_rounds: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.rounds < 1:
            raise UserError(f"federation.rounds is {self.rounds}; it must be at least 1")
        if self.cohort is not None and self.cohort < 1:
            raise UserError(f"federation.cohort is {self.cohort}; it must be at least 1, or None for all sites")
        if self.finetune_rounds < 0:
            raise UserError(f"federation.finetune_rounds is {self.finetune_rounds}; it must be at least 0")
        if self.asynchronous is None:
            return
        if self.cohort is None or self.asynchronous.concurrency < self.cohort:
            raise UserError(
                f"federation.asynchronous.concurrency is {self.asynchronous.concurrency} and federation.cohort is "
                f"{self.cohort}: the cohort is the buffer's size, and at least as many clients must train at a time"
            )
        waits = self.availability
        if waits is not None and (waits.deadline is not None or waits.over_selection != 1):
            raise UserError(
                "federation.availability.deadline and over_selection are for rounds; asynchronous clients are not "
                "waited for. Set them to None and 1"
            )


@dataclass(frozen=True)
class Execution:
    """How the computation is laid out. Nothing here may change a result (beyond the rounding of f32 sums).

    Attributes:
      clients_per_chunk: clients whose local states are held at a time.
      tokens_per_microbatch: padded tokens of a training step; bounds its memory.
      buckets: row lengths that are compiled.
      shared_row: tokens of a row in which several examples of a step may stand after what they begin with alike, which
        is then computed once; 0: none do. Without effect where each example's gradient is bounded, or with dropout.
      evaluation_buckets: the same for held-out evaluation, which needs no backward pass.
      remat: what the backward pass computes again, to save memory: ``none``, all but the results of matrix products
        (``matmuls``), or whole ``blocks``.
      trunk_megabytes: of host memory for the hidden states of examples below the lowest adapted layer, which are then
        computed once; 0: none are kept.
      mesh: devices along each axis; ``tokens_per_microbatch`` then counts those of a device, ``clients_per_chunk``
        those of all.
    """

    clients_per_chunk: int = 16
    tokens_per_microbatch: int = 512
    buckets: int = 3
    evaluation_buckets: int = 3
    remat: Remat = "none"
    trunk_megabytes: int = 1024
    mesh: MeshShape = MeshShape()
    shared_row: int = field(default=0, metadata={"unsaid": True})  # hashes of runs without stay

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.shared_row < 0:
            raise UserError(f"execution.shared_row is {self.shared_row}; it must not be negative")
        for name in ("clients_per_chunk", "tokens_per_microbatch", "buckets", "evaluation_buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"execution.{name} is {getattr(self, name)}; it must be at least 1")
        if self.trunk_megabytes < 0:
            raise UserError(f"execution.trunk_megabytes is {self.trunk_megabytes}; it must not be negative")


class Traffic(NamedTuple):
    """Bytes that are received from and sent to the server."""

    download: int
    upload: int


class Secure(NamedTuple):
    """How a run's rounds are aggregated so that the server sees sums only.

    Attributes:
      terms_of: what a round of so many selected clients agrees on.
      identities: the clients' signing keys.
      grid: of messages without a share of noise in them.
      fresh: whether what clients draw is from the operating system each time, and not from the run's secret key.
    """

    terms_of: Callable[[int], Terms]
    identities: Identities
    grid: Grid
    fresh: bool


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
      secure: aggregation that lets the server see sums only; ``None``: it sees every message.
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
    secure: Secure | None = None

    @property
    def shared_row(self) -> int:
        """Tokens of a row that a step's examples share; 0 where each has its own gradient or its own dropout."""
        return 0 if self.trainer.clip is not None or self.trainer.model.dropout else self.execution.shared_row


def shapes_for(plan: RoundPlan) -> tuple[Shape, ...]:
    """Shapes of microbatches for the text of a plan's clients, as far as it is on this host."""
    execution = plan.execution
    return choose_shapes(
        likely_rows([here(client.examples) for client in plan.clients], plan.local.batch_size, plan.shared_row),
        tokens_per_microbatch=execution.tokens_per_microbatch,
        buckets=execution.buckets,
        rows_of_unit=1 if plan.mechanism is None else plan.mechanism.examples_per_unit,
        bins=execution.mesh.bins.count,
    )


@dataclass(frozen=True)
class ClientReport:
    """What a client did in a round.

    ``loss`` is in nats a target token, ``None`` where no example was sampled; ``included`` says whether the update was
    finite. ``rank`` is that of its adapters, where clients differ; ``staleness`` is how many steps the server took
    while it trained, where clients are asynchronous.
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
    staleness: int | None = None


@dataclass(frozen=True)
class SecureReport:
    """What secure aggregation made of a round.

    Attributes:
      clients: that exchanged keys.
      survivors: whose messages are in the sum.
      dropped: the names of the others.
      cut: numbers of all messages that were larger than the grid allows, and were cut; the server reads their count.
      abandoned: why nothing was released; ``None`` where the sum was.
    """

    clients: int
    survivors: int
    dropped: tuple[str, ...]
    cut: int
    abandoned: str | None


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Tokens are counted without and with padding. ``clip_norm`` is the bound on a unit's contribution, if there is one.
    ``silent`` and ``late`` are the clients that were selected in vain, ``wasted`` the bytes that they took, ``elapsed``
    the simulated time in rounds of a median client (``None`` where all answer at once). ``aggregation_error`` is the
    distance of the server's effective weights from the weighted mean of the clients', relative to what that mean has
    over the base model (Frobenius norms over all adapted modules); ``None`` where it is not measured. ``secure`` is
    there under secure aggregation.
    """

    clients: tuple[ClientReport, ...]
    tokens: int
    padded_tokens: int
    update_norm: float
    clip_norm: float | None = None
    aggregation_error: float | None = None
    silent: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    wasted: Traffic = Traffic(0, 0)
    elapsed: float | None = None
    secure: SecureReport | None = None
