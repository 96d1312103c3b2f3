"""Small sites, plans of rounds over them, and the same rounds as plain loops: the oracle of the vectorised ones."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import tiny_adapters, tiny_model

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.federation.clients import clients_of, local_training_of
from fedjax_llm.federation.plan import Execution, Federation, RoundPlan, RoundReport
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.federation.sampling import round_key, sample_cohort, sample_steps
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import Adapters, Aggregation, RoundState

SCALING = 1.5
KEY = jax.random.key(7)
LENGTHS = (6, 9, 14)  # few, since the oracle compiles once for each
SIZES = (2, 5, 3, 7, 4)  # examples of the sites
Sites = tuple[tuple[str, tuple[EncodedExample, ...]], ...]
LAYOUTS = {
    "together": Execution(clients_per_chunk=3, tokens_per_microbatch=64, buckets=2),
    "one by one": Execution(clients_per_chunk=1, tokens_per_microbatch=160, buckets=1),
    "in pairs": Execution(clients_per_chunk=2, tokens_per_microbatch=48, buckets=1),
}


def toy_example(seed: int, length: int, prompt_length: int) -> EncodedExample:
    """Random tokens."""
    tokens = np.random.default_rng(seed).integers(0, 97, length).astype(np.int32)
    return EncodedExample(f"record-{seed}", tokens, prompt_length)


@cache
def toy_sites() -> Sites:
    """Five sites of unequal size; prompts of no, one and several tokens."""
    rng, sites = np.random.default_rng(0), []
    for site, size in enumerate(SIZES):
        examples = [toy_example(100 * site + i, rng.choice(LENGTHS), int(rng.integers(0, 5))) for i in range(size)]
        sites.append((f"site-{site}", tuple(examples)))
    return tuple(sites)


@cache
def toy_model(dropout: float = 0.0) -> tuple[Any, Any, Adapters]:
    """A model of one layer, its weights, and adapters of which no factor is zero."""
    model, params = tiny_model(layers=1, dropout=dropout)
    return model, params, tiny_adapters(model, targets=("q_proj", "down_proj"))


@cache
def toy_trainer(optimizer: str = "sgd", rate: float = 0.1, proximal: float = 0.0, dropout: float = 0.0) -> Trainer:
    """Cached, since every other transformation compiles anew."""
    return Trainer(toy_model(dropout)[0], SCALING, Optimizer(optimizer, rate).make(), proximal)


def toy_shapes(execution: Execution) -> tuple[Shape, ...]:
    """Those of all toy examples, whatever sites a test uses."""
    examples = [example for _, examples in toy_sites() for example in examples]
    return choose_shapes(examples, tokens_per_microbatch=execution.tokens_per_microbatch, buckets=execution.buckets)


def toy_plan(
    trainer: Trainer,
    local: LocalTraining,
    *,
    setting: str = "federated",
    layout: str = "together",
    cohort: int = 3,
    federation: Federation | None = None,
    aggregation: Aggregation | None = None,
    sites: Sites | None = None,
) -> RoundPlan:
    """A plan over the toy sites."""
    return RoundPlan(
        setting=setting,
        trainer=trainer,
        aggregation=aggregation or FedAvg().make(),
        federation=federation or Federation(),
        local=local_training_of(setting, local, cohort),
        execution=LAYOUTS[layout],
        shapes=toy_shapes(LAYOUTS[layout]),
        clients=clients_of(setting, sites or toy_sites()),
        cohort=1 if setting == "centralised" else cohort,
        key=KEY,
    )


def play(plan: RoundPlan, rounds: int = 2) -> tuple[RoundState, list[RoundReport]]:
    """Plays rounds from the toy adapters."""
    _, params, adapters = toy_model(plan.trainer.model.dropout)
    state, reports = initial_state(plan, adapters), []
    for _ in range(rounds):
        state, report = run_round(plan, params, state)
        reports.append(report)
    return state, reports


@partial(jax.jit, static_argnums=0)
def plain_loss(model: Any, params: Any, adapters: Adapters, tokens: jax.Array, prompt_length: int) -> tuple:
    """Summed negative log-likelihood of one unpadded example's answer with all its logits, and its gradient."""

    def loss(adapters: Adapters) -> jax.Array:
        scaled = {path: {"a": f["a"], "b": f["b"] * SCALING} for path, f in adapters.items()}
        logits = model.logits(params, model.hidden(params, scaled, tokens[None])[0])
        likelihood = jax.nn.log_softmax(logits[:-1])[jnp.arange(len(tokens) - 1), tokens[1:]]
        return -jnp.sum(likelihood * (jnp.arange(1, len(tokens)) >= prompt_length))

    return jax.value_and_grad(loss)(adapters)


def mean_gradient(params: Any, adapters: Adapters, batch: Sequence[EncodedExample], normalise: str) -> tuple:
    """Loss and gradient of a batch, example by example: a mean over examples, or over all their target tokens."""
    counts = [len(example.tokens) - max(example.prompt_length, 1) for example in batch]
    loss, gradient = 0.0, jax.tree.map(np.zeros_like, adapters)
    for example, count in zip(batch, counts, strict=True):
        share = 1 / sum(counts) if normalise == "token" else 1 / (count * len(batch))
        value, slope = plain_loss(toy_model()[0], params, adapters, example.tokens, example.prompt_length)
        loss, gradient = loss + share * value, jax.tree.map(lambda g, s, w=share: g + w * s, gradient, slope)
    return loss, gradient


def play_plainly(plan: RoundPlan, optimizer: Any, rounds: int = 2) -> Adapters:
    """The rounds of a federated plan as loops over clients, steps and examples.

    Args:
      plan: whose order of clients and examples to follow.
      optimizer: ``optimizer(schedule)`` gives an optax transformation with this learning-rate schedule over steps.
      rounds: how many.
    """
    _, params, server = toy_model()
    local, kept = plan.local, {}
    for number in range(1, rounds + 1):
        results, weights = [], []
        for c in sample_cohort(round_key(plan.key, number, "cohort"), len(plan.clients), plan.cohort):
            client = plan.clients[c]
            key = jax.random.fold_in(round_key(plan.key, number, "order"), client.id)
            steps = None if local.local_epochs else local.local_steps
            batches = sample_steps(key, client.examples, local.batch_size, steps, local.local_epochs)
            outer = local.round_schedule.factor(number - 1, plan.federation.rounds)
            factors = [outer * local.local_schedule.factor(s, len(batches)) for s in range(len(batches))]
            own = optimizer(lambda count, factors=factors: jnp.array(factors)[count % len(factors)])
            adapters = server
            memory = kept[c] if c in kept and local.keep_optimizer == "yes" else own.init(adapters)
            for batch in batches:
                _, gradient = mean_gradient(params, adapters, batch, local.normalise)
                mu = plan.trainer.proximal
                gradient = jax.tree.map(lambda g, a, s, mu=mu: g + mu * (a - s), gradient, adapters, server)
                updates, memory = own.update(gradient, memory, adapters)
                adapters = optax.apply_updates(adapters, updates)
            kept[c] = memory
            results.append(adapters)
            weights.append(len(client.examples) if plan.federation.weighting == "examples" else 1)
        server = jax.tree.map(lambda *leaves, w=weights: np.average(np.stack(leaves), axis=0, weights=w), *results)
    return server
