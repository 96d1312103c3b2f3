"""Ways to start and to scale adapters: rsLoRA, PiSSA, DoRA; masks, ranks, changes of the frozen weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ALL, same, tiny_adapters, tiny_model

from fedjax_llm import lora as low_rank
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 7)), jnp.int32)


def hidden(adapters, scaling=1.0, params=None):
    model, base = tiny_model()
    return model.hidden(base if params is None else params, low_rank.scaled(adapters, scaling), TOKENS)


def close(one, other, tolerance=2e-5):
    np.testing.assert_allclose(one, other, atol=tolerance, rtol=1e-4)


def test_rank_stabilised_scaling():
    assert Lora(rank=16, alpha=8).scaling == 0.5
    assert Lora(rank=16, alpha=8, rslora=True).scaling == 2.0


# PiSSA.


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_begins_as_the_base_model_with_its_largest_singular_values(rslora):
    model, params = tiny_model()
    lora = Lora(rank=4, alpha=6, targets=ALL, init="pissa", rslora=rslora)
    adapters = low_rank.init(jax.random.key(0), lora, model, params)
    assert same(adapters, low_rank.init(jax.random.key(1), lora, model, params))  # every client has the same
    offset = low_rank.remainder(adapters, lora)
    for path, factors in adapters.items():
        kernel = np.asarray(low_rank.kernel_of(params, path))
        product = lora.scaling * np.asarray(factors["a"]) @ np.asarray(factors["b"])
        values = np.linalg.svd(kernel, compute_uv=False)
        np.testing.assert_allclose(np.linalg.svd(product, compute_uv=False)[:4], values[:4], rtol=1e-5)
        assert np.linalg.norm(kernel - product) == pytest.approx(np.linalg.norm(values[4:]), rel=1e-5)
        close(kernel + np.asarray(offset[path]) + product, kernel, 1e-5)
    close(hidden(adapters, lora.scaling, low_rank.add(params, offset)), model.hidden(params, {}, TOKENS))


def test_other_starts_leave_the_weights_alone():
    model, _ = tiny_model()
    lora = Lora(rank=2)
    assert low_rank.remainder(low_rank.init(jax.random.key(0), lora, model), lora) == {}


# DoRA.


def dora(leading=()):
    """Factors and magnitudes, none of them as they begin."""
    model, params = tiny_model()
    adapters = tiny_adapters(model, leading=leading)
    rng = np.random.default_rng(3)
    for path, factors in adapters.items():
        norms = low_rank.column_norms(low_rank.kernel_of(params, path))
        factors["m"] = norms * jnp.asarray(rng.uniform(0.5, 2, (*leading, norms.size)), jnp.float32)
    return adapters


def test_dora_begins_as_the_base_model():
    model, params = tiny_model()
    adapters = low_rank.init(jax.random.key(0), Lora(rank=2, targets=ALL, dora=True), model, params)
    close(hidden(adapters), model.hidden(params, {}, TOKENS))
    assert same(low_rank.split(adapters, "both")[0], adapters)
    trained, frozen = low_rank.split(adapters, "b")
    assert {name for factors in trained.values() for name in factors} == {"b", "m"}
    assert {name for factors in frozen.values() for name in factors} == {"a"}


def test_dora_gives_every_output_the_norm_of_its_magnitude():
    """Against weights that are put together in NumPy, as in equation 5 of the paper."""
    model, params = tiny_model()
    adapters, scaling = dora(), 0.7
    change = {}
    for path, factors in adapters.items():
        kernel = np.asarray(low_rank.kernel_of(params, path), np.float64)
        moved = kernel + scaling * np.asarray(factors["a"], np.float64) @ np.asarray(factors["b"], np.float64)
        change[path] = jnp.asarray(moved * np.asarray(factors["m"]) / np.linalg.norm(moved, axis=0) - kernel)
    expected = model.hidden(low_rank.add(params, change), {}, TOKENS)
    close(hidden(adapters, scaling), expected)
    close(model.hidden(low_rank.merge(params, adapters, scaling), {}, TOKENS), expected)


def test_rows_have_magnitudes_of_their_own():
    together = dora((3,))
    for row in range(3):
        own = jax.tree.map(lambda leaf, row=row: leaf[row], together)
        close(hidden(together)[row], hidden(own)[row])


def test_the_norm_is_a_constant_in_the_backward_pass():
    """Equation 11: the gradient of ``b`` is that of plain LoRA on outputs that are stretched by a constant."""
    model, params = tiny_model(layers=1)
    path, adapters = "layers.0.self_attn.q_proj", dora()
    adapters = {path: adapters[path]}
    kernel = low_rank.kernel_of(params, path)
    moved = kernel + adapters[path]["a"] @ adapters[path]["b"]
    stretch = adapters[path]["m"] / low_rank.column_norms(moved)

    def total(b):
        return jnp.sum(model.hidden(params, {path: adapters[path] | {"b": b}}, TOKENS) ** 2)

    def stretched(b):
        change = (kernel + adapters[path]["a"] @ b) * stretch - kernel
        return jnp.sum(model.hidden(low_rank.add(params, {path: change}), {}, TOKENS) ** 2)

    b = adapters[path]["b"]
    np.testing.assert_allclose(jax.grad(total)(b), jax.grad(stretched)(b), rtol=2e-3, atol=2e-3)


def test_silent_adapters_are_the_base_model():
    model, params = tiny_model()
    for adapters in (dora(), tiny_adapters(model)):
        still = low_rank.silent(adapters, params)
        assert jax.tree.map(jnp.shape, still) == jax.tree.map(jnp.shape, adapters)
        close(hidden(still), model.hidden(params, {}, TOKENS))


def test_magnitudes_keep_their_precision():
    """Rounded to bfloat16 they would change the model before any training."""
    model, params = tiny_model()
    lora = Lora(rank=2, targets=ALL, dora=True, dtype="bfloat16")
    adapters = low_rank.init(jax.random.key(0), lora, model, params)
    close(hidden(adapters), model.hidden(params, {}, TOKENS))
    close(hidden(low_rank.silent(adapters, params)), model.hidden(params, {}, TOKENS))


def test_pissa_needs_all_its_components():
    with pytest.raises(UserError, match=r"clients of lower lora.ranks would lack a part of the model"):
        Lora(init="pissa", ranks=(2, 8))


def test_pissas_signs_are_those_of_the_largest_entries():
    model, params = tiny_model()
    adapters = low_rank.init(jax.random.key(0), Lora(rank=4, targets=ALL, init="pissa"), model, params)
    for factors in adapters.values():
        a = np.asarray(factors["a"])
        assert (np.take_along_axis(a, np.abs(a).argmax(axis=0)[None], axis=0) > 0).all()


def test_dora_and_pissa_do_not_go_together():
    with pytest.raises(UserError, match=r"lora.dora and lora.init='pissa'"):
        Lora(dora=True, init="pissa")


# Parts of adapters, and changes as adapters.


@given(rank=st.integers(1, 3))
@settings(max_examples=3)
def test_dead_components_are_zero_and_get_no_gradient(rank):
    model, params = tiny_model()
    cut = low_rank.truncated(tiny_adapters(model), rank)

    def loss(adapters):
        return jnp.sum(model.hidden(params, adapters, TOKENS) ** 2)

    for tree in (cut, jax.grad(loss)(cut)):
        for factors in tree.values():
            assert not np.any(factors["a"][:, rank:])
            assert not np.any(factors["b"][rank:])
            assert np.any(factors["a"][:, :rank])


def test_masked_factors():
    adapters = dora()
    found = low_rank.masked(adapters, {"a": jnp.float32(0), "b": jnp.float32(1)})
    for path, factors in found.items():
        assert not np.any(factors["a"])
        assert same([factors["b"], factors["m"]], [adapters[path]["b"], adapters[path]["m"]])


def test_changes_become_adapters_of_the_least_rank_that_holds_them():
    rng = np.random.default_rng(0)
    thin = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 9))
    change = {"one": jnp.asarray(thin, jnp.float32), "two": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)}
    lora, adapters = low_rank.factored(change, Lora(rank=2, alpha=3, rslora=True))
    assert lora.rank == 4
    assert lora.scaling == pytest.approx(3 / np.sqrt(2))
    for path, moved in change.items():
        close(lora.scaling * adapters[path]["a"] @ adapters[path]["b"], moved, 1e-5)


def test_unequal_ranks_are_checked():
    with pytest.raises(UserError, match=r"lora.ranks is \(2, 9\); each must be .* at most lora.rank, 8"):
        Lora(rank=8, ranks=(2, 9))
