"""From the clients' ends of a round to what the server may see: messages, bounded and blurred as the mechanism says."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.sampling import round_key, secret_round_key
from fedjax_llm.privacy import noise as noises
from fedjax_llm.privacy.clipping import Clip, clip_units
from fedjax_llm.privacy.mechanism import AdaptiveClip, Mechanism
from fedjax_llm.training.client_update import LocalState
from fedjax_llm.types import Local, PyTree, RoundState, Stack, Sum, Trained, View


class Outcome(NamedTuple):
    """A chunk after local training.

    Attributes:
      ended: the clients' states.
      local: what they knew, leaves [C, ...].
      steps: f32 [C], optimiser steps.
      rate: f32 [C], the sums of their learning rates.
      probe: (losses [C], gradients [C, ...]) where they started; ``()`` without a probe.
    """

    ended: LocalState
    local: Local
    steps: Array
    rate: Array
    probe: tuple[Array, PyTree] | tuple[()] = ()


class Updates(NamedTuple):
    """A chunk's updates.

    Attributes:
      messages: leaves [C, ...], what travels: deltas, or what the algorithm asks for; bounded where the mechanism
        bounds them; zero where they are not finite.
      weights: f32 [C].
      norms: f32 [C], of the deltas of the shared adapters before any clipping. Not covered by a guarantee.
      finite: bool [C].
      below_clip: of the clients with a weight, how many were not clipped, less half of them: the count that adaptive
        clipping blurs, centred so that one client changes it by a half.
      memory: what the clients keep for the algorithm; as it was where the update is not finite.
    """

    messages: PyTree
    weights: Array
    norms: Array
    finite: Array
    below_clip: Array
    memory: PyTree


def initial_state(mechanism: Mechanism | None, template: PyTree) -> dict[str, PyTree]:
    """What the server keeps for the mechanism: the state of correlated noise, and an adaptive clip norm."""
    state: dict[str, PyTree] = {}
    if mechanism is not None and mechanism.noised == "sum" and mechanism.correlated is not None:
        state["noise"] = mechanism.correlated.init(template)
    if mechanism is not None and mechanism.adaptive is not None:
        state["clip_norm"] = jnp.float32(mechanism.clip.norm)
    return state


def clip_norm(mechanism: Mechanism, privacy_state: dict[str, PyTree]) -> Array:
    """The bound of this round."""
    return privacy_state.get("clip_norm", jnp.float32(mechanism.clip.norm))


def updates(plan: RoundPlan, outcome: Outcome, weights: Array, privacy_state: dict[str, PyTree]) -> Updates:
    """What clients [C] send.

    Without a mechanism, a client whose update or loss is not finite is left out, by weight zero. With one, that would
    tell something that no noise covers: its delta is zero, and its weight stays.
    """
    mechanism, rule = plan.mechanism, plan.aggregation.client
    clip, bound = None, None
    if mechanism is not None and mechanism.clipped == "deltas":
        clip, bound = mechanism.clip, clip_norm(mechanism, privacy_state)
    static = (mechanism is not None, clip, rule.report, plan.aggregation.personal)
    return _updates(*static, outcome, jnp.asarray(weights), bound)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _updates(
    private: bool, clip: Clip | None, report, personal, outcome: Outcome, weights: Array, bound: Array | None
) -> Updates:
    """The computation of :func:`updates`."""
    ended, local = outcome.ended, outcome.local
    end, start = (low_rank.partition(tree, personal)[1] for tree in (ended.adapters, local.start))
    deltas = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old.astype(jnp.float32), end, start)
    norms, memory = trees.norms(deltas), local.memory
    finite = jnp.isfinite(norms) if private else jnp.isfinite(norms) & jnp.isfinite(ended.loss)
    messages = deltas
    if report is not None:
        trained = Trained(deltas, end, outcome.steps, outcome.rate, *outcome.probe)
        messages, memory = jax.vmap(report)(trained, local._replace(start=start))
        finite = finite & trees.finite(messages) & trees.finite(memory)
        memory = trees.select(finite, memory, local.memory)
    messages = trees.select(finite, messages, jax.tree.map(jnp.zeros_like, messages))
    below_clip = jnp.float32(0)
    if clip is not None:
        assert bound is not None
        below_clip = jnp.sum(jnp.where(weights > 0, (finite & (norms <= bound)) - 0.5, 0.0))
        messages = clip_units(messages, clip, bound)
    weights = weights if private else jnp.where(finite, weights, 0.0)
    return Updates(messages, weights, norms, finite, below_clip, memory)


def site_noise(plan: RoundPlan, ids: Array, index: Array, number: int, attempt: int) -> tuple[Array, Array]:
    """The keys [C] of the noise that sites add by themselves in a round, and its standard deviation [C]."""
    assert plan.mechanism is not None
    assert plan.secret_key is not None
    key = secret_round_key(plan.secret_key, number, attempt, "site noise")
    stddev = jnp.asarray(plan.mechanism.stddev * plan.mechanism.clip.norm, jnp.float32)
    return jax.vmap(noises.site_noise_key, (None, 0))(key, ids), stddev[index]


def staled(plan: RoundPlan, messages: PyTree, staleness: np.ndarray) -> PyTree:
    """Messages [C, ...] of asynchronous clients, the less the longer they took (``federation.asynchronous``)."""
    asynchronous = plan.federation.asynchronous
    if asynchronous is None or plan.setting != "federated":
        return messages
    factors = jnp.asarray((1.0 + staleness) ** -asynchronous.staleness, jnp.float32)
    return jax.tree.map(lambda leaf: jax.vmap(jnp.multiply)(factors, leaf), messages)


def noised_messages(plan: RoundPlan, messages: PyTree, ids: Array, index: Array, number: int, attempt: int) -> PyTree:
    """Messages [C, ...] as they leave the sites: with the sites' own noise in local differential privacy."""
    mechanism = plan.mechanism
    if mechanism is None or mechanism.noised != "deltas":
        return messages
    return _noised_messages(messages, *site_noise(plan, ids, index, number, attempt))


