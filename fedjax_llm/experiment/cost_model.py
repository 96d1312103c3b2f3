"""What computing costs: the amounts of each kind of work, and the seconds that a unit of each takes on this machine.

A linear model: ``seconds = sum over kinds of amount x seconds a unit``. Amounts follow from shapes alone, and the
seconds are fitted to what was timed. Frozen weights need no gradient of their own, so a layer costs 2 operations a
weight and position forward, and 2 more where a gradient passes through it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm.data.packing import Shape
from fedjax_llm.models.causal_lm import layer_weights, lowest_adapted, module_paths
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.types import Adapters

_LOGITS = 256
"""Target slots whose logits are held at a time (``training/losses.py``)."""


@dataclass(frozen=True)
class Work:
    """Amounts of work by kind; they add up.

    Attributes:
      forward: operations in layers through which no gradient passes.
      training: operations in layers with their backward pass.
      logits: operations of the output layer, forward only.
      training_logits: those with the gradient of the hidden states.
      scores: entries of attention matrices; with a backward pass they count three times.
      adapters: operations of the rows' own adapters.
      states: numbers of adapters that are gathered, summed or stepped.
      microbatches: programs that are started on a microbatch.
      chunks: groups of clients that are set up, and whose updates are added.
      decoding: bytes of weights that are read while answers are written token by token.
      reports: of a run.
    """

    forward: float = 0.0
    training: float = 0.0
    logits: float = 0.0
    training_logits: float = 0.0
    scores: float = 0.0
    adapters: float = 0.0
    states: float = 0.0
    microbatches: float = 0.0
    chunks: float = 0.0
    decoding: float = 0.0
    reports: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(*(getattr(self, kind) + getattr(other, kind) for kind in KINDS))

    def times(self, count: float) -> "Work":
        """The same so many times."""
        return Work(*(getattr(self, kind) * count for kind in KINDS))

    @property
    def operations(self) -> float:
        """Floating-point operations of matrix products with weights."""
        return self.forward + self.training + self.logits + self.training_logits + self.adapters


KINDS = tuple(field.name for field in fields(Work))


class Constants(NamedTuple):
    """What a machine takes.

    Attributes:
      seconds: of a unit of each kind of work.
      memory: how many times the bytes of :func:`step_bytes` a process grows by.
      rough: whether they are guessed from the speed of a matrix product alone.
    """

    seconds: Mapping[str, float]
    memory: float
    rough: bool = False


_SHARE_OF_PEAK = {"forward": 0.75, "training": 0.7, "logits": 0.5, "training_logits": 0.7, "adapters": 0.15}
_ROUGH = {
    "scores": 2e-9,
    "states": 4e-9,
    "microbatches": 1e-3,
    "chunks": 5e-2,
    "decoding": 9e-11,
    "reports": 4.0,
}


def rough_constants(peak: float) -> Constants:
    """A guess for a processor whose matrix products reach ``peak`` operations a second."""
    return Constants({**{kind: 1 / (share * peak) for kind, share in _SHARE_OF_PEAK.items()}, **_ROUGH}, 1.0, True)


def seconds_of(constants: Constants, work: Work) -> float:
    """How long work takes."""
    return sum(constants.seconds[kind] * getattr(work, kind) for kind in KINDS)


def fit(observed: Sequence[tuple[Work, float]], prior: Constants, trust: float = 0.02) -> Constants:
    """Constants under which timed work takes the time that it took.

    First the prior's constants of all that was observed are scaled together, by the median of how much longer it took:
    machines differ in speed above all. Then come least squares of relative errors, with no constant below zero:
    ``min |A x - 1|^2 + trust |x - 1|^2`` over ``x >= 0`` (Lawson and Hanson 1974, NNLS). ``x`` are the constants in
    units of the scaled prior's, and row i of ``A`` is the time that this gives each kind of observation i, in units of
    the time that it took. So what no observation tells apart keeps the prior's proportions, and what none of them has
    keeps its value.

    Args:
      observed: pieces of work and their seconds, all above zero.
      prior: from before.
      trust: in the prior, as a number of observations.
    """
    from scipy.optimize import nnls  # runs that learn nothing do without

    if not observed:
        return prior
    before = np.array([prior.seconds[kind] for kind in KINDS])
    amounts = np.array([[getattr(work, kind) for kind in KINDS] for work, _ in observed], np.float64)
    took = np.array([seconds for _, seconds in observed])
    before[amounts.any(axis=0)] *= np.median(took / (amounts @ before))
    rows = amounts * before / took[:, None]
    ridge = np.sqrt(trust)
    system = np.concatenate([rows, ridge * np.eye(len(KINDS))])
    wanted = np.concatenate([np.ones(len(observed)), np.full(len(KINDS), ridge)])
    scale, _ = nnls(system, wanted)
    return Constants(dict(zip(KINDS, (before * scale).tolist(), strict=True)), prior.memory)


class Size(NamedTuple):
    """What the amounts depend on, of a model with adapters.

    Attributes:
      layers: of the model.
      lowest: how many of them lie below the lowest adapted one.
      weights: in the matrices of a layer.
      output: weights of the output layer.
      vocabulary: V.
      width: D.
      heads: of a layer's attention.
      activations: numbers a position that a layer's modules take in and give out.
      adapters: numbers in the adapters.
      trained: numbers of those that are trained.
      itemsize: bytes of a weight.
      remat: what is computed again in the backward pass.
    """

    layers: int
    lowest: int
    weights: float
    output: float
    vocabulary: int
    width: int
    heads: int
    activations: int
    adapters: int
    trained: int
    itemsize: int
    remat: str


def size_of(base: BaseModel, adapters: Adapters, frozen: Adapters) -> Size:
    """The size of a model with its trained and its frozen factors."""
    config, params = base.model.config, base.params
    whole = low_rank.join(adapters, frozen)
    return Size(
        layers=config.layers,
        lowest=lowest_adapted(whole),
        weights=layer_weights(base.model) / config.layers,
        output=config.vocab_size * config.width,
        vocabulary=config.vocab_size,
        width=config.width,
        heads=config.heads,
        activations=sum(sum(pair) for pair in module_paths(base.model).values()) // config.layers,
        adapters=low_rank.size(whole),
        trained=low_rank.size(adapters),
        itemsize=jax.tree.leaves(params)[0].dtype.itemsize,
        remat=base.model.remat,
    )


def training_work(size: Size, shape: Shape, slots: int, trunk: bool) -> Work:
    """Gradients of a microbatch.

    Args:
      size: of the model.
      shape: M rows of L tokens, with K target slots.
      slots: C, clients whose states are held.
      trunk: whether what enters the lowest adapted layer is known.
    """
    positions, upper = shape.rows * shape.length, size.layers - size.lowest
    lower = 0 if trunk else size.lowest
    passes = 6 if size.remat == "blocks" else 4
    return Work(
        forward=2 * size.weights * lower * positions,
        training=passes * size.weights * upper * positions,
        training_logits=4 * size.output * shape.targets,
        scores=size.heads * shape.length * positions * (lower + 3 * upper),
        adapters=6 * size.adapters * positions,
        states=(2 * shape.rows + 2 * slots) * size.trained,
        microbatches=1,
    )


def step_work(size: Size, slots: int) -> Work:
    """An optimiser's step of the clients of a chunk."""
    return Work(states=4 * slots * size.trained)


