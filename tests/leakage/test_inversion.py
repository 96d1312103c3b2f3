"""The search by optimisation, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fedjax_llm import lora
from fedjax_llm.errors import UserError
from fedjax_llm.leakage.inversion import Batch, Inversion, distance, invert, relaxed_gradient
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.training.losses import target_nll
from fedjax_llm.types import Adapters, Params
from tests.tiny import tiny_adapters, tiny_model

VOCABULARY = 16
COMPILED = jax.jit(relaxed_gradient, static_argnums=(0, 2))
HOW = Inversion(steps=20, restarts=6, sweeps=3, candidates=VOCABULARY)


def known() -> tuple[CausalLM, Params, Adapters]:
    model, params = tiny_model(vocab_size=VOCABULARY, layers=1)
    return model, params, tiny_adapters(model, rank=8, targets=("q_proj", "v_proj"))


def gradient(rows: np.ndarray, train: str) -> Adapters:
    model, params, adapters = known()
    trained, frozen = lora.split(adapters, train)
    weights = jnp.asarray(Batch((rows.shape[1],) * len(rows), (1,) * len(rows)).weights())
    return COMPILED(model, params, 1.0, trained, frozen, jax.nn.one_hot(rows, VOCABULARY), weights)


def test_at_hard_tokens_the_relaxed_gradient_is_that_of_training():
    model, params, adapters = known()
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (2, 5))

    def loss(own: Adapters) -> jax.Array:
        hidden = model.hidden(params, lora.scaled(own, 1.0), jnp.asarray(rows))[:, :-1]
        return jnp.mean(
            target_nll(model, params, hidden.reshape(-1, hidden.shape[-1]), jnp.asarray(rows[:, 1:].ravel()))
        )

    expected, found = jax.grad(loss)(adapters), gradient(rows, "both")
    for path in expected:
        for name in expected[path]:
            assert_allclose(found[path][name], expected[path][name], rtol=1e-3, atol=1e-5)


def test_weights_are_means_over_targets_and_then_over_sequences():
    expected = [[0, 0, 0.25, 0.25, 0], [0.5, 0, 0, 0, 0]]
    assert_allclose(Batch((5, 2), (3, 0)).weights()[:, :4], np.array(expected)[:, :4])


def test_the_distance_is_zero_at_the_gradient_and_one_for_opposite_angles():
    seen = {"m": {"a": jnp.asarray([3.0, 4.0])}}
    assert float(distance(seen, seen)) == pytest.approx(0, abs=1e-6)
    double = {"m": {"a": 2 * seen["m"]["a"]}}
    assert float(distance(double, seen)) == pytest.approx(0.1, abs=1e-6)
    opposite = {"m": {"a": -seen["m"]["a"]}}
    assert float(distance(opposite, seen, 1.0, 0.0)) == pytest.approx(2, abs=1e-6)


def test_a_short_sequence_is_read_from_a_clean_gradient_and_not_from_a_noised_one():
    model, params, adapters = known()
    rows = np.array([[7, 2, 11]])
    seen, batch = gradient(rows, "b"), Batch((3,), (1,))
    found = invert(HOW, model, params, 1.0, adapters, seen, batch, jax.random.key(0))
    assert found.sequences == [tuple(rows[0].tolist())]
    assert found.distance < 1e-4
    rng = np.random.default_rng(0)
    scale = 200 * np.sqrt(np.mean(np.concatenate([np.square(leaf).ravel() for leaf in jax.tree.leaves(seen)])))
    noised = jax.tree.map(lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32), seen)
    other = invert(HOW, model, params, 1.0, adapters, noised, batch, jax.random.key(0))
    assert other.sequences != found.sequences
    assert other.distance > 0.5


def test_it_takes_adapters_on_layer_0_and_possible_settings():
    model, params, adapters = known()
    upper = {path.replace("layers.0.", "layers.1."): own for path, own in adapters.items()}
    with pytest.raises(UserError, match="lowest adapted layer is 1"):
        invert(HOW, model, params, 1.0, upper, upper, Batch((4,), (1,)), jax.random.key(0))
    with pytest.raises(UserError, match="learning_rate"):
        Inversion(learning_rate=0.0)
    with pytest.raises(UserError, match="one of the first positive"):
        Inversion(cosine=0.0, euclidean=0.0)