@jax.jit
def _noised_messages(messages: PyTree, keys: Array, stddev: Array) -> PyTree:
    noise = jax.vmap(noises.gaussian)(keys, messages, stddev)
    return jax.tree.map(jnp.add, messages, noise)


def compressed(
    plan: RoundPlan,
    messages: PyTree,
    memory: PyTree,
    ids: Array,
    number: int,
    live: Mapping[str, float] | None = None,
) -> tuple[PyTree, PyTree]:
    """Messages [C, ...] as the server decodes them, and what the clients remember of what was lost.

    Factors that do not travel in the round (``live`` holds zero) are not coded, and what is remembered of them rests.
    """
    if plan.codec is None:
        return messages, memory
    keys = jax.vmap(jax.random.fold_in, (None, 0))(round_key(plan.key, number, "compression"), ids)
    names = [getattr(path[-1], "key", "") if path else "" for path, _ in jax.tree.leaves_with_path(messages)]
    sent = [live is None or bool(live.get(name, 1.0)) for name in names]

    def those(tree: PyTree) -> list[Array]:
        return [leaf for leaf, on in zip(jax.tree.leaves(tree), sent, strict=True) if on]

    def updated(tree: PyTree, new: list[Array]) -> PyTree:
        rest, (leaves, structure) = iter(new), jax.tree.flatten(tree)
        return structure.unflatten([next(rest) if on else leaf for leaf, on in zip(leaves, sent, strict=True)])

    remembers = bool(jax.tree.leaves(memory))
    # Not compiled as a whole: a codec compiles what is worth it (compression/vector.py).
    decoded, lost = jax.vmap(plan.codec.code)(keys, those(messages), those(memory) if remembers else memory)
    return updated(messages, decoded), updated(memory, lost) if remembers else memory


def seen(plan: RoundPlan, view: View | None, cohort: np.ndarray, number: int) -> View | None:
    """The view that the algorithm asks for, after the malicious clients of the cohort had their way.

    Clients that were selected in vain are in a stack with weight zero, so that its shape is the same in every round.
    """
    if not isinstance(view, Stack):
        return view
    if plan.corrupt is not None:
        malicious = jnp.asarray(np.asarray(plan.malicious)[cohort])
        view = _corrupted(plan.corrupt, view, malicious, round_key(plan.key, number, "attack"))
    if plan.aggregation.view is Sum:
        return Sum(trees.weighted_sum(view.weights, view.messages), jnp.sum(view.weights))
    absent = max(0, min(plan.cohort, len(plan.clients)) - len(view.weights))
    return jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, absent)] + [(0, 0)] * (leaf.ndim - 1)), view)


@partial(jax.jit, static_argnums=0)
def _corrupted(corrupt, view: Stack, malicious: Array, key: Array) -> Stack:
    return corrupt(view, malicious, key)


