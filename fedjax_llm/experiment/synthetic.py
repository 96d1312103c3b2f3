"""Rounds for benchmarks: on random tokens in exact shapes, or on given examples in the shapes of a run."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.config import Experiment, regime_of
from fedjax_llm.data.packing import Microbatch, Shape, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.planning import trainer_of
from fedjax_llm.federation.clients import clients_of
from fedjax_llm.federation.plan import Execution, Federation, RoundPlan, shapes_for
from fedjax_llm.federation.rounds import initial_state
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import CausalLM, layer_weights, lowest_adapted
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.privacy import guarantee, noise
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import MechanismConfig, Population
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalState, LocalTraining
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import RoundState

_ROUNDS = 1_000_000


def dense_plan(
    base: BaseModel,
    lora: Lora,
    *,
    clients: int,
    steps: int,
    batch: int,
    length: int,
    mechanism: MechanismConfig | None = None,
    chunk: int | None = None,
) -> tuple[RoundPlan, RoundState]:
    """A federated run on random tokens, all of which are trained on: see :func:`plan_on`.

    Args:
      base: the real model.
      lora: the adapters.
      clients: C, all in every round.
      steps: local steps a round.
      batch: B, examples a step.
      length: L, tokens an example.
      mechanism: of privacy, with a noise multiplier of its own; the unit is the record.
      chunk: clients at a time; ``None``: all.

    Returns:
      The plan (one microbatch a step, nothing padded), and the state before the first round.
    """
    rows = (chunk or clients) * batch
    return plan_on(
        base,
        lora,
        random_sites(base, clients, batch, length),
        steps=steps,
        mechanism=mechanism,
        execution=Execution(clients_per_chunk=chunk or clients),
        shapes=(Shape(rows, length, rows * (length - 1)),),
    )


def plan_on(
    base: BaseModel,
    lora: Lora,
    sites: Sequence[tuple[str, tuple[EncodedExample, ...]]],
    *,
    steps: int,
    mechanism: MechanismConfig | None = None,
    execution: Execution,
    shapes: tuple[Shape, ...] | None = None,
) -> tuple[RoundPlan, RoundState]:
    """A federated run in which all sites are in every round, with all of their examples in each of their steps.

    These are the batch without privacy, and what a mechanism samples with probability 1: both train on the same tokens.

    Args:
      base: the real model.
      lora: the adapters. With layers below the lowest of them, the plan has a trunk; nothing is computed for it yet.
      sites: names and examples, equally many at each.
      steps: local steps a round.
      mechanism: of privacy, with a noise multiplier of its own; the unit is the record.
      execution: the layout.
      shapes: of microbatches; ``None``: what a run with this layout would choose.

    Returns:
      The plan, and the state before the first round.

    Raises:
      UserError: sites have different numbers of examples.
    """
    counts = {len(examples) for _, examples in sites}
    if len(counts) != 1:
        raise UserError(f"the sites have between {min(counts)} and {max(counts)} examples; give them equally many")
    (batch,), names = counts, tuple(name for name, _ in sites)
    experiment = Experiment(
        lora=lora,
        training=LocalTraining(batch, steps, optimizer=Optimizer("adamw", 1e-3), keep_optimizer="no"),
        federation=Federation(rounds=_ROUNDS),
        privacy=Privacy(mechanism=mechanism),
        execution=execution,
    )
    population = Population(names, (batch,) * len(names), (_ROUNDS,) * len(names), (1,) * len(names))
    made = guarantee.build(experiment.privacy, regime_of(experiment), population)
    adapters = low_rank.init(jax.random.key(1), lora, base.model)
    plan = RoundPlan(
        setting="federated",
        trainer=trainer_of(base.model, lora.scaling, experiment.training, 0.0, made),
        aggregation=experiment.aggregation.make(),
        federation=experiment.federation,
        local=experiment.training,
        execution=execution,
        shapes=(),
        clients=clients_of("federated", sites, None if made is None else made.unit),
        cohort=len(names),
        key=jax.random.key(0),
        mechanism=made,
        secret_key=None if made is None else noise.run_key("reproducible", 0),
    )
    shapes = shapes or shapes_for(plan)
    plan = plan._replace(shapes=shapes, trunk=_trunk(base, lowest_adapted(adapters), shapes, execution))
    return plan, initial_state(plan, adapters)


def local_training(
    base: BaseModel, plan: RoundPlan, state: RoundState
) -> tuple[Callable[[], list[Microbatch]], Callable[[Sequence[Microbatch]], LocalState]]:
    """The clients' part of a round of :func:`plan_on` alone: packing all of it, and the steps on what was packed."""
    clients, steps = len(plan.clients), plan.local.local_steps
    keys, rates = jax.random.split(jax.random.key(0), clients), np.ones((clients, steps), np.float32)
    work = [[list(client.examples)] * steps for client in plan.clients]

    def packed() -> list[Microbatch]:
        return list(pack(work, plan.shapes, clients=clients, share=plan.shared_row))

    def trained(batches: Sequence[Microbatch]) -> LocalState:
        begun = client_update.start(plan.trainer, trees.repeat(state.adapters, clients))
        return client_update.run(plan.trainer, base.params, begun, batches, keys, rates)

    return packed, trained


def _trunk(base: BaseModel, layers: int, shapes: tuple[Shape, ...], execution: Execution) -> TrunkCache | None:
    """Keeps the hidden states below the adapters, where there are layers below them and room is given."""
    if not layers or not execution.trunk_megabytes:
        return None
    return TrunkCache(base.model, base.params, layers, shapes, execution.trunk_megabytes * 2**20)


def random_sites(
    base: BaseModel, clients: int, batch: int, length: int
) -> list[tuple[str, tuple[EncodedExample, ...]]]:
    """Names, and for each ``batch`` examples of ``length`` random tokens, of which all but the first are targets."""
    rng = np.random.default_rng(0)
    names = [f"site-{c:02d}" for c in range(clients)]
    return [(name, tuple(_example(rng, base, length, f"{name}-{b}") for b in range(batch))) for name in names]


def _example(rng: np.random.Generator, base: BaseModel, length: int, name: str) -> EncodedExample:
    """Random tokens of which all but the first are targets."""
    return EncodedExample(name, rng.integers(0, base.model.config.vocab_size, length).astype(np.int32), 1)


def training_flops(model: CausalLM, positions: int, targets: int) -> float:
    """Floating-point operations of a training step with a frozen base: forward, and backward to the activations.

    Two for every weight and position in each direction; the embedding counts once, as the output layer, and only at
    the target positions. Attention scores and the adapters (about 1%) are not counted.
    """
    return 4.0 * (layer_weights(model) * positions + model.config.vocab_size * model.config.width * targets)
