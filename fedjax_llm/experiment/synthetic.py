"""Rounds on random tokens, for benchmarks: no text, exact shapes."""

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.data.packing import Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.federation.clients import clients_of
from fedjax_llm.federation.rounds import Execution, Federation, RoundPlan, initial_state
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import RoundState


def dense_plan(
    base: BaseModel, lora: Lora, *, clients: int, steps: int, batch: int, length: int
) -> tuple[RoundPlan, RoundState]:
    """A federated run in which every client has exactly its examples of one round, every token trained on.

    Args:
      base: the real model.
      lora: the adapters.
      clients: C, all in every round.
      steps: local steps a round.
      batch: B, examples a step.
      length: L, tokens an example.

    Returns:
      The plan (one microbatch a step, nothing padded), and the state before the first round.
    """
    rng = np.random.default_rng(0)
    sites = [
        (f"site-{c:02d}", tuple(_example(rng, base, length) for _ in range(steps * batch))) for c in range(clients)
    ]
    local = LocalTraining(batch_size=batch, local_steps=steps, optimizer=Optimizer("adamw", 1e-3), keep_optimizer="no")
    plan = RoundPlan(
        setting="federated",
        trainer=Trainer(base.model, lora.scaling, local.optimizer.make(), 0.0),
        aggregation=FedAvg().make(),
        federation=Federation(rounds=1_000_000),
        local=local,
        execution=Execution(clients_per_chunk=clients),
        shapes=(Shape(clients * batch, length, clients * batch * (length - 1)),),
        clients=clients_of("federated", sites),
        cohort=clients,
        key=jax.random.key(0),
    )
    return plan, initial_state(plan, low_rank.init(jax.random.key(1), lora, base.model))


def _example(rng: np.random.Generator, base: BaseModel, length: int) -> EncodedExample:
    """Random tokens of which all but the first are targets."""
    return EncodedExample("random", rng.integers(0, base.model.config.vocab_size, length).astype(np.int32), 1)


def training_flops(base: BaseModel, rows: int, length: int, targets: int) -> float:
    """Floating-point operations of a training step with a frozen base: forward, and backward to the activations.

    Two for every weight and position in each direction; the embedding counts once, as the output layer, and only at
    the target positions. Attention scores and the adapters (about 1%) are not counted.
    """
    layers = sum(leaf.size for leaf in jax.tree.leaves(base.params["layers"]) if leaf.ndim == 2)
    head = base.model.config.vocab_size * base.model.config.width
    return 4.0 * (layers * rows * length + head * targets)
