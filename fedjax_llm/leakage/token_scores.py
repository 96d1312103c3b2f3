"""What one forward pass tells about every target token: the common ground of the attacks that read likelihoods."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import lora
from fedjax_llm.data.packing import Shape, pack, target_count
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.training.trunk import TrunkCache, below_of
from fedjax_llm.types import Adapters, Params

_CHUNK = 256
"""Target slots whose logits are held at a time."""


class TokenScores(NamedTuple):
    """Of one example's T target tokens, f64 [T] each, in nats.

    Attributes:
      log_prob: log p(x_t | x_<t).
      mean: the expectation of log p(z | x_<t) over z drawn from the model itself.
      std: its standard deviation.
      best: the log-probability of the likeliest token; where ``log_prob`` equals it, greedy decoding gives x_t.
    """

    log_prob: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    best: np.ndarray


def token_scores(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    examples: Sequence[EncodedExample],
    *,
    shapes: Sequence[Shape],
    advance: Callable[[int], None],
    trunk: TrunkCache | None = None,
) -> list[TokenScores]:
    """Scores the targets of N examples.

    Args:
      model: the frozen model.
      scaling: alpha / rank.
      params: its weights.
      adapters: shared by all rows, without a leading axis; ``{}`` for the base model.
      examples: any number.
      shapes: from ``packing.choose_shapes``; they decide speed and memory, never the result.
      advance: called with how many more examples are done.
      trunk: the hidden states below the adapters, where they are kept; ``adapters`` must not be ``{}`` then.

    Returns:
      One for each example, in their order.
    """
    found = [np.zeros((4, target_count(example))) for example in examples]
    for batch in pack([[examples]] if examples else [], shapes, clients=1):
        predicted = (batch.target_row, batch.target_position, batch.target_token)
        columns = slot_scores(model, scaling, params, adapters, batch.tokens, *predicted, below=below_of(trunk, batch))
        values = np.asarray(columns, np.float64)
        used = batch.target_weight > 0
        for row in range(len(batch.examples)):
            found[batch.index[row]][:] = values[:, used & (batch.target_row == row)]
        advance(len(batch.examples))
    return [TokenScores(*columns) for columns in found]


@partial(jax.jit, static_argnums=0)
def slot_scores(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    tokens: Array,
    row: Array,
    position: Array,
    token: Array,
    below: Array | None = None,
) -> Array:
    """The four columns of :class:`TokenScores` for K target slots, f32 [4, K].

    All moments come from one pass over the logits of a chunk; [K, V] never exists.
    """
    hidden = model.hidden(params, lora.scaled(adapters, scaling), tokens, below=below)

    def one(slot: tuple[Array, Array]) -> Array:
        state, target = slot
        logits = model.logits(params, state[None])[0]
        below_best = logits - jnp.max(logits)
        weight = jnp.exp(below_best)
        total = jnp.sum(weight)
        mean = jnp.sum(weight * below_best) / total
        square = jnp.sum(weight * below_best**2) / total
        normaliser = jnp.log(total)
        std = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
        return jnp.stack([below_best[target] - normaliser, mean - normaliser, std, -normaliser])

    return jax.lax.map(one, (hidden[row, position], token), batch_size=_CHUNK).T
