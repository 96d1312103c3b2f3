"""Held-out answers: how likely a model finds them, token by token, forward only."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import lora
from fedjax_llm.data.packing import Shape, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.training.trunk import TrunkCache, below_of
from fedjax_llm.types import Adapters, Params

_CHUNK = 256
"""Target slots whose logits are held at a time."""


class Scores(NamedTuple):
    """How well answers are predicted; [N] each, summed over an example's (or a record's) answer tokens.

    Attributes:
      nll: f64, negative log-likelihood in nats.
      tokens: int64, how many answer tokens, the end of turn included.
      correct: int64, how many of them were the likeliest next token.
    """

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


def score(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    examples: Sequence[EncodedExample],
    *,
    shapes: Sequence[Shape],
    advance: Callable[[int], None],
    trunk: TrunkCache | None = None,
) -> Scores:
    """Scores the answers of N examples.

    Args:
      model: the frozen model.
      scaling: alpha / rank.
      params: its weights.
      adapters: shared by all rows, without a leading axis; ``{}`` for the base model.
      examples: any number.
      shapes: from ``packing.choose_shapes``; they decide speed and memory, never the result.
      advance: called with how many more examples are done.
      trunk: the hidden states below the adapters, where they are kept; ``adapters`` must not be ``{}`` then.
    """
    totals = Scores(np.zeros(len(examples)), np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int64))
    for batch in pack([[examples]] if examples else [], shapes, clients=1):
        used = batch.target_weight > 0
        predicted = (batch.target_row, batch.target_position, batch.target_token)
        nll, correct = slots(
            model, scaling, params, adapters, batch.tokens, None, None, *predicted, below=below_of(trunk, batch)
        )
        example = batch.index[batch.target_row[used]]
        np.add.at(totals.nll, example, np.asarray(nll, np.float64)[used])
        np.add.at(totals.correct, example, np.asarray(correct)[used])
        np.add.at(totals.tokens, example, 1)
        advance(len(np.unique(example)))
    return totals


def by_record(examples: Sequence[EncodedExample], scores: Scores) -> tuple[list[str], Scores]:
    """Record ids in the order in which they first come, and the sums over each record's examples."""
    place: dict[str, int] = {}
    record = np.array([place.setdefault(example.record_id, len(place)) for example in examples], np.int64)
    sums = [np.zeros(len(place), column.dtype) for column in scores]
    for total, column in zip(sums, scores, strict=True):
        np.add.at(total, record, column)
    return list(place), Scores(*sums)


@partial(jax.jit, static_argnums=0)
def slots(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    tokens: Array,
    positions: Array | None,
    mask: Array | None,
    row: Array,
    position: Array,
    token: Array,
    below: Array | None = None,
) -> tuple[Array, Array]:
    """Negative log-likelihood (f32 [K], nats) of target slots, and whether each was the likeliest token (bool [K]).

    The logits are computed in chunks: [K, V] never exists.
    """
    hidden = model.hidden(params, lora.scaled(adapters, scaling), tokens, positions, mask, below=below)

    def one(state: Array, target: Array) -> tuple[Array, Array]:
        logits = model.logits(params, state[None])[0]
        return jax.nn.logsumexp(logits) - logits[target], jnp.argmax(logits) == target

    return jax.lax.map(lambda slot: one(*slot), (hidden[row, position], token), batch_size=_CHUNK)
