"""Text from a gradient of adapters by optimisation: relaxed tokens whose gradient matches the one that was seen.

In the spirit of Deep Leakage from Gradients (Zhu et al. 2019, arXiv 1906.08935) and LAMP (Balunovic et al. 2022,
arXiv 2202.08827). Every position holds a distribution over the vocabulary; its embedding is the mean embedding, its
target the distribution itself, so that inputs and labels are sought together. The distance is LAMP's mixture of cosine
and Euclidean, over all trained factors, and the base model's own likelihood can be added as LAMP adds that of a prior.
It asks for no particular factor and no rank: it works at ``b = 0`` and where ``b`` alone is trained. It differentiates
a gradient, for every step anew: it is for short sequences and small models, or for the lowest layers of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedjax_llm import lora as low_rank
from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import CausalLM, lowest_adapted
from fedjax_llm.types import Adapters, Params


@dataclass(frozen=True)
class Inversion:
    """How the text is sought.

    Attributes:
      steps: of Adam, on the logits of the distributions.
      learning_rate: of the first step; it falls to zero as a cosine.
      restarts: independent starts, side by side; the one whose tokens match best counts.
      cosine: weight of ``1 - cosine`` between the gradients.
      euclidean: weight of their squared distance, relative to the squared norm of the one that was seen.
      prior: weight of the base model's negative log-likelihood of the text, in nats a token.
      spread: deviation of the logits at the start.
      sweeps: how often each token is then exchanged for the best of
      candidates: tokens, those towards which the distance falls fastest, as in the greedy coordinate search of Zou et
        al. 2023 (arXiv 2307.15043), or swapped with another of its sequence, as in LAMP.
    """

    steps: int = 400
    learning_rate: float = 0.3
    restarts: int = 4
    cosine: float = 1.0
    euclidean: float = 0.1
    prior: float = 0.0
    spread: float = 0.1
    sweeps: int = 4
    candidates: int = 64

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"inversion.steps and inversion.restarts are {self.steps} and {self.restarts}; at least 1")
        if self.sweeps < 0 or self.candidates < 1:
            raise UserError("inversion.sweeps must not be negative, and inversion.candidates be at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"inversion.learning_rate is {self.learning_rate}; it must be positive")
        if min(self.cosine, self.euclidean, self.prior) < 0 or self.cosine + self.euclidean == 0:
            raise UserError("inversion.cosine, euclidean and prior must not be negative, and one of the first positive")


class Batch(NamedTuple):
    """What the attacker knows of the batch: how long its sequences are, and where their answers begin.

    Attributes:
      lengths: tokens of each sequence.
      prompts: how many of them are prompt.
    """

    lengths: tuple[int, ...]
    prompts: tuple[int, ...]

    def weights(self) -> np.ndarray:
        """f32 [B, L - 1]: of the loss of position ``t + 1`` as a target; the mean over targets, then over sequences."""
        found = np.zeros((len(self.lengths), max(self.lengths) - 1), np.float32)
        for row, (length, prompt) in enumerate(zip(self.lengths, self.prompts, strict=True)):
            first = max(prompt, 1)
            found[row, first - 1 : length - 1] = 1 / (max(length - first, 1) * len(self.lengths))
        return found


class Inverted(NamedTuple):
    """The best of the restarts.

    Attributes:
      sequences: tokens, as long as the sequences of the batch.
      distance: between the gradient of these tokens and the one that was seen; 0 if they are the same.
    """

    sequences: list[tuple[int, ...]]
    distance: float


def relaxed_gradient(
    model: CausalLM,
    params: Params,
    scaling: float,
    trained: Adapters,
    frozen: Adapters,
    shares: Array,
    weights: Array,
) -> Adapters:
    """The gradient of the training loss at distributions over tokens; at one-hot ones it is that of the tokens.

    Args:
      model: the frozen model, whose layer 0 is adapted.
      params: its weights.
      scaling: alpha / rank.
      trained: the factors to differentiate by.
      frozen: the others.
      shares: f32 [B, L, V], a distribution for each position.
      weights: f32 [B, L - 1], from :meth:`Batch.weights`.

    Returns:
      A tree like ``trained``.
    """
    vocabulary = jnp.arange(model.config.vocab_size, dtype=jnp.int32)[:, None]
    embedded = shares @ jax.lax.stop_gradient(model.trunk(params, vocabulary, 0)[:, 0]).astype(jnp.float32)

    def loss(own: Adapters) -> Array:
        whole = low_rank.scaled(low_rank.join(own, frozen), scaling)
        return jnp.sum(weights * _nll(model, params, whole, embedded, shares))

    return jax.grad(loss)(trained)


def _nll(model: CausalLM, params: Params, adapters: Adapters, embedded: Array, shares: Array) -> Array:
    """[B, L - 1]: cross entropy of the positions from the second on, in nats. ``target_nll`` takes hard tokens only."""
    rows, length = shares.shape[:2]
    nothing = jnp.zeros((rows, length), jnp.int32)  # only its shape is read: what is embedded comes from below
    hidden = model.hidden(params, adapters, nothing, below=embedded)[:, :-1]
    logits = model.logits(params, hidden.reshape(rows * (length - 1), -1)).reshape(rows, length - 1, -1)
    return -jnp.sum(shares[:, 1:] * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def distance(found: Adapters, seen: Adapters, cosine: float = 1.0, euclidean: float = 0.1) -> Array:
    """``cosine (1 - cos) + euclidean |found - seen|^2 / |seen|^2``, over all factors together; a scalar."""
    pairs = ((found, seen), (found, found), (seen, seen))
    both, ours, theirs = (jnp.asarray(optax.tree.vdot(one, other)) for one, other in pairs)
    angle = 1 - both / jnp.sqrt(jnp.maximum(ours * theirs, 1e-30))
    return cosine * angle + euclidean * (ours - 2 * both + theirs) / jnp.maximum(theirs, 1e-30)


def invert(
    how: Inversion,
    model: CausalLM,
    params: Params,
    scaling: float,
    adapters: Adapters,
    seen: Adapters,
    batch: Batch,
    key: Array,
    allowed: Sequence[int] | None = None,
) -> Inverted:
    """Seeks the sequences of a batch whose gradient was seen.

    Args:
      how: the search.
      model: the frozen model, whose layer 0 is adapted; without dropout.
      params: its weights.
      scaling: alpha / rank.
      adapters: where the gradient was taken, all factors.
      seen: the mean gradient of the trained factors: of one step of SGD, minus the update over the learning rate.
      batch: the shape of the text.
      key: typed, of the starts.
      allowed: tokens that the text is made of, where that is known, as from the span check; ``None``: all.

    Raises:
      UserError: layer 0 has no adapters, so that what enters the lowest adapted layer is no embedding.
    """
    lowest = lowest_adapted(adapters)
    if lowest:
        raise UserError(
            f"the lowest adapted layer is {lowest}, but the inversion puts embeddings into the lowest adapted layer; "
            "it needs adapters on layer 0"
        )
    frozen = low_rank.partition(adapters, lambda path, name: name not in seen.get(path, {}))[0]
    trained = low_rank.partition(adapters, lambda path, name: name in seen.get(path, {}))[0]
    closed = np.zeros(model.config.vocab_size, np.float32)
    if allowed is not None:
        closed[:] = -1e9
        closed[np.asarray(allowed)] = 0
    known = (params, trained, frozen, seen, jnp.asarray(batch.weights()), jnp.asarray(closed))
    shape = (len(batch.lengths), max(batch.lengths), model.config.vocab_size)
    tokens, distances = _search(how, model, scaling, shape, known, jax.random.split(key, how.restarts))
    best = int(np.nanargmin(np.where(np.isfinite(distances), distances, np.inf)))
    rows = np.asarray(tokens[best])
    sequences = [tuple(row[:length].tolist()) for row, length in zip(rows, batch.lengths, strict=True)]
    return Inverted(sequences, float(distances[best]))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(
    how: Inversion, model: CausalLM, scaling: float, shape: tuple[int, ...], known: tuple, keys: Array
) -> tuple[Array, Array]:
    """(tokens [restarts, B, L], distances [restarts]) of the searches from all starts."""
    params, trained, frozen, seen, weights, closed = known
    plain = low_rank.scaled(jax.tree.map(jnp.zeros_like, low_rank.join(trained, frozen)), scaling)
    optimizer = optax.adam(optax.cosine_decay_schedule(how.learning_rate, how.steps))

    def apart(shares: Array) -> Array:
        found = relaxed_gradient(model, params, scaling, trained, frozen, shares, weights)
        return distance(found, seen, how.cosine, how.euclidean)

    def objective(logits: Array) -> Array:
        shares = jax.nn.softmax(logits + closed, axis=-1)
        value = apart(shares)
        if how.prior:
            vocabulary = jnp.arange(model.config.vocab_size, dtype=jnp.int32)[:, None]
            embedded = shares @ model.trunk(params, vocabulary, 0)[:, 0].astype(jnp.float32)
            value += how.prior * jnp.mean(_nll(model, params, plain, embedded, shares))
        return value

    def one(key: Array) -> tuple[Array, Array]:
        def step(state: tuple, _: None) -> tuple[tuple, None]:
            logits, moments = state
            updates, moments = optimizer.update(jax.grad(objective)(logits), moments, logits)
            return (optax.apply_updates(logits, updates), moments), None

        start = how.spread * jax.random.normal(key, shape)
        (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, how.steps)
        return _exchanged(how, apart, jnp.argmax(logits + closed, axis=-1), closed)

    return jax.vmap(one)(keys)


def _exchanged(how: Inversion, apart: Callable[[Array], Array], tokens: Array, closed: Array) -> tuple[Array, Array]:
    """(tokens [B, L], their distance) after the sweeps: an exchange is made where it lowers the distance."""
    size = closed.shape[0]
    count = min(how.candidates, size)

    def hard(own: Array) -> Array:
        return apart(jax.nn.one_hot(own, size))

    def visit(state: tuple[Array, Array], place: Array) -> tuple[tuple[Array, Array], None]:
        own, least = state
        row, column = place
        slope = jax.grad(apart)(jax.nn.one_hot(own, size))[row, column]
        options = jax.lax.top_k(closed - slope, count)[1]
        trials = jax.vmap(lambda option: own.at[row, column].set(option))(options)
        swap = jax.vmap(lambda other: own.at[row, column].set(own[row, other]).at[row, other].set(own[row, column]))
        trials = jnp.concatenate([trials, swap(jnp.arange(own.shape[1]))])
        distances = jax.lax.map(hard, trials, batch_size=16)
        best = jnp.argmin(distances)
        better = distances[best] < least
        return (jnp.where(better, trials[best], own), jnp.where(better, distances[best], least)), None

    places = jnp.stack(jnp.meshgrid(*map(jnp.arange, tokens.shape), indexing="ij"), axis=-1).reshape(-1, 2)
    return jax.lax.scan(visit, (tokens, hard(tokens)), jnp.tile(places, (how.sweeps, 1)))[0]
