"""Negative log-likelihood of target tokens, without ever holding all the logits."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.types import Params

_CHUNK = 256
"""Target slots whose logits are held at a time: 256 x 49152 x 4 bytes is 48 MiB."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def target_nll(model: CausalLM, params: Params, hidden: Array, tokens: Array) -> Array:
    """Negative log-likelihood (nats) of each target.

    The output layer is frozen, so the gradient with respect to ``hidden`` is computed chunk by chunk in the forward
    pass, while the logits are at hand. Nothing flows to ``params``.

    Args:
      model: whose ``logits`` to use.
      params: the frozen weights.
      hidden: [K, D], the states that predict the targets.
      tokens: int32 [K].

    Returns:
      f32 [K].
    """
    return _in_chunks(lambda h, t: _nll(model, params, h, t), hidden, tokens)


def _nll(model: CausalLM, params: Params, hidden: Array, tokens: Array) -> Array:
    """The plain computation."""
    logits = model.logits(params, hidden)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def _forward(model, params, hidden, tokens):
    """Values and, since every value depends on its own hidden state alone, all gradients by one pull-back of ones."""

    def chunk(h: Array, t: Array) -> tuple[Array, Array]:
        value, pull = jax.vjp(lambda h: _nll(model, params, h, t), h)
        return value, pull(jnp.ones_like(value))[0]

    return _in_chunks(chunk, hidden, tokens)


def _backward(model, gradient, cotangent):
    """The chain rule for independent slots."""
    return None, (cotangent[:, None] * gradient).astype(gradient.dtype), None


target_nll.defvjp(_forward, _backward)


def _in_chunks(function, hidden: Array, tokens: Array):
    """Maps a function of [k, D], [k] over chunks of the first axis; the last chunk is filled up with zeros."""
    count = hidden.shape[0]
    if count <= _CHUNK:
        return function(hidden, tokens)
    chunks = -(-count // _CHUNK)
    size = -(-count // chunks)
    spare = chunks * size - count
    parts = (
        jnp.pad(hidden, ((0, spare), (0, 0))).reshape(chunks, size, -1),
        jnp.pad(tokens, (0, spare)).reshape(chunks, size),
    )
    mapped = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda leaf: leaf.reshape(chunks * size, *leaf.shape[2:])[:count], mapped)