def template(plan: RoundPlan, adapters: PyTree) -> PyTree:
    """Zeros like one client's message."""
    _, shared = low_rank.partition(adapters, plan.aggregation.personal)
    algorithm, delta = plan.aggregation, trees.zeros(shared)
    if algorithm.client.report is None:
        return delta
    scalar = jnp.float32(0)
    received = () if algorithm.broadcast is None else algorithm.broadcast(algorithm.init(shared))
    memory = () if algorithm.client.init is None else algorithm.client.init(shared)
    trained = Trained(delta, shared, scalar, scalar, *((scalar, delta) if algorithm.client.probe else ()))
    local = Local(shared, memory, received, jnp.int32(0))
    shapes, _ = jax.eval_shape(algorithm.client.report, trained, local)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def message_like(plan: RoundPlan, state: RoundState) -> PyTree:
    """Zeros like one client's message, in a run that goes on."""
    own = jax.tree.map(lambda leaf: leaf[0], state.client_state.get("personal", {}))
    return template(plan, low_rank.join(state.adapters, own))


def nothing(plan: RoundPlan, adapters: PyTree) -> View | None:
    """The view before any client: an empty sum where one is released even if nobody takes part, else nothing."""
    if plan.mechanism is None or plan.mechanism.noised != "sum":
        return None
    return Sum(trees.zeros(adapters), jnp.float32(0))


def join(view: View | None, kind: type, messages: PyTree, weights: Array, real: int) -> View:
    """The server's view with one more chunk. A sum does not grow with the cohort; a stack does."""
    if kind is Stack:
        part = Stack(jax.tree.map(lambda leaf: leaf[:real], messages), weights[:real])
        return part if view is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), view, part)
    part = Sum(trees.weighted_sum(weights, messages), jnp.sum(weights))
    return part if view is None else jax.tree.map(jnp.add, view, part)


def noised_sum(
    plan: RoundPlan,
    view: View | None,
    privacy_state: dict[str, PyTree],
    below_clip: Array,
    number: int,
    attempt: int,
) -> tuple[View | None, dict[str, PyTree]]:
    """The sum with noise added once, over a public constant; and the mechanism's next state.

    Where every site has added its share of the noise only the constant is put in its place; where the sites have added
    noise of their own the view stays as it is.
    """
    mechanism = plan.mechanism
    if mechanism is None or mechanism.noised not in ("sum", "shares"):
        return view, privacy_state
    assert isinstance(view, Sum)
    if mechanism.noised == "shares":
        return Sum(view.total, jnp.float32(mechanism.weight)), privacy_state
    assert plan.secret_key is not None
    keys = [secret_round_key(plan.secret_key, number, attempt, purpose) for purpose in ("sum noise", "count noise")]
    state, bound = dict(privacy_state), clip_norm(mechanism, privacy_state)
    correlated = mechanism.correlated
    stddev = bound * jnp.float32(mechanism.stddev[0])
    mix = None if correlated is None else correlated.mix
    total, noise_state = _noised_sum(mix, view.total, keys[0], stddev, state.get("noise", ()))
    if correlated is not None:
        state["noise"] = noise_state
    if mechanism.adaptive is not None:
        state["clip_norm"] = _next_clip_norm(mechanism.adaptive, bound, below_clip, plan.cohort, keys[1])
    return Sum(total, jnp.float32(mechanism.weight)), state


@partial(jax.jit, static_argnums=0)
def _noised_sum(mix, total: PyTree, key: Array, stddev: Array, state: PyTree) -> tuple[PyTree, PyTree]:
    noise = noises.gaussian(key, total, stddev)
    if mix is not None:
        noise, state = mix(noise, state)
    return jax.tree.map(jnp.add, total, noise), state


@partial(jax.jit, static_argnums=0)
def _next_clip_norm(adaptive: AdaptiveClip, norm: Array, below_clip: Array, cohort: float, key: Array) -> Array:
    """Andrew et al. 2021, Algorithm 1: a geometric step towards the quantile, by a blurred count."""
    assert adaptive.count_noise is not None  # DpFedAvg.make has filled it in
    blurred = below_clip + adaptive.count_noise * jax.random.normal(key, (), jnp.float32)
    share = blurred / cohort + 0.5
    return norm * jnp.exp(-adaptive.learning_rate * (share - adaptive.quantile))
