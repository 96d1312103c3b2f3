"""The constants of the cost model on this machine: kept in the cache folder, measured, and refined by every run."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_llm.assets import cache_dir
from fedjax_llm.data.packing import Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation import heldout
from fedjax_llm.experiment.cost_model import (
    KINDS,
    Constants,
    Work,
    decoding_work,
    fit,
    rough_constants,
    scoring_work,
    size_of,
    step_work,
    training_work,
)
from fedjax_llm.experiment.synthetic import local_training, plan_on
from fedjax_llm.experiment.timing import matmul_peak, timed
from fedjax_llm.federation.plan import Execution
from fedjax_llm.lora import Lora
from fedjax_llm.models.decoding import generate
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.truncation import truncated
from fedjax_llm.runs import directory
from fedjax_llm.runs.environment import usable_cores

FORMAT = 2
"""Part of every key: raise it whenever the kinds of work, or memory, are counted differently."""
Timed = tuple[Work, float]
"""Work, and the seconds that it took."""


def place_of(base: BaseModel) -> Path:
    """The file of a model's constants: by weights, type, device, cores, and versions."""
    device = jax.devices()[0]
    kind = (device.platform, device.device_kind, jax.device_count(), usable_cores())
    dtype = str(jax.tree.leaves(base.params)[0].dtype)
    versions = (version("fedjax_llm"), version("jaxlib"), FORMAT)
    key = json.dumps([base.fingerprint, dtype, *kind, *versions])
    return cache_dir() / "cost" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def stored(base: BaseModel) -> Constants | None:
    """The constants that were kept for a model on this machine; ``None`` where there are none, or they are damaged."""
    try:
        entry = json.loads(place_of(base).read_text())
        seconds = {kind: float(entry["seconds"][kind]) for kind in KINDS}
        values = np.array([*seconds.values(), float(entry["memory"])])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (np.isfinite(values).all() and (values >= 0).all()):
        return None
    return Constants(seconds, float(values[-1]))


def store(base: BaseModel, constants: Constants) -> None:
    """Keeps constants, whole or not at all; a folder that cannot be written costs the next prediction, nothing else."""
    path = place_of(base)
    with suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"seconds": dict(constants.seconds), "memory": constants.memory}
        directory.write_bytes(path, json.dumps(entry).encode())


def known(base: BaseModel) -> Constants:
    """The kept constants, else a guess."""
    return stored(base) or _rough()


def refined(constants: Constants, timed: Sequence[Timed], grown: float, expected: float) -> Constants:
    """Constants after a run.

    Args:
      constants: from before.
      timed: what the run computed, and how long it took.
      grown: bytes by which the process grew.
      expected: bytes by which it should have grown, with a factor of 1.
    """
    memory = grown / expected if grown > 0 and expected > 0 else constants.memory
    return fit([one for one in timed if one[1] > 0], constants)._replace(memory=memory)


def _rough() -> Constants:
    """A guess from the speed of one matrix product of a layer's shape, which takes a third of a second.

    The best of many: a process's first products take up to half as long again as later ones.
    """
    return rough_constants(matmul_peak([(512, 1024, 1024)], repeats=40))


def calibrated(base: BaseModel, lora: Lora) -> Constants:
    """Constants measured on the model's first layers, which takes some seconds once the programs are compiled.

    Args:
      base: the whole model.
      lora: adapters like the run's; rank and modules are its own.
    """
    cut = truncated(base, min(3, base.model.config.layers))
    return fit(list(measurements(cut, replace(lora, layers=(), ranks=()))), _rough(), 1e-3)


def measurements(base: BaseModel, lora: Lora) -> Iterator[Timed]:
    """Small pieces of each kind of work, and what they take."""
    top = replace(lora, layers=(-1,))
    wide, long, few = Shape(6, 64, 378), Shape(1, 384, 383), Shape(6, 64, 48)
    yield training_step(base, lora, wide)
    yield training_step(base, lora, long)
    yield training_step(base, lora, few)
    if base.model.config.layers > 1:
        yield training_step(base, top, few)
    yield scored(base, lora, wide)
    yield scored(base, lora, few)
    yield answered(base, lora, 4, 64, 1)
    yield answered(base, lora, 4, 64, 17)


def training_step(base: BaseModel, lora: Lora, shape: Shape) -> Timed:
    """A client's step on one microbatch, by the programs that a round uses."""
    sites = [("site", examples_of(base, shape))]
    execution = Execution(clients_per_chunk=1, trunk_megabytes=0)
    plan, state = plan_on(base, lora, sites, steps=1, execution=execution, shapes=(shape,))
    packed, trained = local_training(base, plan, state)
    batches = packed()
    size = size_of(base, state.adapters, {})
    return training_work(size, shape, 1, trunk=False) + step_work(size, 1), _best(lambda: trained(batches).adapters)


def scored(base: BaseModel, lora: Lora, shape: Shape) -> Timed:
    """Held-out scores of one microbatch."""
    sites = [("site", examples_of(base, shape))]
    _, state = plan_on(base, lora, sites, steps=1, execution=Execution(), shapes=(shape,))
    options = {"shapes": (shape,), "advance": lambda count: None}

    def once() -> Any:
        return heldout.score(base.model, lora.scaling, base.params, state.adapters, sites[0][1], **options).nll

    return scoring_work(size_of(base, state.adapters, {}), shape, 0), _best(once)


def answered(base: BaseModel, lora: Lora, rows: int, length: int, new: int) -> Timed:
    """Greedy answers that never end early."""
    sites = [("site", examples_of(base, Shape(1, length, length - 1)))]
    _, state = plan_on(base, lora, sites, steps=1, execution=Execution())
    prompts = [sites[0][1][0].tokens.tolist()] * rows

    def once() -> Any:
        options = {"max_new_tokens": new, "end_ids": (), "pad_id": 0}
        return generate(base.model, base.params, state.adapters, prompts, **options)

    return decoding_work(size_of(base, state.adapters, {}), rows, length, new), _best(once)


def examples_of(base: BaseModel, shape: Shape) -> tuple[EncodedExample, ...]:
    """Random tokens that fill a shape's rows and target slots."""
    rng, each = np.random.default_rng(0), shape.targets // shape.rows
    tokens = rng.integers(0, base.model.config.vocab_size, (shape.rows, shape.length)).astype(np.int32)
    return tuple(EncodedExample(str(n), row, shape.length - each) for n, row in enumerate(tokens))


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the faster of two, after one that compiles."""
    return min(timed(work, 2))
