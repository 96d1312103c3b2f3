"""One prompt, token by token, with two compiled programs whatever its length: what a server must have ready."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.models.causal_lm import Cache, CausalLM
from fedjax_llm.models.decoding import Sampler, left_padded, prompt_cache, token_limits
from fedjax_llm.types import Adapters, Params

_CHUNK = 32
"""Tokens of a prompt that are read at a time; prompts are filled up to a multiple of it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tempered:
    """Sampling at a temperature that may change without a new compilation; at zero, the most likely token.

    Attributes:
      key: typed; ``fold_in`` of the step gives each step's own.
      temperature: a scalar, zero or positive.
    """

    key: Array
    temperature: Array

    def __call__(self, logits: Array, step: Array) -> Array:
        """[M, V] -> [M]."""
        # The divisor must not be zero even where its quotient is not used.
        divisor = jnp.where(self.temperature > 0, self.temperature, 1.0)
        drawn = jax.random.categorical(jax.random.fold_in(self.key, step), logits / divisor)
        return jnp.where(self.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def stream_in_chunks(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    prompt: Sequence[int],
    *,
    longest_prompt: int,
    most_new_tokens: int,
    max_new_tokens: int,
    end_ids: Collection[int],
    sampler: Sampler,
) -> Iterator[int]:
    """Continues a prompt as :func:`~fedjax_llm.models.decoding.stream` does; reads it in chunks of equal size.

    Calls that differ in prompt, ``max_new_tokens`` and the values of the sampler share their compiled programs.

    Args:
      model: the frozen model.
      params: its weights.
      adapters: scaled factors, shared; ``{}`` for the base model.
      prompt: token ids, at most ``longest_prompt``.
      longest_prompt: that the cache has room for.
      most_new_tokens: that the cache has room for.
      max_new_tokens: at most; it also ends where the model's context or the cache is full.
      end_ids: tokens after which it ends; they are not given out.
      sampler: chooses the tokens.

    Raises:
      UserError: the prompt is empty or fills the model's context (at the call, not at the first token).
      ValueError: the prompt is longer than ``longest_prompt``.
    """
    if len(prompt) > longest_prompt:
        raise ValueError(f"{len(prompt)} tokens are more than {longest_prompt}")
    (limit,) = token_limits(model, [prompt], min(max_new_tokens, most_new_tokens))
    room = -(-longest_prompt // _CHUNK) * _CHUNK + most_new_tokens
    return _stream(model, params, adapters, prompt, int(limit), room, frozenset(end_ids), sampler)


def _stream(model, params, adapters, prompt, limit, room, end_ids, sampler) -> Iterator[int]:
    """The loop of :func:`stream_in_chunks`, as a generator: no memory is taken before the first token is asked for."""
    tokens, padding = left_padded([prompt], 0)
    cache, token, at = prompt_cache(model, params, 1, room, 0), 0, 0
    for at in range(0, tokens.shape[1], _CHUNK):
        chunk = tokens[:, at : at + _CHUNK]
        made, cache = _step(model, cache, params, adapters, chunk, np.int32(at), padding, sampler, np.int32(0))
        token = int(made[0])
    at += _CHUNK
    for step in range(limit):
        if token in end_ids:
            return
        yield token
        if step + 1 < limit:
            last, number = np.array([[token]], np.int32), np.int32(step + 1)
            made, cache = _step(model, cache, params, adapters, last, np.int32(at + step), padding, sampler, number)
            token = int(made[0])


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _step(model, cache, params, adapters, tokens, at, padding, sampler, step) -> tuple[Array, Cache]:
    """Reads [1, L] tokens into the cache; gives the token [1] that comes after them."""
    hidden, cache = model.extend(params, adapters, tokens, cache, at, padding)
    return sampler(model.logits(params, hidden[:, -1]), step), cache
