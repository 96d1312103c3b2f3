"""Rows: one (client, example) pair each, or several of a client's, all clients in one pass over the frozen base.

The gradient of the summed row losses with respect to the rows' own copies of the adapters is the stack of per-example
gradients (of per-row ones, where examples share rows); see ``docs/design.md``, section 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.data.packing import Microbatch
from fedjax_llm.data.shared_rows import tree_mask
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.training.losses import target_nll
from fedjax_llm.training.trunk import TrunkCache, below_of
from fedjax_llm.types import Adapters, Params


class Rows(NamedTuple):
    """A microbatch on the device: the arrays of ``data.packing.Microbatch`` that the gradient needs.

    ``below`` [M, L, D] is what enters the lowest adapted layer, where that is known already (``training/trunk.py``);
    ``position`` and ``branch`` [M, L] are there where examples share rows.
    """

    tokens: Array
    client: Array
    step: Array
    index: Array
    unit: Array
    target_row: Array
    target_position: Array
    target_token: Array
    target_weight: Array
    below: Array | None = None
    position: Array | None = None
    branch: Array | None = None


def rows_of(batch: Microbatch, trunk: TrunkCache | None = None) -> Rows:
    """The rows of a microbatch; with a trunk, what enters the lowest adapted layer is not computed again."""
    arrays = {name: getattr(batch, name) for name in Rows._fields if name != "below"}
    return Rows(**arrays, below=below_of(trunk, batch))


def row_losses(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    rows: Rows,
    dropout_keys: Array | None = None,
    frozen: Adapters | None = None,
) -> Array:
    """The loss of each row: the weighted sum of its targets' negative log-likelihoods.

    Args:
      model: the frozen model.
      scaling: alpha / rank.
      params: its weights.
      adapters: every row's own, leaves [M, ...]; or shared ones, leaves [...].
      rows: a microbatch.
      dropout_keys: [M], or ``None`` for no dropout.
      frozen: factors that are not trained, leaves [...].

    Returns:
      f32 [M], nats.
    """
    whole = low_rank.scaled(low_rank.join(adapters, frozen or {}), scaling)
    shared = {} if rows.branch is None else {"positions": rows.position, "mask": tree_mask(rows.branch)}
    hidden = model.hidden(params, whole, rows.tokens, dropout_keys=dropout_keys, below=rows.below, **shared)
    picked = hidden[rows.target_row, rows.target_position]
    weighted = rows.target_weight * target_nll(model, params, picked, rows.target_token)
    return jax.ops.segment_sum(weighted, rows.target_row, rows.tokens.shape[0])


def example_gradients(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    rows: Rows,
    client_keys: Array,
    frozen: Adapters | None = None,
) -> tuple[Array, Adapters]:
    """Losses and per-example gradients of a microbatch.

    Args:
      model: the frozen model; its ``dropout`` decides whether the keys are used.
      scaling: alpha / rank.
      params: its weights.
      adapters: of the clients, leaves [C, ...].
      rows: a microbatch; ``rows.client`` [M] are slots of ``adapters``.
      client_keys: typed keys [C] of this round.
      frozen: factors that are not trained, leaves [...].

    Returns:
      (f32 [M], leaves [M, ...]). Padding rows have loss and gradient zero.
    """
    keys = row_keys(client_keys, rows) if model.dropout else None

    def total(own: Adapters) -> tuple[Array, Array]:
        losses = row_losses(model, scaling, params, own, rows, keys, frozen)
        return jnp.sum(losses), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(trees.take(adapters, rows.client))
    return losses, gradients


def row_keys(client_keys: Array, rows: Rows) -> Array:
    """A key for each row [M] that depends on client, step and place in the batch, never on the packing."""

    def key(client: Array, step: Array, index: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(client_keys[client], step), index)

    return jax.vmap(key)(rows.client, rows.step, rows.index)