def scoring_work(size: Size, shape: Shape, first: int) -> Work:
    """Layers ``first`` and up of a microbatch, and the probabilities of its K targets, forward only."""
    positions, layers = shape.rows * shape.length, size.layers - first
    return Work(
        forward=2 * size.weights * layers * positions,
        logits=2 * size.output * shape.targets,
        scores=size.heads * shape.length * positions * layers,
        adapters=2 * size.adapters * positions,
        microbatches=1,
    )


def trunk_work(size: Size, rows: int, length: int) -> Work:
    """The layers below the adapters, for a microbatch."""
    positions = rows * length
    scores = size.heads * length * positions * size.lowest
    return Work(forward=2 * size.weights * size.lowest * positions, scores=scores, microbatches=1)


def decoding_work(size: Size, rows: int, length: int, new: int) -> Work:
    """Reading prompts [rows, length], and ``new`` tokens after them, one by one: each reads all weights."""
    read = scoring_work(size, Shape(rows, length, rows), 0)
    return read + Work(decoding=new * size.itemsize * (size.layers * size.weights + size.output))


def step_bytes(size: Size, shape: Shape, slots: int) -> float:
    """What a training step holds at most, apart from weights: activations, logits, the rows' adapters and gradients."""
    positions, upper = shape.rows * shape.length, size.layers - size.lowest
    layer = size.itemsize * positions * size.activations + 8 * size.heads * shape.length * positions
    kept = layer + upper * size.itemsize * positions * size.width if size.remat == "blocks" else upper * layer
    logits = 8 * min(shape.targets, _LOGITS) * size.vocabulary
    return kept + logits + 4 * size.trained * (2 * shape.rows + 4 * slots)
