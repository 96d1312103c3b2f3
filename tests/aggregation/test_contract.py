"""What every aggregation algorithm promises, whichever there are: each file of the room is walked."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same

from fedjax_llm import aggregation, lora, trees
from fedjax_llm.catalogue import makers
from fedjax_llm.errors import UserError
from fedjax_llm.types import Local, Stack, Sum, Trained

C = 4


every = pytest.mark.parametrize("algorithm", makers(aggregation), ids=lambda algorithm: algorithm.__name__)


@cache
def made(algorithm: type):
    """The algorithm with its defaults, and its jitted update."""
    aggregator = algorithm().make()
    return aggregator, jax.jit(aggregator.update)


def random_tree(seed: int, *leading: int):
    rng = np.random.default_rng(seed)
    shapes = {"q": {"a": (5, 2), "b": (2, 3)}, "v": {"a": (5, 2), "b": (2, 4)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


ADAPTERS = random_tree(0)


def travels(algorithm: type, tree):
    """The part of a tree like the adapters that is no client's own."""
    return lora.partition(tree, made(algorithm)[0].personal)[1]


def messages(algorithm: type, deltas, adapters=None):
    """What clients send that have moved by ``deltas`` [C, ...] from the adapters, in their first round."""
    aggregator = made(algorithm)[0]
    if aggregator.client.report is None:
        return deltas
    adapters = travels(algorithm, ADAPTERS) if adapters is None else adapters
    count = jax.tree.leaves(deltas)[0].shape[0]
    received = () if aggregator.broadcast is None else aggregator.broadcast(aggregator.init(adapters))
    memory = () if aggregator.client.init is None else aggregator.client.init(adapters)
    local = trees.repeat(Local(adapters, memory, received, jnp.int32(2)), count)
    end = jax.tree.map(lambda a, d: (a + d).astype(a.dtype), adapters, deltas)
    probe = (jnp.ones(count), deltas) if aggregator.client.probe else ()
    trained = Trained(deltas, end, jnp.full(count, 2.0), jnp.full(count, 0.1), *probe)
    return jax.vmap(aggregator.client.report)(trained, local)[0]


def shown(algorithm: type, deltas, weights, adapters=None):
    """The declared view of clients that have moved by ``deltas`` [C, ...], with weights [C]; zero: left out."""
    weights = jnp.asarray(weights, jnp.float32)
    sent = messages(algorithm, travels(algorithm, deltas), adapters)
    sent = trees.select(weights > 0, sent, jax.tree.map(jnp.zeros_like, sent))
    if made(algorithm)[0].view is Stack:
        return Stack(sent, weights)
    return Sum(trees.weighted_sum(weights, sent), weights.sum())


def effective(algorithm: type, adapters, state):
    """What the server has made of the weights: products of whole factors, and what was moved into the base."""
    residual = made(algorithm)[0].residual
    moved = {} if residual is None else residual(state)
    whole = all({"a", "b"} <= factors.keys() for factors in adapters.values())
    product = lora.products(adapters) if whole else adapters
    return jax.tree.map(jnp.add, product, moved) if moved else product


def played(algorithm: type, views, state=None, adapters=ADAPTERS):
    """Adapters and state after one update with each view."""
    aggregator, update = made(algorithm)
    adapters = travels(algorithm, adapters)
    state = aggregator.init(adapters) if state is None else state
    for view in views:
        adapters, state = update(view, state, adapters)
    return adapters, state


def assert_close(one, other, tolerance=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5)


def assert_alike(algorithm: type, one, other, tolerance=1e-6):
    """Adapters and states are close; of an algorithm that takes products apart, what they have made of the weights.

    Singular vectors turn with the rounding of a sum wherever two singular values are near each other.
    """
    if made(algorithm)[0].whole:
        one, other = (effective(algorithm, *outcome) for outcome in (one, other))
    assert_close(one, other, tolerance)


def test_the_walk_finds_the_family():
    names = {algorithm.__name__ for algorithm in makers(aggregation)}
    assert {"FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"} <= names


@every
def test_it_is_a_frozen_dataclass_with_defaults_that_declares_its_view(algorithm):
    assert algorithm.__dataclass_params__.frozen
    assert made(algorithm)[0].view in (Sum, Stack)
    assert algorithm() == algorithm()


@every
def test_it_moves_towards_the_clients_and_keeps_shapes_and_types(algorithm):
    delta = random_tree(1)
    moved, state = played(algorithm, [shown(algorithm, trees.repeat(delta, C), np.ones(C))])
    start = travels(algorithm, ADAPTERS)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), moved) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), start
    )
    there = jax.tree.map(jnp.add, start, travels(algorithm, delta))
    before, after = effective(algorithm, start, made(algorithm)[0].init(start)), effective(algorithm, moved, state)
    step, wanted = (
        trees.subtract(after, before),
        trees.subtract(effective(algorithm, there, made(algorithm)[0].init(start)), before),
    )
    along = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (step, wanted)), strict=True))
    assert along > 0


@every
@settings(max_examples=15)
@given(order=st.permutations(range(C)), seed=st.integers(0, 99))
def test_the_order_of_clients_does_not_matter(algorithm, order, seed):
    deltas, weights = random_tree(seed, C), np.random.default_rng(seed).uniform(0.5, 9, C)
    order = np.array(order)
    one = played(algorithm, [shown(algorithm, deltas, weights)] * 2)
    other = played(algorithm, [shown(algorithm, trees.take(deltas, order), weights[order])] * 2)
    assert_alike(algorithm, one, other, 1e-5)


