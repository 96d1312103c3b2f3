"""What the server's algorithms cost beside the clients' work, and what a round of very many clients takes.

Part of ``python -m experiments.bench --suite aggregation``.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.aggregation.catalogue import algorithms
from fedjax_llm.experiment.synthetic import dense_plan
from fedjax_llm.federation.rounds import run_round
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.runs.environment import peak_rss_bytes
from fedjax_llm.types import Aggregation, Local, PyTree, Stack, Sum, Trained, View

COHORT = 64
MANY = 1000
SVD = ("FlexLora", "LoraFair", "FedExLora", "HetLora")
"""Algorithms that take products or stacks of factors apart, and may take longer."""


def moved_view(algorithm: Aggregation, adapters: PyTree, cohort: int, seed: int = 0) -> View:
    """What the server sees of a cohort whose factors have moved at random."""
    _, shared = low_rank.partition(adapters, algorithm.personal)
    rng = np.random.default_rng(seed)
    deltas = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.01, (cohort, *leaf.shape)), jnp.float32), shared)
    messages = deltas
    if algorithm.client.report is not None:
        received = () if algorithm.broadcast is None else algorithm.broadcast(algorithm.init(shared))
        memory = () if algorithm.client.init is None else algorithm.client.init(shared)
        rank = jnp.int32(low_rank.rank_of(adapters))
        local = trees.repeat(Local(shared, memory, received, rank), cohort)
        end = jax.tree.map(jnp.add, shared, deltas)
        ones = jnp.ones(cohort)
        trained = Trained(deltas, end, ones, ones, *((ones, deltas) if algorithm.client.probe else ()))
        messages, _ = jax.jit(jax.vmap(algorithm.client.report))(trained, local)
    weights = jnp.ones(cohort)
    if algorithm.view is Stack:
        return Stack(messages, weights)
    return Sum(trees.weighted_sum(weights, messages), weights.sum())


def server_cases(base: BaseModel, lora: Lora, client_seconds: float) -> Iterator[dict[str, Any]]:
    """One case an algorithm: seconds of its update for a cohort, and their share of the clients' work.

    Args:
      base: the real model.
      lora: the adapters.
      client_seconds: what local training of a cohort takes.
    """
    adapters = low_rank.init(jax.random.key(0), lora, base.model, base.params)
    for kind in algorithms():
        algorithm = kind().make()
        _, shared = low_rank.partition(adapters, algorithm.personal)
        view, state, update = moved_view(algorithm, adapters, COHORT), algorithm.init(shared), jax.jit(algorithm.update)
        jax.block_until_ready(update(view, state, shared))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(update(view, state, shared))
            seconds.append(time.perf_counter() - began)
        spent = statistics.median(seconds)
        yield {
            "case": f"server/{kind.__name__}",
            "view": algorithm.view.__name__,
            "cohort": COHORT,
            "seconds": round(spent, 4),
            "client_seconds": round(client_seconds, 1),
            "share": round(spent / client_seconds, 5),
            "target": "at most 0.2" if kind.__name__ in SVD else "at most 0.05",
        }


def many_clients_case(base: BaseModel, lora: Lora) -> dict[str, Any]:
    """A round of a thousand clients, one step of one short example each: what a sum of updates takes in memory."""
    plan, state = dense_plan(base, lora, clients=MANY, steps=1, batch=1, length=16, chunk=16)
    began = time.perf_counter()
    after, report = run_round(plan, base.params, state)
    jax.block_until_ready(after.adapters)
    seconds = time.perf_counter() - began
    return {
        "case": f"round of {MANY} clients",
        "rank": lora.rank,
        "seconds": round(seconds, 1),
        "real_tokens_per_second": round(report.tokens / seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "target": f"peak below {6 * 2**30} bytes",
    }
