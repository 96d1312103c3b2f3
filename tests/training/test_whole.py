"""Plain training: of adapters it is local training of one client, of all weights it is what autodiff says."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import same, tiny_adapters, tiny_base, tiny_model
from toy_rounds import toy_example

from fedjax_llm.data.records import EncodedExample
from fedjax_llm.models.decoding import Greedy, generate
from fedjax_llm.training import client_update, whole
from fedjax_llm.training.client_update import Trainer

SCALING, BATCH, STEPS = 1.5, 3, 5
EXAMPLES = tuple(toy_example(i, length, prompt) for i, (length, prompt) in enumerate([(6, 2), (9, 4), (14, 1), (8, 7)]))
RATE = {"weights": 1e-3, "adapters": 1e-2}


@pytest.fixture(scope="module")
def toy():
    model, params = tiny_model(layers=1)
    return model, params, tiny_adapters(model)


def batches(seed=0, steps=STEPS, size=BATCH, examples=EXAMPLES):
    return list(whole.batches(examples, size, steps, np.random.default_rng(seed)))


def trained(toy, trained, optimizer, work):
    """The state after these batches, and the losses before their steps."""
    model, params, adapters = toy
    state, losses = whole.start(optimizer, params, adapters, trained), []
    for batch in work:
        state, value = whole.step(model, SCALING, optimizer, trained, state, whole.arrays_of(batch))
        losses.append(float(value))
    return state, losses


def test_training_adapters_is_local_training_of_one_client(toy):
    model, params, adapters = toy
    optimizer, work = optax.adamw(RATE["adapters"]), batches()
    state, losses = trained(toy, "adapters", optimizer, work)
    trainer = Trainer(model, SCALING, optimizer)
    start = client_update.start(trainer, jax.tree.map(lambda leaf: leaf[None], adapters))
    own = client_update.run(trainer, params, start, work, jax.random.split(jax.random.key(0), 1), np.ones((1, STEPS)))
    for leaf, other, before in zip(*map(jax.tree.leaves, (state.adapters, own.adapters, adapters)), strict=True):
        np.testing.assert_allclose(leaf, other[0], atol=2e-5)
        assert np.abs(leaf - before).max() > RATE["adapters"]
    assert sum(losses) * BATCH == pytest.approx(float(own.loss[0]), rel=1e-5)
    assert same(state.params, params)


def loss_one_by_one(model, params, adapters, batch):
    """The mean over examples of each example's mean loss, each example alone, without padding or packing."""
    scaled = {path: {"a": one["a"], "b": SCALING * one["b"]} for path, one in adapters.items()}

    def of(example):
        tokens = jnp.asarray(example.tokens)
        logits = model.logits(params, model.hidden(params, scaled, tokens[None])[0])
        found = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - 1), tokens[1:]]
        return -jnp.mean(found[max(example.prompt_length - 1, 0) :])

    return sum(map(of, batch.examples)) / len(batch.examples)


@pytest.mark.parametrize("what", ["weights", "adapters"])
def test_a_step_is_along_the_gradient_of_the_plain_loss(toy, what):
    model, params, adapters = toy
    (batch,) = batches(steps=1)
    state, (value,) = trained(toy, what, optax.sgd(0.5), [batch])
    place = 1 if what == "weights" else 2
    oracle = jax.jit(jax.value_and_grad(partial(loss_one_by_one, model, batch=batch), place - 1))
    expected, gradient = oracle(params, adapters)
    assert value == pytest.approx(float(expected), rel=1e-5)
    moved, before = (state.params, params) if what == "weights" else (state.adapters, adapters)
    for leaf, old, slope in zip(*map(jax.tree.leaves, (moved, before, gradient)), strict=True):
        np.testing.assert_allclose(leaf, old - 0.5 * slope, atol=1e-5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert same(state.adapters, adapters) if what == "weights" else same(state.params, params)


def test_weights_train_without_adapters_as_well(toy):
    model, params, _ = toy
    work = batches(steps=1)
    bare, (value,) = trained((model, params, {}), "weights", optax.sgd(0.5), work)
    assert bare.adapters == {}
    expected = jax.jit(partial(loss_one_by_one, model, batch=work[0]))(params, {})
    assert value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("what", ["weights", "adapters"])
def test_a_text_is_learnt_by_heart(what):
    base, text = tiny_base(width=64), b"The key is under the third flowerpot, at the left."
    tokens = base.tokenizer.encode(text.decode())
    one = EncodedExample("text", np.array(tokens, np.int32), 8)
    state, losses = trained(
        (base.model, base.params, tiny_adapters(base.model, rank=8)),
        what,
        optax.adam(3e-3),
        batches(steps=200, size=1, examples=[one]),
    )
    assert losses[0] > 3
    assert losses[-1] < 0.5
    scaled = {path: {"a": own["a"], "b": SCALING * own["b"]} for path, own in state.adapters.items()}
    options = {"max_new_tokens": len(tokens) - 8, "end_ids": (), "pad_id": base.tokenizer.pad_id}
    (made,) = generate(base.model, state.params, scaled, [tokens[:8]], sampler=Greedy(), **options)
    assert made == tokens[8:]


@given(size=st.integers(1, 6), steps=st.integers(1, 9), count=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_batches_are_passes_over_all_examples(size, steps, count, seed):
    work = batches(seed, steps, size, EXAMPLES[:count])
    assert [len(batch.examples) for batch in work] == [size] * steps
    assert len({batch.tokens.shape for batch in work}) == len({batch.target_token.shape for batch in work}) == 1
    seen = Counter({one.record_id: 0 for one in EXAMPLES[:count]})
    for batch in work:
        seen.update(one.record_id for one in batch.examples)
        assert len(seen) == count
        assert max(seen.values()) - min(seen.values()) <= 1


def test_passes_are_in_different_orders_and_the_rng_decides():
    orders = [[batch.examples[0].record_id for batch in batches(seed, 48, 1)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(orders[0][i : i + 4]) for i in range(0, 48, 4)}) > 1
