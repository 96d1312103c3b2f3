"""How a round's time and memory grow with what it is given: clients, examples, length, rank and depth.

Part of ``python -m experiments.bench --suite growth``. One thing grows at a time, on the model's first layers where
that is enough to show it. Microbatches keep their size, so that memory may only grow with what clients hold.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fedjax_llm.data.packing import Shape
from fedjax_llm.experiment.prediction import resident_bytes
from fedjax_llm.experiment.synthetic import dense_plan, training_flops
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.truncation import truncated
from fedjax_llm.types import RoundState

_LAYERS = 6
_SLOTS = 16
"""Clients whose states are held at a time."""
PeakDuring = Callable[[Callable[[], Any]], int | None]
"""Runs work once, and gives the most bytes that the process held meanwhile; ``None`` where nothing tells."""


@dataclass(frozen=True)
class Point:
    """A round.

    Attributes:
      axis: what grows.
      value: how far.
      clients: C.
      examples: of a client, in one step.
      length: tokens of an example.
      rank: of the adapters, on q and v of every layer.
      layers: of the model, from the first on.
      microbatch: tokens of a microbatch.
    """

    axis: str
    value: int
    clients: int = 4
    examples: int = 4
    length: int = 32
    rank: int = 8
    layers: int = _LAYERS
    microbatch: int = 256


def points(depth: int) -> list[Point]:
    """All points, for a model of ``depth`` layers."""
    depths = [layers for layers in (1, 3, 6, 12, 30) if layers < depth] + [depth]
    return [
        *(Point("clients", n, clients=n, examples=1, length=16, layers=min(3, depth)) for n in (1, 10, 100, 1000)),
        *(Point("examples a client", n, examples=n, layers=min(_LAYERS, depth)) for n in (2, 4, 8, 16, 32)),
        *(Point("tokens an example", n, length=n, layers=min(_LAYERS, depth)) for n in (16, 32, 64, 128, 256)),
        *(Point("rank", n, rank=n, layers=min(_LAYERS, depth)) for n in (1, 4, 16, 64)),
        *(Point("layers", n, layers=n) for n in depths),
    ]


def growth_suite(base: BaseModel, peak_during: PeakDuring, plot: Path | None) -> Iterator[dict[str, Any]]:
    """A case a point: seconds of a round, real tokens, and peak memory while it ran; and their picture.

    Args:
      base: the whole model.
      peak_during: measures memory.
      plot: where to draw, as ``.svg`` and ``.png``; ``None``: nowhere.
    """
    found = []
    for point in points(base.model.config.layers):
        jax.clear_caches()  # programs of the points before are no memory of this one
        gc.collect()
        found.append(measured(base, point, peak_during))
        yield found[-1]
    if plot is not None:
        from fedjax_llm.runs.growth_figures import write_growth  # matplotlib takes a second

        write_growth(found, plot)


def measured(base: BaseModel, point: Point, peak_during: PeakDuring) -> dict[str, Any]:
    """Times a round of a point, after one of its first clients that compiles the programs."""
    cut = truncated(base, point.layers)
    plan, state = plan_of(cut, point)
    few = plan._replace(clients=plan.clients[:_SLOTS], cohort=min(plan.cohort, _SLOTS))
    run_round(few, cut.params, initial_state(few, state.adapters))
    found: dict[str, Any] = {}

    def work() -> Any:
        began = time.perf_counter()
        after, report = run_round(plan, cut.params, state)
        jax.block_until_ready(after.adapters)
        found.update(seconds=time.perf_counter() - began, tokens=report.tokens, padded=report.padded_tokens)
        return after.adapters

    held, peak = resident_bytes(), peak_during(work)
    return {
        "case": f"{point.axis} {point.value}",
        "axis": point.axis,
        "value": point.value,
        "seconds": round(found["seconds"], 4),
        "real_tokens": found["tokens"],
        "padded_tokens": found["padded"],
        "seconds_per_token": found["seconds"] / found["tokens"],
        "work": operations(cut, point, found["padded"]),
        "layers": point.layers,
        "held_bytes": held,
        "peak_rss_bytes": peak,
    }


def plan_of(base: BaseModel, point: Point) -> tuple[RoundPlan, RoundState]:
    """A point's rounds, in microbatches of one size."""
    lora = Lora(rank=point.rank, alpha=2.0 * point.rank, targets=("q_proj", "v_proj"))
    counts = {"clients": point.clients, "steps": 1, "batch": point.examples, "length": point.length}
    plan, state = dense_plan(base, lora, **counts, chunk=min(_SLOTS, point.clients))
    most = min(point.clients, _SLOTS) * point.examples
    rows = min(most, max(point.microbatch // point.length, 1))
    return plan._replace(shapes=(Shape(rows, point.length, rows * (point.length - 1)),)), state


def operations(base: BaseModel, point: Point, tokens: int) -> float:
    """Floating-point operations of a round, about: layers, adapters and the output layer, forward and backward."""
    config = base.model.config
    adapters = point.rank * point.layers * (3 * config.width + config.kv_heads * config.head_dim)
    return training_flops(base.model, tokens, tokens) + 6.0 * tokens * adapters
