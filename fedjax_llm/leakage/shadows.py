"""Shadow adapters: what the target would be like with and without a text, trained side by side as clients of one run.

Each shadow is tuned like the target, on a random half of a pool of candidates. A candidate is a record: its examples
are in a shadow together or not at all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.data.packing import Microbatch, Shape, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation import heldout
from fedjax_llm.federation.sampling import sample_steps
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import Trainer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Params

Candidate = Sequence[EncodedExample]
"""The examples of one record."""


def coins(rng: np.random.Generator, shadows: int, candidates: int) -> np.ndarray:
    """Which shadow is trained on which candidate: each candidate is in a random half of the shadows.

    Args:
      rng: draws the halves.
      shadows: S, even.
      candidates: N.

    Returns:
      bool [S, N].

    Raises:
      UserError: the number of shadows is odd, or not positive.
    """
    if shadows < 2 or shadows % 2:
        raise UserError(
            f"shadows is {shadows}; it must be even and at least 2, for each candidate to be in half of them"
        )
    halves = np.repeat([True, False], shadows // 2)
    return rng.permuted(np.tile(halves[:, None], candidates), axis=0)


def train_shadows(
    trainer: Trainer,
    params: Params,
    adapters: Adapters,
    pool: Sequence[Candidate],
    included: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    key: Array,
    shapes: Sequence[Shape],
    chunk: int,
    advance: Callable[[int], None],
    learning_rates: np.ndarray | None = None,
    frozen: Adapters | None = None,
    trunk: TrunkCache | None = None,
) -> Adapters:
    """Trains S shadows, a chunk of them at a time.

    Args:
      trainer: the static half of local training; without noise.
      params: the frozen weights.
      adapters: what every shadow starts from, leaves [...].
      pool: N candidates.
      included: bool [S, N], from :func:`coins`.
      steps: optimiser steps of each shadow, whose batches are dealt out as a client's are.
      batch_size: examples a step.
      key: of the order of examples and of dropout; a shadow's own depends on it and on the shadow's number alone.
      shapes: from ``packing.choose_shapes``; like ``chunk``, they decide speed and memory, never the result.
      chunk: how many shadows are trained at a time; all take the same compiled program.
      advance: called with how many more steps are done, S * ``steps`` in all.
      learning_rates: [steps], factors of the base learning rate; ``None``: ones.
      frozen: factors that are not trained, leaves [...].
      trunk: the hidden states below the adapters, where they are kept.

    Returns:
      The shadows' adapters, leaves [S, ...].

    Raises:
      UserError: the trainer adds noise, or a shadow has no candidate.
    """
    if trainer.noisy:
        raise UserError("shadows are trained without noise; give train_shadows a trainer whose noisy is False")
    if not included.any(axis=1).all():
        raise UserError(f"shadow {int(np.argmin(included.any(axis=1)))} has no candidate to train on: enlarge the pool")
    rates = np.ones(steps) if learning_rates is None else np.asarray(learning_rates)
    chunk = min(chunk, len(included))
    done = []
    for first in range(0, len(included), chunk):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, first + chunk))
        order, dropout = jax.vmap(jax.random.split, out_axes=1)(keys)
        held = [_examples(pool, taken) for taken in included[first : first + chunk]]
        work = [sample_steps(one, mine, batch_size, steps, None) for one, mine in zip(order, held, strict=False)]
        state = client_update.start(trainer, trees.repeat(adapters, chunk))  # all chunks have one shape
        batches = _counted(pack(work, shapes, clients=chunk), advance)
        shared = (dropout, np.tile(rates, (chunk, 1)), frozen, None, trunk)
        ended = client_update.run(trainer, params, state, batches, *shared)
        done.append(ended.adapters)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(included)], *done)


def shadow_scores(
    model: CausalLM,
    scaling: float,
    params: Params,
    shadows: Adapters,
    candidates: Sequence[Candidate],
    *,
    shapes: Sequence[Shape],
    advance: Callable[[int], None],
    trunk: TrunkCache | None = None,
) -> np.ndarray:
    """Mean log-probability of a candidate's target tokens under each shadow, in nats: f64 [S, N].

    ``membership.rmia`` takes it as it is, ``membership.lira`` as ``membership.confidence`` of it. The target alone is
    scored with ``S = 1``.

    Args:
      model: the frozen model.
      scaling: alpha / rank.
      params: its weights.
      shadows: whole adapters, leaves [S, ...]; where some factors were frozen, joined with them.
      candidates: N records; texts of a population that no shadow was trained on are scored likewise.
      shapes: from ``packing.choose_shapes``; they decide speed and memory, never the result.
      advance: called with how many more examples are done, S times all of them.
      trunk: the hidden states below the adapters, where they are kept.

    Raises:
      UserError: a candidate has no target token.
    """
    examples = [example for candidate in candidates for example in candidate]
    owner = np.repeat(np.arange(len(candidates)), [len(candidate) for candidate in candidates])
    rows = []
    for s in range(jax.tree.leaves(shadows)[0].shape[0]):
        own = jax.tree.map(lambda leaf, s=s: leaf[s], shadows)
        found = heldout.score(model, scaling, params, own, examples, shapes=shapes, advance=advance, trunk=trunk)
        tokens = np.bincount(owner, found.tokens, len(candidates))
        if not tokens.all():
            raise UserError(f"candidate {int(np.argmin(tokens))} has no target token: leave it out")
        rows.append(-np.bincount(owner, found.nll, len(candidates)) / tokens)
    return np.stack(rows)


def _examples(pool: Sequence[Candidate], taken: np.ndarray) -> list[EncodedExample]:
    """The examples of the candidates that are taken, bool [N]."""
    return [example for candidate, one in zip(pool, taken, strict=True) if one for example in candidate]


def _counted(batches: Iterable[Microbatch], advance: Callable[[int], None]) -> Iterator[Microbatch]:
    """Reports the steps that each microbatch completed, once it was used."""
    for batch in batches:
        yield batch
        advance(int(batch.finished.sum()))
