"""Per-example gradients of packed rows against the gradient of each example alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_adapters
from toy_rounds import SCALING, plain_loss, toy_example, toy_model

from fedjax_llm import trees
from fedjax_llm.data.packing import Shape, pack
from fedjax_llm.training.rows import Rows, example_gradients, row_keys, row_losses, rows_of

EXAMPLES = [toy_example(i, length, prompt) for i, (length, prompt) in enumerate([(14, 4), (6, 0), (9, 3), (9, 1)])]
OWNERS = (0, 1, 1, 0)  # the client of each example
SHAPE = Shape(rows=6, length=16, targets=48)
MODEL, PARAMS, _ = toy_model()
ADAPTERS = tiny_adapters(MODEL, targets=("q_proj", "down_proj"), leading=(2,))
KEYS = jax.random.split(jax.random.key(3), 2)
gradients_of = jax.jit(example_gradients, static_argnums=(0, 1))


def packed(shape: Shape, order=(0, 1, 2, 3)) -> Rows:
    """One microbatch with the examples, each a step's batch index of its client, in this order of rows."""
    work = [[[EXAMPLES[i] for i in range(4) if OWNERS[i] == c]] for c in range(2)]
    batches = list(pack(work, [shape], clients=2))
    assert len(batches) == 1
    rows = rows_of(batches[0])
    # Where each example lies now: by owner and place in the batch.
    places = {(int(rows.client[m]), int(rows.index[m])): m for m in range(4)}
    now = [places[OWNERS[i], OWNERS[:i].count(OWNERS[i])] for i in order]
    moved = [*now, *range(4, shape.rows)]
    return rows._replace(
        **{name: getattr(rows, name)[moved] for name in ("tokens", "client", "step", "index")},
        target_row=np.argsort(moved)[rows.target_row].astype(np.int32),
    )


@pytest.fixture(scope="module")
def outcome():
    return gradients_of(MODEL, SCALING, PARAMS, ADAPTERS, packed(SHAPE), KEYS)


@pytest.mark.parametrize("row", range(4))
def test_each_row_has_the_gradient_of_its_example_alone(row, outcome):
    losses, gradients = outcome
    own = jax.tree.map(lambda leaf: leaf[OWNERS[row]], ADAPTERS)
    example = EXAMPLES[row]
    count = len(example.tokens) - max(example.prompt_length, 1)
    loss, slope = plain_loss(MODEL, PARAMS, own, example.tokens, example.prompt_length)
    assert losses[row] == pytest.approx(float(loss) / count, rel=1e-5)
    for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(mine[row], theirs / count, atol=1e-5)
        assert np.abs(theirs).max() > 1e-3


def test_padding_rows_have_exactly_nothing(outcome):
    losses, gradients = outcome
    assert losses.shape == (6,)
    assert not np.any(losses[4:])
    assert not any(np.any(leaf[4:]) for leaf in jax.tree.leaves(gradients))


def test_a_bad_client_spoils_no_row_of_another(outcome):
    spoilt = trees.select(np.array([False, True]), ADAPTERS, jax.tree.map(lambda leaf: leaf * jnp.nan, ADAPTERS))
    losses, gradients = gradients_of(MODEL, SCALING, PARAMS, spoilt, packed(SHAPE), KEYS)
    mine = np.array([1, 2])
    np.testing.assert_array_equal(losses[mine], outcome[0][mine])
    for leaf, clean in zip(jax.tree.leaves(gradients), jax.tree.leaves(outcome[1]), strict=True):
        np.testing.assert_array_equal(leaf[mine], clean[mine])
    assert np.isnan(losses[np.array([0, 3])]).all()


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2)])
def test_shuffled_rows_give_shuffled_gradients(order, outcome):
    losses, gradients = gradients_of(MODEL, SCALING, PARAMS, ADAPTERS, packed(SHAPE, order), KEYS)
    np.testing.assert_allclose(losses[:4], outcome[0][np.array(order)], rtol=1e-5)
    for leaf, before in zip(jax.tree.leaves(gradients), jax.tree.leaves(outcome[1]), strict=True):
        np.testing.assert_allclose(leaf[:4], before[np.array(order)], atol=1e-6)


def test_dropout_masks_do_not_depend_on_order_or_padding():
    model, params, _ = toy_model(dropout=0.5)
    losses, gradients = gradients_of(model, SCALING, params, ADAPTERS, packed(SHAPE), KEYS)
    order = (2, 0, 3, 1)
    wider = packed(Shape(rows=9, length=24, targets=64), order)
    others, slopes = gradients_of(model, SCALING, params, ADAPTERS, wider, KEYS)
    np.testing.assert_allclose(others[:4], losses[np.array(order)], rtol=1e-5)
    for leaf, before in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(leaf[:4], before[np.array(order)], atol=1e-5)
    # Another step has other masks, as has another client's key.
    rows = packed(SHAPE)
    later, _ = gradients_of(model, SCALING, params, ADAPTERS, rows._replace(step=rows.step + 1), KEYS)
    assert (np.abs(later - losses)[:4] > 1e-6).all()
    swapped, _ = gradients_of(model, SCALING, params, ADAPTERS, rows, KEYS[::-1])
    assert (np.abs(swapped - losses)[:4] > 1e-6).all()


def test_without_dropout_the_keys_do_not_matter(outcome):
    losses, _ = gradients_of(MODEL, SCALING, PARAMS, ADAPTERS, packed(SHAPE), KEYS[::-1])
    np.testing.assert_array_equal(losses, outcome[0])


def test_row_keys_differ_by_client_step_and_index():
    triples = [(c, s, i) for c in range(2) for s in range(3) for i in range(3)]
    client, step, index = (np.array(column, np.int32) for column in zip(*triples, strict=True))
    rows = packed(SHAPE)._replace(client=client, step=step, index=index)
    keys = {tuple(key) for key in np.asarray(jax.random.key_data(row_keys(KEYS, rows)))}
    assert len(keys) == len(triples)


def test_shared_adapters_give_the_losses_of_equal_copies():
    shared = jax.tree.map(lambda leaf: leaf[0], ADAPTERS)
    rows = packed(SHAPE)
    losses = jax.jit(row_losses, static_argnums=(0, 1))(MODEL, SCALING, PARAMS, shared, rows)
    copies, _ = gradients_of(MODEL, SCALING, PARAMS, trees.repeat(shared, 2), rows, KEYS)
    np.testing.assert_allclose(losses, copies, rtol=1e-5)