@every
@settings(max_examples=15)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_the_scale_of_the_weights_does_not_matter(algorithm, scale, seed):
    deltas, weights = random_tree(seed, C), np.random.default_rng(seed).uniform(0.5, 9, C)
    one = played(algorithm, [shown(algorithm, deltas, weights)] * 2)
    other = played(algorithm, [shown(algorithm, deltas, scale * weights)] * 2)
    assert_alike(algorithm, one, other, 1e-5)


@every
def test_a_client_of_weight_zero_is_as_if_it_were_not_there(algorithm):
    deltas, weights = random_tree(2, C), np.array([1.0, 2.0, 3.0, 0.0])
    one = played(algorithm, [shown(algorithm, deltas, weights)])
    other = played(algorithm, [shown(algorithm, trees.take(deltas, np.arange(3)), weights[:3])])
    assert_alike(algorithm, one, other)


@every
def test_no_change_is_a_fixed_point(algorithm):
    start, adapters = travels(algorithm, ADAPTERS), ADAPTERS
    state, still = made(algorithm)[0].init(start), jax.tree.map(jnp.zeros_like, random_tree(0, C))
    before = effective(algorithm, start, state)
    for _ in range(3):
        adapters, state = played(algorithm, [shown(algorithm, still, np.ones(C), adapters)], state, adapters)
        adapters_are_products = made(algorithm)[0].client.report is not None
        if adapters_are_products:  # the factors may be others, or all zero, if what they come to is the same
            assert_close(effective(algorithm, adapters, state), before, 2e-5)
        else:
            assert same(adapters, start)


@every
def test_a_total_weight_of_zero_leaves_everything_as_it_is(algorithm):
    first, state = played(algorithm, [shown(algorithm, random_tree(3, C), np.ones(C))])
    nobody = shown(algorithm, random_tree(0, C), np.zeros(C))
    adapters, after = played(algorithm, [nobody], state, first)
    assert same(adapters, first)
    assert same(after, state)


@every
def test_the_state_survives_a_checkpoint_and_a_break(algorithm):
    views = [shown(algorithm, random_tree(seed, C), np.arange(1, C + 1)) for seed in range(4)]
    adapters, state = played(algorithm, views[:2])
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    assert same(played(algorithm, views[2:], restored, adapters), played(algorithm, views))


@every
def test_jit_changes_nothing(algorithm):
    view = shown(algorithm, random_tree(4, C), np.ones(C))
    aggregator, _ = made(algorithm)
    start = travels(algorithm, ADAPTERS)
    assert_alike(algorithm, aggregator.update(view, aggregator.init(start), start), played(algorithm, [view]))


@every
def test_the_input_is_left_as_it_is(algorithm):
    adapters = random_tree(0)
    played(algorithm, [shown(algorithm, random_tree(5, C), np.ones(C))], adapters=adapters)
    assert same(adapters, ADAPTERS)


@every
@settings(max_examples=15)
@given(cuts=st.sets(st.integers(1, C - 1)), seed=st.integers(0, 99))
def test_chunks_folded_one_by_one_equal_all_at_once(algorithm, cuts, seed):
    deltas, weights = random_tree(seed, C), np.random.default_rng(seed).uniform(0.5, 9, C)
    join = jnp.add if made(algorithm)[0].view is Sum else lambda a, b: jnp.concatenate([a, b])
    folded = None
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), C], strict=True):
        part = shown(algorithm, jax.tree.map(lambda leaf, f=first, e=last: leaf[f:e], deltas), weights[first:last])
        folded = part if folded is None else jax.tree.map(join, folded, part)
    assert_alike(algorithm, played(algorithm, [folded]), played(algorithm, [shown(algorithm, deltas, weights)]), 1e-5)


@every
def test_adapters_in_bfloat16_stay_so(algorithm):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ADAPTERS)
    view = shown(algorithm, random_tree(6, C), np.ones(C), travels(algorithm, half))
    adapters, state = played(algorithm, [view] * 2, adapters=half)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("bfloat16")}
    fresh = made(algorithm)[0].init(travels(algorithm, half))
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, fresh)


REFUSED = {
    "server_lr": (0.0, -1.0, float("nan"), float("inf")),
    "tau": (0.0, -1e-3),
    "momentum": (1.0, -0.1, float("nan")),
    "b1": (1.0, -0.1),
    "b2": (1.0, 1.5),
    "alpha": (-1.0, float("nan")),
    "participation": (0.0, 1.5, float("nan")),
    "q": (-0.5, float("nan"), float("inf")),
    "learning_rate": (0.0, -1.0, float("nan")),
    "trim": (0.5, -0.1, float("nan")),
    "byzantine": (-1,),
    "keep": (0, -1),
    "iterations": (0, -1),
    "smoothing": (0.0, -1.0, float("inf")),
    "norm": (0.0, -1.0, float("nan")),
    "strength": (0.0, -1.0, float("nan")),
    "base_layers": (0, -1),
    "seed": (-1, 2**31),
    "gamma": (0.0, 1.1, float("nan")),
    "penalty": (-1.0, float("nan"), float("inf")),
    "ridge": (0.0, -1.0, float("nan")),
    "residual_rank": (0, -1),
}


@every
def test_impossible_values_are_refused_by_name(algorithm):
    taken = {name: values for name, values in REFUSED.items() if name in algorithm.__dataclass_fields__}
    assert taken or not algorithm.__dataclass_fields__
    for name, values in taken.items():
        for value in values:
            with pytest.raises(UserError, match=f"aggregation.{name} is {value}"):
                replace(algorithm(), **{name: value}).make()
