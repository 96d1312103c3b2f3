"""Rounds on random tokens, for benchmarks: no text, exact shapes."""

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm.config import Experiment, regime_of
from fedjax_llm.data.packing import Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.experiment.planning import trainer_of
from fedjax_llm.federation.clients import clients_of
from fedjax_llm.federation.plan import Execution, Federation, RoundPlan
from fedjax_llm.federation.rounds import initial_state
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.privacy import guarantee, noise
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import MechanismConfig, Population
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
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
    """A federated run in which every client has the examples of one step, and every token is trained on.

    All examples of a client are in each of its steps: the batch without privacy, and what a mechanism samples with
    probability 1. So rounds with and without privacy train on the same tokens.

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
    rng = np.random.default_rng(0)
    names = tuple(f"site-{c:02d}" for c in range(clients))
    sites = [(name, tuple(_example(rng, base, length, f"{name}-{b}") for b in range(batch))) for name in names]
    experiment = Experiment(
        lora=lora,
        training=LocalTraining(batch, steps, optimizer=Optimizer("adamw", 1e-3), keep_optimizer="no"),
        federation=Federation(rounds=_ROUNDS),
        privacy=Privacy(mechanism=mechanism),
        execution=Execution(clients_per_chunk=chunk or clients),
    )
    population = Population(names, (batch,) * clients, (_ROUNDS,) * clients, (1,) * clients)
    made = guarantee.build(experiment.privacy, regime_of(experiment), population)
    rows = (chunk or clients) * batch
    plan = RoundPlan(
        setting="federated",
        trainer=trainer_of(base.model, lora.scaling, experiment.training, 0.0, made),
        aggregation=experiment.aggregation.make(),
        federation=experiment.federation,
        local=experiment.training,
        execution=experiment.execution,
        shapes=(Shape(rows, length, rows * (length - 1)),),
        clients=clients_of("federated", sites, None if made is None else made.unit),
        cohort=clients,
        key=jax.random.key(0),
        mechanism=made,
        secret_key=None if made is None else noise.run_key("reproducible", 0),
    )
    return plan, initial_state(plan, low_rank.init(jax.random.key(1), lora, base.model))


def _example(rng: np.random.Generator, base: BaseModel, length: int, name: str) -> EncodedExample:
    """Random tokens of which all but the first are targets."""
    return EncodedExample(name, rng.integers(0, base.model.config.vocab_size, length).astype(np.int32), 1)


def training_flops(base: BaseModel, rows: int, length: int, targets: int) -> float:
    """Floating-point operations of a training step with a frozen base: forward, and backward to the activations.

    Two for every weight and position in each direction; the embedding counts once, as the output layer, and only at
    the target positions. Attention scores and the adapters (about 1%) are not counted.
    """
    layers = sum(leaf.size for leaf in jax.tree.leaves(base.params["layers"]) if leaf.ndim == 2)
    head = base.model.config.vocab_size * base.model.config.width
    return 4.0 * (layers * rows * length + head * targets)
