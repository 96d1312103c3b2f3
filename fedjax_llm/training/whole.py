"""Plain training of all weights, or of shared adapters alone, by one and the same step: for comparing the two.

The rows design freezes the base; here it moves, so the loss is computed without the shortcuts that rest on that.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedjax_llm import lora
from fedjax_llm.data.packing import Microbatch, Shape, pack, target_count
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.types import Adapters, Params, PyTree

Trained = Literal["weights", "adapters"]


class Whole(NamedTuple):
    """Training in progress: all weights, adapters without a leading axis (``{}``: none), the optimiser's state."""

    params: Params
    adapters: Adapters
    optimizer: PyTree


def start(optimizer: optax.GradientTransformation, params: Params, adapters: Adapters, trained: Trained) -> Whole:
    """Before the first step.

    Args:
      optimizer: the optax transformation.
      params: the pre-trained weights.
      adapters: fresh ones, or ``{}``.
      trained: what moves: all ``weights``, or the ``adapters``.
    """
    return Whole(params, adapters, optimizer.init(params if trained == "weights" else adapters))


def batches(
    examples: Sequence[EncodedExample], batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[Microbatch]:
    """One microbatch a step, all of one shape: examples in shuffled passes.

    Args:
      examples: at least one.
      batch_size: B.
      steps: how many.
      rng: of the order.
    """
    passes = -(-steps * batch_size // len(examples))
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(passes)])
    length = -(-max(len(one.tokens) for one in examples) // 8) * 8
    shape = Shape(batch_size, length, batch_size * max(map(target_count, examples)))
    work = [[examples[i] for i in order[s * batch_size : (s + 1) * batch_size]] for s in range(steps)]
    return pack([work], [shape], clients=1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def step(
    model: CausalLM,
    scaling: float,
    optimizer: optax.GradientTransformation,
    trained: Trained,
    state: Whole,
    batch: tuple[Array, ...],
) -> tuple[Whole, Array]:
    """One step on the mean over examples of each example's mean loss.

    Args:
      model: its pure functions.
      scaling: alpha / rank.
      optimizer: as for :func:`start`.
      trained: as for :func:`start`.
      state: the training in progress.
      batch: from :func:`arrays_of`.

    Returns:
      The next state, and the loss before the step (nats).
    """

    def loss(moving: Any) -> Array:
        params, adapters = (moving, state.adapters) if trained == "weights" else (state.params, moving)
        tokens, row, position, token, weight, count = batch
        hidden = model.hidden(params, lora.scaled(adapters, scaling), tokens)
        logits = model.logits(params, hidden[row, position])
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return jnp.sum(weight * nll) / count

    moving: Any = state.params if trained == "weights" else state.adapters
    value, gradient = jax.value_and_grad(loss)(moving)
    updates, kept = optimizer.update(gradient, state.optimizer, moving)
    moved: Any = optax.apply_updates(moving, updates)
    params, adapters = (moved, state.adapters) if trained == "weights" else (state.params, moved)
    return Whole(params, adapters, kept), value


def arrays_of(batch: Microbatch) -> tuple[Array, ...]:
    """What :func:`step` needs of a microbatch: tokens, and row, position, token and weight of its targets, and B."""
    columns = (batch.tokens, batch.target_row, batch.target_position, batch.target_token, batch.target_weight)
    return (*map(jnp.asarray, columns), jnp.float32(len(batch.examples)))
