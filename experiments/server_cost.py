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

from fedjax_llm import aggregation, trees
from fedjax_llm import lora as low_rank
from fedjax_llm.catalogue import makers
from fedjax_llm.experiment.synthetic import dense_plan
from fedjax_llm.experiment.timing import timed
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.release import template
from fedjax_llm.federation.rounds import run_round
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.runs.environment import peak_rss_bytes
from fedjax_llm.types import PyTree, Stack, Sum, View

COHORT = 64
MANY = 1000
SVD = ("FlexLora", "LoraFair", "FedExLora", "HetLora")
"""Algorithms that take products or stacks of factors apart, and may take longer."""


def random_view(plan: RoundPlan, adapters: PyTree, cohort: int, seed: int = 0) -> View:
    """What the server of a plan sees of a cohort, with numbers drawn at random."""
    rng = np.random.default_rng(seed)
    message = template(plan, adapters)
    stacked = jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(0, 0.01, (cohort, *leaf.shape))), jnp.float32), message
    )
    weights = jnp.ones(cohort)
    if plan.aggregation.view is Stack:
        return Stack(stacked, weights)
    return Sum(trees.weighted_sum(weights, stacked), weights.sum())


def server_cases(plan: RoundPlan, adapters: PyTree, client_seconds: float) -> Iterator[dict[str, Any]]:
    """One case an algorithm: seconds of its update for a cohort, and their share of the clients' work.

    Args:
      plan: any, over the real model.
      adapters: that are trained.
      client_seconds: what local training of a cohort takes.
    """
    for kind in makers(aggregation):
        algorithm = kind().make()
        _, shared = low_rank.partition(adapters, algorithm.personal)
        view = random_view(plan._replace(aggregation=algorithm), adapters, COHORT)
        state, update = algorithm.init(shared), jax.jit(algorithm.update)
        spent = statistics.median(timed(lambda: update(view, state, shared), 3))  # noqa: B023
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
