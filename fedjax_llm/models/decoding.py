"""From a prompt to new tokens, with a key-value cache: a batch at a time on the device, or token by token."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import Cache, CausalLM
from fedjax_llm.types import Adapters, Params

_PROMPT_MULTIPLE, _CACHE_MULTIPLE = 32, 128
"""Prompts and caches are filled up to multiples of these, so that few shapes are compiled."""


class Sampler(Protocol):
    """How a token is chosen: a pytree, so that its key can change without a new compilation."""

    def __call__(self, logits: Array, step: Array) -> Array:
        """[M, V] and the number of the new token, counted from zero -> [M]."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Greedy:
    """The most likely token."""

    def __call__(self, logits: Array, step: Array) -> Array:
        """[M, V] -> [M]."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nucleus:
    """Sampling from the most likely tokens (Holtzman et al. 2020, arXiv 1904.09751).

    Attributes:
      key: typed; ``fold_in`` of the step gives each step's own.
      temperature: the logits are divided by it.
      top_p: the fewest tokens that together have at least this probability are sampled from; 1: all.

    Raises:
      UserError: an impossible value.
    """

    key: Array
    temperature: float = field(default=1.0, metadata={"static": True})
    top_p: float = field(default=1.0, metadata={"static": True})

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not self.temperature > 0:
            raise UserError(f"the temperature is {self.temperature}; it must be positive (0 means greedy decoding)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def __call__(self, logits: Array, step: Array) -> Array:
        """[M, V] -> [M]."""
        logits = logits / self.temperature
        if self.top_p < 1:
            ordered = -jnp.sort(-logits, axis=-1)
            share = jax.nn.softmax(ordered, axis=-1)
            likelier = jnp.cumsum(share, axis=-1) - share
            least = jnp.min(jnp.where(likelier < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(jax.random.fold_in(self.key, step), logits).astype(jnp.int32)


def generate(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
    sampler: Sampler = Greedy(),
) -> list[list[int]]:
    """Continues all prompts in one batch; the loop runs on the device and stops when every row has ended.

    Args:
      model: the frozen model.
      params: its weights.
      adapters: scaled factors (``lora.scaled``), shared or one for each prompt [M, ...]; ``{}`` for the base model.
      prompts: token ids, M lists of any lengths.
      max_new_tokens: of each row, at most; a row also ends where the model's context is full.
      end_ids: tokens after which a row ends.
      pad_id: fills prompts up on the left; it changes nothing.
      sampler: chooses the tokens.

    Returns:
      M lists of new tokens, without the one that ended them.

    Raises:
      UserError: a prompt is empty or fills the model's context.
    """
    limits = token_limits(model, prompts, max_new_tokens)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    tokens, padding = left_padded(prompts, pad_id)
    ends = np.array(sorted(end_ids), np.int32)
    made = _generate(model, max_new_tokens, params, adapters, tokens, padding, limits, ends, sampler)
    return [until_end(row[:limit].tolist(), end_ids) for row, limit in zip(np.asarray(made), limits, strict=True)]


def stream(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    sampler: Sampler = Greedy(),
) -> Iterator[int]:
    """Continues one prompt token by token; the same tokens as :func:`generate`, each as soon as it is known.

    Args:
      model: the frozen model.
      params: its weights.
      adapters: scaled factors, shared; ``{}`` for the base model.
      prompt: token ids.
      max_new_tokens: at most; it also ends where the model's context is full.
      end_ids: tokens after which it ends; they are not given out.
      sampler: chooses the tokens.

    Raises:
      UserError: the prompt is empty or fills the model's context (at the call, not at the first token).
    """
    (limit,) = token_limits(model, [prompt], max_new_tokens)
    return _stream(model, params, adapters, prompt, int(limit), max_new_tokens, frozenset(end_ids), sampler)


def pieces(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of a stream of tokens as it grows; a character that spans tokens comes whole, once it is complete.

    Args:
      ids: one by one.
      decode: tokens to text, with U+FFFD for what is not UTF-8.
    """
    seen: list[int] = []
    shown = text = ""
    for token in ids:
        seen.append(token)
        text = decode(seen)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]


def _stream(model, params, adapters, prompt, limit, max_new_tokens, end_ids, sampler) -> Iterator[int]:
    """The loop of :func:`stream`, as a generator of its own so that the checks before it are not put off."""
    tokens, padding = left_padded([prompt], 0)
    cache, at = prompt_cache(model, params, 1, tokens.shape[1], max_new_tokens), 0
    for step in range(limit):
        made, cache = _step(model, cache, params, adapters, tokens, np.int32(at), padding, sampler, np.int32(step))
        token = int(made[0])
        if token in end_ids:
            return
        yield token
        at, tokens = at + tokens.shape[1], np.array([[token]], np.int32)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _step(model, cache, params, adapters, tokens, at, padding, sampler, step) -> tuple[Array, Cache]:
    """Reads [M, L] tokens into the cache; gives the token [M] that comes after them."""
    hidden, cache = model.extend(params, adapters, tokens, cache, at, padding)
    return sampler(model.logits(params, hidden[:, -1]), step), cache


@partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _generate(model, max_new_tokens, params, adapters, tokens, padding, limits, ends, sampler) -> Array:
    """New tokens [M, max_new_tokens]; what stands after a row's end means nothing."""
    rows, length = tokens.shape
    cache = prompt_cache(model, params, rows, length, max_new_tokens)
    hidden, cache = model.extend(params, adapters, tokens, cache, jnp.int32(0), padding)

    def unfinished(carry):
        step, _, _, _, ended = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def advance(carry):
        step, hidden, cache, made, ended = carry
        token = sampler(model.logits(params, hidden), step)
        made = made.at[:, step].set(token)
        ended = ended | jnp.isin(token, ends) | (step + 1 >= limits)
        hidden, cache = model.extend(params, adapters, token[:, None], cache, length + step, padding)
        return step + 1, hidden[:, -1], cache, made, ended

    made = jnp.zeros((rows, max_new_tokens), jnp.int32)
    start = (jnp.int32(0), hidden[:, -1], cache, made, limits <= 0)
    return jax.lax.while_loop(unfinished, advance, start)[3]


def prompt_cache(model: CausalLM, params: Params, rows: int, length: int, new: int) -> Cache:
    """Room for prompts of ``length`` tokens and ``new`` more, in the type of the weights."""
    return model.empty_cache(rows, _round_up(length + new, _CACHE_MULTIPLE), jax.tree.leaves(params)[0].dtype)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [M, L] that all end in the last column, and how many of each row's first are padding [M]."""
    length = _round_up(max(map(len, prompts)), _PROMPT_MULTIPLE)
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return tokens, np.array([length - len(prompt) for prompt in prompts], np.int32)


def token_limits(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> np.ndarray:
    """How many new tokens each prompt may get [M]."""
    context = model.config.context
    for prompt in prompts:
        if not len(prompt):
            raise UserError("a prompt has no token; there is nothing to continue")
        if len(prompt) >= context:
            raise UserError(f"a prompt has {len(prompt)} tokens, but the model's context is {context}; shorten it")
    return np.array([min(max_new_tokens, context - len(prompt)) for prompt in prompts], np.int32)


def until_end(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    """The tokens before the first that ends a turn."""
    for place, token in enumerate(tokens):
        if token in end_ids:
            return tokens[:place]
    return tokens


def _round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple
