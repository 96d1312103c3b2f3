"""Which tokens an update of adapters was computed on: the span check of DAGER, for low-rank adapters.

Petrov et al. 2024 (arXiv 2405.15586). The gradient of the factor ``a`` [D, R] of an adapted matrix is a sum of outer
products over the positions of the batch, ``sum_t x_t h_t'`` with ``h_t = b g_t`` [R]: all its columns lie in the span
of the inputs ``x_t``. In layer 0 of Llama and the models like it (Gemma, Phi) an input is the normalised embedding of
one token, without its position, so the server can ask of every token of the vocabulary whether it lies in that span.
Projections with the same input (q, k and v) can be laid side by side: with fewer distinct tokens than columns in all,
the span is seen whole and the answer is exact. With more, only a part of the span is seen, and the inputs of the batch
stand out of it.

Any number of steps of plain SGD, any clipping and any sum over clients keep the update within the span, since the
embeddings are frozen; Adam, which scales every element on its own, and noise do not.

With ``b = 0``, as in a first round, the gradient of ``a`` is zero. That of ``b`` [R, out] is not: it is
``sum_t (x_t a) g_t'``. Its columns lie in the span of the inputs seen through ``a``, which the server knows, in R
dimensions. The same check works there, with fewer than R distinct tokens; the same holds where ``b`` or the core ``c``
is trained alone.

The order of the tokens comes from layer 1: its inputs are the hidden states of prefixes. A sequence is built from
the left, and a prefix is kept if its last hidden state lies in the span of layer 1's update.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import lora as low_rank
from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import CausalLM, lowest_adapted
from fedjax_llm.types import Adapters, Params

RELATIVE = 1e-6
"""Singular values below this share of the largest are taken for rounding."""
THRESHOLD = 0.01
"""Inputs at a smaller relative distance are taken to lie in the span. Tokens that were hardly met in pre-training have
nearly the same embedding, some at 0.03 of another: a larger threshold finds all of them with one."""
_SPARE = 0.1
_CHUNK = 8192
_SAME_INPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj")


class Check(NamedTuple):
    """A subspace that holds the inputs of a layer, or a part of their span.

    Attributes:
      basis: [K, r], orthonormal columns.
      through: [D, K], what inputs are seen through; ``None``: as they are, K = D.
      columns: of the update that the basis was taken from.
    """

    basis: Array
    through: Array | None
    columns: int

    @property
    def conclusive(self) -> bool:
        """Whether the update has a lower rank than its shape allows, so that its columns show all of the span.

        Some directions must be left over: one may be hidden by rounding where the span is cut off.
        """
        most = min(self.basis.shape[0], self.columns)
        return 0 < self.basis.shape[1] <= most - max(1, int(_SPARE * most))


Verdict = Literal["conclusive", "saturated", "silent"]
"""``conclusive``: the update has less than full rank, so that tokens can be checked one by one, but for those that
rounding hides; ``saturated``: the batch has more distinct inputs than the update has rank; ``silent``: the update is
zero."""


class TokensFound(NamedTuple):
    """What the update of layer 0 tells about the tokens of the batch.

    Attributes:
      tokens: int [n], those in the span, ascending; none unless the verdict is ``conclusive``.
      residuals: f32 [V], every token's relative distance from what is seen of the span; 1 where nothing is.
      rank: of what is seen.
      verdict: what the check can say.
    """

    tokens: np.ndarray
    residuals: np.ndarray
    rank: int
    verdict: Verdict


def column_space(update: Array | np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """An orthonormal basis [D, r] of the columns of an update [D, R]; r is its numerical rank.

    Args:
      update: of any float type; decomposed in f64.
      floor: singular values up to this are rounding too (:func:`rounding_floor`).
    """
    left, values, _ = np.linalg.svd(np.asarray(update, np.float64), full_matrices=False)
    largest = values[0] if len(values) else 0.0
    return left[:, values > max(floor, RELATIVE * largest)].astype(np.float32)


def rounding_floor(start: Array | np.ndarray) -> float:
    """The largest singular value that rounding gives to an update that was sent as a difference of f32 factors.

    Every element is off by up to half a unit in the last place of the factor, like independent noise, whose largest
    singular value is about ``sqrt(D) + sqrt(R)`` deviations.

    Args:
      start: the factor [D, R] that the client started from.
    """
    values = np.asarray(start, np.float64)
    deviation = np.finfo(np.float32).eps / np.sqrt(12) * np.sqrt(np.mean(values**2))
    return float(2 * deviation * (np.sqrt(values.shape[0]) + np.sqrt(values.shape[1])))


def span_residuals(update: Array | np.ndarray, inputs: Array, *, floor: float = 0.0) -> np.ndarray:
    """Relative distances of inputs from the column space of an update.

    Args:
      update: [D, R].
      inputs: [V, D].
      floor: as in :func:`column_space`.

    Returns:
      f32 [V] in [0, 1]: 0 in the span, 1 at a right angle to it; all 1 where the update is zero.
    """
    return _distances(Check(jnp.asarray(column_space(update, floor=floor)), None, update.shape[1]), inputs)


def tokens_in_span(residuals: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """The tokens, ascending, whose residuals [V] lie below the threshold."""
    return np.flatnonzero(residuals < threshold)


def check_served(model: CausalLM) -> None:
    """Refuses models whose layer 0 does not see each token by itself, normalised, in projections of a shared input.

    Raises:
      UserError: with the model's architecture.
    """
    own = {weight.path[:1] for weight in model.family.weights(model.config) if "{layer}" in weight.name}
    attention = {f"self_attn.{name}" for name in _SAME_INPUT}
    if ("input_layernorm",) not in own or not attention & set(model.family.projections(model.config)):
        raise UserError(
            f"the span check does not serve {model.family.architectures[0]}: it needs a layer 0 whose "
            f"{', '.join(_SAME_INPUT)} see the normalised embedding of one token, without its position, as in Llama, "
            "Gemma and Phi"
        )


def vocabulary_inputs(model: CausalLM, params: Params) -> Array:
    """What enters the projections of layer 0 for every token of the vocabulary, [V, D]."""
    every = jnp.arange(model.config.vocab_size, dtype=jnp.int32)[:, None]
    return _normed(model, params, 0, model.trunk(params, every, 0)[:, 0])


def checks_of(update: Adapters, adapters: Adapters, layer: int, *, differences: bool = True) -> tuple[Check, ...]:
    """The checks that the update of a layer's q, k and v allows; those of ``a`` if they are conclusive.

    Args:
      update: of the trained factors, as the server sees it.
      adapters: what the clients started from, all factors.
      layer: its number.
      differences: whether the update was sent as a difference of f32 factors, not as a gradient.

    Returns:
      One check for all factors ``a`` side by side; or, where that shows less than the whole span, those of ``b`` (or
      ``c``) that are conclusive, one a module. Without any, the inconclusive one of ``a`` if it is not zero.

    Raises:
      UserError: the layer has no adapted q, k or v (or all of them as one).
    """
    paths = [f"layers.{layer}.self_attn.{name}" for name in _SAME_INPUT if f"layers.{layer}.self_attn.{name}" in update]
    if not paths:
        raise UserError(
            f"layer {layer} has no adapters on {', '.join(_SAME_INPUT[:-1])} or {_SAME_INPUT[-1]}: their updates are "
            "what is checked"
        )

    def floor(start: Sequence[Array]) -> float:
        return rounding_floor(np.concatenate(start, axis=1)) if differences else 0.0

    beside = None
    with_a = [path for path in paths if "a" in update[path]]
    if with_a:
        moved = np.concatenate([update[path]["a"] for path in with_a], axis=1)
        basis = column_space(moved, floor=floor([adapters[path]["a"] for path in with_a]))
        beside = Check(jnp.asarray(basis), None, moved.shape[1])
        if beside.conclusive:
            return (beside,)
    through = []
    for path in paths:
        for name in ("b", "c"):
            if name in update[path]:
                moved, start = update[path][name], adapters[path][name]
                basis = jnp.asarray(column_space(moved, floor=floor([start])))
                through.append(Check(basis, adapters[path]["a"], moved.shape[1]))
    conclusive = tuple(check for check in through if check.conclusive)
    # The query of a first position sees one key, so that it has no gradient: q's update lacks that input.
    conclusive = (
        conclusive[1:] if len(conclusive) > 1 and through[0].conclusive and "q_proj" in paths[0] else conclusive
    )
    if conclusive or beside is None or not beside.basis.shape[1]:
        return conclusive
    return (beside,)


def residuals_of(checks: Sequence[Check], inputs: Array) -> np.ndarray:
    """f32 [N]: the largest relative distance of each input [N, D] over the checks; 1 without any."""
    if not checks:
        return np.ones(inputs.shape[0], np.float32)
    return np.max([_distances(check, inputs) for check in checks], axis=0)


def recover_tokens(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    update: Adapters,
    *,
    threshold: float = THRESHOLD,
    differences: bool = True,
) -> TokensFound:
    """Which tokens of the vocabulary the batch held, by the update of layer 0.

    Args:
      model: the frozen model; its attention sees normalised hidden states (:func:`check_served`).
      params: its weights.
      adapters: what the clients started from, all factors.
      update: of the trained factors.
      threshold: see :func:`tokens_in_span`.
      differences: see :func:`checks_of`.

    Raises:
      UserError: the model is of another kind; or layer 0 has no adapters. What enters a higher layer depends on all
        tokens before, so that single tokens cannot be checked.
    """
    check_served(model)
    lowest = lowest_adapted(update)
    if lowest:
        raise UserError(
            f"the lowest adapted layer is {lowest}: its inputs depend on all tokens before, so that single tokens "
            "cannot be checked; the span check needs adapters on layer 0"
        )
    checks = checks_of(update, adapters, 0, differences=differences)
    residuals = residuals_of(checks, vocabulary_inputs(model, params))
    exact = bool(checks) and all(check.conclusive for check in checks)
    verdict: Verdict = "conclusive" if exact else "saturated" if _moved(update, 0) else "silent"
    tokens = tokens_in_span(residuals, threshold) if exact else np.zeros(0, np.int64)
    return TokensFound(tokens, residuals, max((check.basis.shape[1] for check in checks), default=0), verdict)


def recover_sentences(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    scaling: float,
    update: Adapters,
    candidates: Sequence[int] | np.ndarray,
    *,
    length: int,
    beam: int = 16,
    threshold: float = THRESHOLD,
    differences: bool = True,
) -> list[tuple[int, ...]]:
    """Sequences of the batch, from the tokens that it holds and the update of layer 1.

    Prefixes grow by one token at a time. An extension is kept if the hidden state of its last position, which enters
    layer 1, lies in the span of that layer's update; of too many, the ``beam`` nearest are kept. A prefix without an
    extension is a sequence. The last token of a training example is only ever a target and so is never found.

    Args:
      model: the frozen model; its attention sees normalised hidden states (:func:`check_served`).
      params: its weights.
      adapters: what the clients started from, all factors.
      scaling: alpha / rank.
      update: of the trained factors.
      candidates: from :func:`recover_tokens`.
      length: tokens of a sequence at most.
      beam: prefixes that are kept at a time; at least the sequences of the batch.
      threshold: relative distance of a hidden state that is taken to lie in the span.
      differences: see :func:`checks_of`.

    Returns:
      Sequences, longest first; none where layer 1's update does not show all of the span, or there are no candidates.
    """
    checks = checks_of(update, adapters, 1, differences=differences)
    if not len(candidates) or not checks or not all(check.conclusive for check in checks):
        return []
    # Cut off after layer 0, with layer 1's first norm for the final one, the model gives layer 1's inputs.
    cut = replace(model, config=replace(model.config, layers=1), dropout=0.0, remat="none")
    weights = params | {"layers": params["layers"][:1], "norm": params["layers"][1]["input_layernorm"]}
    lowest = {path: own for path, own in low_rank.scaled(adapters, scaling).items() if path.startswith("layers.0.")}
    options = np.asarray(candidates, np.int32)
    prefixes: list[tuple[int, ...]] = [()]
    ended: list[tuple[int, ...]] = []
    for position in range(length):
        rows = 1 << (len(prefixes) - 1).bit_length()  # few shapes are compiled
        padded = np.zeros((rows, length), np.int32)
        padded[: len(prefixes), :position] = prefixes
        inputs = _extensions(cut, weights, lowest, padded, _padded(options), np.int32(position))
        inputs = inputs[: len(prefixes), : len(options)]
        near = residuals_of(checks, inputs.reshape(-1, inputs.shape[-1])).reshape(inputs.shape[:2])
        ended += [prefix for prefix, row in zip(prefixes, near, strict=True) if prefix and not (row < threshold).any()]
        kept = np.argwhere(near < threshold)
        kept = kept[np.argsort(near[tuple(kept.T)], kind="stable")[:beam]]
        prefixes = [(*prefixes[row], int(options[column])) for row, column in kept]
        if not prefixes:
            break
    return sorted(ended + prefixes, key=len, reverse=True)


@partial(jax.jit, static_argnums=0)
def _extensions(
    cut: CausalLM, params: Params, adapters: Adapters, prefixes: Array, options: Array, position: Array
) -> Array:
    """What each option [N] gives at ``position`` after each prefix [W, L], as [W, N, D], all in one pass."""
    rows, length = prefixes.shape
    every, count = jnp.arange(length), options.shape[0]
    tokens = jnp.concatenate([prefixes, jnp.broadcast_to(options, (rows, count))], axis=1)
    places = jnp.concatenate([every, jnp.full(count, position)])
    # Options stand side by side at one position: they see the prefix and themselves, not each other.
    before = jnp.concatenate([every < position, jnp.zeros(count, bool)])
    causal = (every[:, None] >= every[None]) & (every < position)[None]
    mask = jnp.zeros((length + count, length + count), bool).at[:length, :length].set(causal)
    mask = mask.at[length:].set(before[None]) | jnp.eye(length + count, dtype=bool)
    return cut.hidden(params, adapters, tokens, places, mask[None])[:, length:]


def _padded(options: np.ndarray, multiple: int = 32) -> np.ndarray:
    """Options filled up with the first of them, so that few shapes are compiled."""
    return np.concatenate([options, np.repeat(options[:1], -len(options) % multiple)])


def _normed(model: CausalLM, params: Params, layer: int, x: Array) -> Array:
    """What the projections of a layer see of the hidden states [..., D] that enter it."""
    return model.family.finish(model.config, {"norm": params["layers"][layer]["input_layernorm"]}, x)


def _moved(update: Adapters, layer: int) -> bool:
    """Whether any factor of a layer's q, k and v has changed."""
    own = [update[path] for path in update if path.startswith(f"layers.{layer}.") and path.endswith(_SAME_INPUT)]
    return any(bool(np.any(np.asarray(leaf))) for leaf in jax.tree.leaves(own))


def _distances(check: Check, inputs: Array) -> np.ndarray:
    """f32 [N], in chunks."""
    chunks = [
        _outside(check.basis, check.through, inputs[start : start + _CHUNK])
        for start in range(0, inputs.shape[0], _CHUNK)
    ]
    return np.concatenate(chunks)


@jax.jit
def _outside(basis: Array, through: Array | None, inputs: Array) -> Array:
    """The part of each input [N, D] outside of the span, over its length."""
    exact = jax.lax.Precision.HIGHEST
    seen = inputs.astype(jnp.float32)
    if through is not None:
        seen = jnp.matmul(seen, through.astype(jnp.float32), precision=exact)
    within = jnp.matmul(jnp.matmul(seen, basis, precision=exact), basis.T, precision=exact)
    return jnp.linalg.norm(seen - within, axis=-1) / jnp.maximum(jnp.linalg.norm(seen, axis=-1), 1e-30)
