"""Beam search: the likeliest continuations of a prompt, many prompts at a time."""

from collections.abc import Collection, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.decoding import left_padded, prompt_cache, token_limits, until_end
from fedjax_llm.types import Adapters, Params

Beam = tuple[list[int], float]
"""New tokens without the one that ended them, and the log-probability of all of them with it (nats)."""


def beam_search(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
) -> list[list[Beam]]:
    """Continues each of M prompts along the ``beams`` likeliest ways; the loop runs on the device.

    A beam that has ended keeps its place by the log-probability that it has; nothing is divided by lengths, so that
    beams are ordered as a sampler would meet them.

    Args:
      model: the frozen model.
      params: its weights.
      adapters: scaled factors (``lora.scaled``), shared; ``{}`` for the base model.
      prompts: token ids, M lists of any lengths.
      beams: how many ways are followed.
      max_new_tokens: of each.
      end_ids: tokens after which a beam ends.
      pad_id: fills prompts up on the left; it changes nothing.

    Returns:
      For every prompt its beams, the likeliest first.

    Raises:
      UserError: a prompt is empty, or leaves the model's context no room for ``max_new_tokens``; or no beam is
        wanted, or more than there are tokens.
    """
    if not 1 <= beams <= model.config.vocab_size:
        most = f"at most {model.config.vocab_size:,}, the tokens that there are"
        raise UserError(f"beams is {beams}; it must be at least 1 and {most}")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    if int(token_limits(model, prompts, max_new_tokens).min()) < max_new_tokens:
        context = model.config.context
        raise UserError(f"a prompt leaves no room for {max_new_tokens} tokens in the context of {context}; shorten it")
    tokens, padding = left_padded(prompts, pad_id)
    ends = np.array(sorted(end_ids), np.int32)
    made, scores = _search(model, beams, max_new_tokens, params, adapters, tokens, padding, ends)
    made, scores = np.asarray(made), np.asarray(scores, np.float64)
    stops = frozenset(end_ids)
    return [
        [(until_end(row.tolist(), stops), float(score)) for row, score in zip(own, likelihood, strict=True)]
        for own, likelihood in zip(made, scores, strict=True)
    ]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _search(model, beams, new, params, adapters, tokens, padding, ends) -> tuple[Array, Array]:
    """New tokens [M, beams, new] and log-probabilities [M, beams], the best first."""
    rows, length = tokens.shape
    cache = prompt_cache(model, params, rows, length, new)
    hidden, cache = model.extend(params, adapters, tokens, cache, jnp.int32(0), padding)
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), cache)
    padding = jnp.repeat(padding, beams)
    hidden = jnp.repeat(hidden[:, -1], beams, axis=0)
    # At first all beams of a prompt are one: the others come in with its second, third, ... likeliest token.
    scores = jnp.where(jnp.arange(beams)[None] == 0, 0.0, -jnp.inf) + jnp.zeros((rows, 1))
    made = jnp.zeros((rows, beams, new), jnp.int32)
    ended = jnp.zeros((rows, beams), bool)

    def advance(step, carry):
        hidden, cache, made, scores, ended = carry
        chance = jax.nn.log_softmax(model.logits(params, hidden).astype(jnp.float32))
        best, token = (leaf.reshape(rows, beams, -1) for leaf in jax.lax.top_k(chance, beams))
        # A beam that has ended has one way on, which costs nothing; what it adds is cut off in the end.
        still = jnp.where(jnp.arange(beams)[None, None] == 0, 0.0, -jnp.inf)
        best = jnp.where(ended[..., None], still, best)
        scores, place = jax.lax.top_k((scores[..., None] + best).reshape(rows, -1), beams)
        parent = place // beams
        token = jnp.take_along_axis(token.reshape(rows, -1), place, axis=1)
        made = jnp.take_along_axis(made, parent[..., None], axis=1).at[:, :, step].set(token)
        ended = jnp.take_along_axis(ended, parent, axis=1) | jnp.isin(token, ends)
        source = (jnp.arange(rows)[:, None] * beams + parent).reshape(-1)
        cache = jax.tree.map(lambda leaf: leaf[source], cache)
        hidden, cache = model.extend(params, adapters, token.reshape(-1, 1), cache, length + step, padding)
        return hidden[:, -1], cache, made, scores, ended

    _, _, made, scores, _ = jax.lax.fori_loop(0, new, advance, (hidden, cache, made, scores, ended))
    return made, scores
