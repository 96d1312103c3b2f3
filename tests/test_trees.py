import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm import trees

COUNT = 4


def stack(seed: int = 0, count: int = COUNT) -> dict:
    """Leaves [count, ...], of different ranks and types."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32)  # noqa: E731
    return {"a": draw(3, 2), "b": {"c": draw(5).astype(jnp.bfloat16), "d": draw()}}


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def assert_leaves(tree, expected, **tolerance):
    for found, wanted in zip(leaves(tree), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **tolerance)


@given(index=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=6))
@settings(max_examples=15)
def test_segment_sum_undoes_take_up_to_counts(index):
    tree, index = stack(), jnp.asarray(index)
    rows = trees.take(tree, index)
    assert_leaves(rows, [leaf[np.asarray(index)] for leaf in leaves(tree)])
    counts = np.bincount(index, minlength=COUNT).astype(float)
    summed = trees.segment_sum(rows, index, COUNT)
    expected = [leaf * counts.reshape(-1, *[1] * (leaf.ndim - 1)) for leaf in leaves(tree)]
    assert_leaves(summed, expected, rtol=2e-2, atol=1e-6)  # the bfloat16 leaf is summed in its own type


def test_put_replaces_and_drops_what_lies_outside():
    tree, part = stack(), stack(seed=1, count=3)
    found = trees.put(tree, jnp.asarray([2, COUNT, 0]), part)
    expected = leaves(tree)
    for leaf, new in zip(expected, leaves(part), strict=True):
        leaf[2], leaf[0] = new[0], new[2]
    assert_leaves(found, expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(tree)]


def test_repeat():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.asarray(7.0)}
    assert_leaves(trees.repeat(tree, 3), [np.stack([np.arange(6.0).reshape(2, 3)] * 3), np.full(3, 7.0)])


def test_select_spreads_no_nan_either_way():
    yes, no = stack(), stack(seed=1)
    mask = jnp.asarray([True, False, True, False])
    spoil = lambda tree, where: jax.tree.map(lambda leaf: leaf.at[where].set(jnp.nan), tree)  # noqa: E731
    found = trees.select(mask, spoil(yes, jnp.asarray([1, 3])), spoil(no, jnp.asarray([0, 2])))
    expected = [np.stack([a[0], b[1], a[2], b[3]]) for a, b in zip(leaves(yes), leaves(no), strict=True)]
    assert_leaves(found, expected)
    gradient = jax.grad(lambda tree: jnp.sum(trees.select(mask, tree, spoil(no, jnp.asarray([1])))["a"][0]))(yes)
    assert all(np.isfinite(leaf).all() for leaf in leaves(gradient))


def test_weighted_sum_is_in_float32():
    tree, weights = stack(), np.array([0.5, 0.0, 2.0, -1.0])
    found = trees.weighted_sum(jnp.asarray(weights, jnp.float32), tree)
    assert_leaves(found, [np.tensordot(weights, leaf, 1) for leaf in leaves(tree)], rtol=1e-5, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    # 256 + 1 is not representable in bfloat16
    ones = {"a": jnp.asarray([256.0, 1.0], jnp.bfloat16)}
    assert float(trees.weighted_sum(jnp.ones(2), ones)["a"]) == 257.0


def test_norms_are_over_the_whole_tree():
    tree = stack()
    flat = np.concatenate([leaf.reshape(COUNT, -1) for leaf in leaves(tree)], axis=1)
    np.testing.assert_allclose(trees.norms(tree), np.linalg.norm(flat, axis=1), rtol=1e-6)


def test_subtract_broadcasts():
    tree, one = stack(), jax.tree.map(lambda leaf: leaf[0], stack(seed=1))
    expected = [a - b for a, b in zip(leaves(tree), leaves(one), strict=True)]
    assert_leaves(trees.subtract(tree, one), expected, rtol=1e-2, atol=1e-2)
    assert_leaves(trees.subtract(tree, tree), [np.zeros_like(leaf) for leaf in leaves(tree)])
