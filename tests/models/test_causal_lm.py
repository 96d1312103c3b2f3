"""What must hold for the hidden states of any causal model with adapters, checked on a small Llama."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same, tiny_adapters, tiny_model

from fedjax_llm import lora
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import layer_adapters, lowest_adapted, module_paths, visible

ROWS, LENGTH, WINDOW = 3, 12, 4
SOME = ("down_proj",)
KINDS = {
    "plain": {},
    "qwen": {"head_norm": True, "qkv_bias": True, "tied": True},
    "window": {"window": WINDOW},
    "one head for all": {"kv_heads": 1},
}


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, adapters, tokens, positions=None, mask=None, dropout_keys=None, below=None):
    return model.hidden(params, adapters, tokens, positions, mask, dropout_keys, below)


def some_tokens(seed=0, rows=ROWS, length=LENGTH):
    return np.random.default_rng(seed).integers(0, 97, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(place=st.integers(0, LENGTH - 1), token=st.integers(0, 96))
def test_a_token_changes_nothing_before_it(kind, place, token):
    model, params = tiny_model(**KINDS[kind])
    tokens = some_tokens()
    changed = tokens.copy()
    changed[1, place] = (tokens[1, place] + 1 + token % 96) % 97
    before, after = (np.asarray(run(model, params, {}, t)) for t in (tokens, changed))
    assert np.array_equal(before[:, :place], after[:, :place])
    assert np.array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.allclose(before[1, place], after[1, place])


def test_a_token_is_seen_within_the_window_of_every_layer_and_no_further():
    model, params = tiny_model(window=WINDOW)
    reach = model.config.layers * (WINDOW - 1)
    tokens = some_tokens()
    changed = tokens.copy()
    changed[:, 0] = (tokens[:, 0] + 1) % 97
    difference = np.abs(np.asarray(run(model, params, {}, tokens) - run(model, params, {}, changed))).max((0, 2))
    assert np.all(difference[: reach + 1] > 0)
    assert np.all(difference[reach + 1 :] == 0)


def test_layers_may_have_windows_of_their_own():
    tokens = some_tokens()
    changed = tokens.copy()
    changed[:, 0] = (tokens[:, 0] + 1) % 97
    for windows, reach in (((WINDOW, WINDOW), 7), ((WINDOW, 2), 5), ((WINDOW, None), LENGTH), ((None, WINDOW), LENGTH)):
        model, params = tiny_model(window=windows)
        difference = np.abs(np.asarray(run(model, params, {}, tokens) - run(model, params, {}, changed))).max((0, 2))
        assert np.all(difference[:reach] > 0), windows
        assert np.all(difference[reach:] == 0), windows
    alike, params = tiny_model(window=(WINDOW, WINDOW))
    assert same(run(alike, params, {}, tokens), run(tiny_model(window=WINDOW)[0], params, {}, tokens))


@pytest.mark.parametrize("window", [WINDOW, (WINDOW, None), (None, 2)])
def test_a_given_mask_is_narrowed_to_the_window_of_each_layer(window):
    model, params = tiny_model(window=window)
    tokens, every = some_tokens(), np.tri(LENGTH, dtype=bool)[None]
    plain = run(model, params, {}, tokens)
    assert same(run(model, params, {}, tokens, None, every), plain)
    # Distances are counted in positions: the second half is a branch of its own, which begins where the first does.
    half, positions = LENGTH // 2, np.arange(LENGTH) % (LENGTH // 2)
    branches = every & ((np.arange(LENGTH) < half)[:, None] == (np.arange(LENGTH) < half)[None])
    found = run(model, params, {}, tokens, positions, branches)
    np.testing.assert_allclose(found[:, :half], plain[:, :half], atol=1e-5)
    np.testing.assert_allclose(found[:, half:], run(model, params, {}, tokens[:, half:]), atol=1e-5)


def test_visible_keys_by_hand():
    at = jnp.arange(4)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert np.array_equal(visible(at, at, 2), np.array(expected, bool))
    assert np.array_equal(visible(at, at, None), np.tri(4, dtype=bool))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_right_changes_nothing(kind):
    model, params = tiny_model(**KINDS[kind])
    adapters, tokens = tiny_adapters(model), some_tokens()
    padded = np.pad(tokens, ((0, 2), (0, 9)), constant_values=5)
    plain = run(model, params, adapters, tokens)
    np.testing.assert_allclose(run(model, params, adapters, padded)[:ROWS, :LENGTH], plain, atol=1e-5)


def test_a_rows_own_adapters_are_those_adapters_shared():
    model, params = tiny_model()
    own, tokens = tiny_adapters(model, leading=(ROWS,)), some_tokens()
    together = np.asarray(run(model, params, own, tokens))
    for row in range(ROWS):
        shared = jax.tree.map(lambda leaf, row=row: leaf[row], own)
        np.testing.assert_allclose(together[row], run(model, params, shared, tokens)[row], atol=1e-5)
    assert not np.allclose(together[0], run(model, params, {}, tokens)[0], atol=1e-2)


@pytest.mark.parametrize("leading", [(), (ROWS,)])
def test_fresh_adapters_give_exactly_the_base_model(leading):
    model, params = tiny_model()
    tokens, adapters = some_tokens(), tiny_adapters(model, leading=leading)
    fresh = {path: factors | {"b": jnp.zeros_like(factors["b"])} for path, factors in adapters.items()}
    assert same(run(model, params, fresh, tokens), run(model, params, {}, tokens))


def test_merged_weights_compute_what_the_adapters_do():
    model, params = tiny_model()
    adapters, tokens, scaling = tiny_adapters(model), some_tokens(), 0.7
    merged = lora.merge(params, adapters, scaling)
    expected = run(model, params, lora.scaled(adapters, scaling), tokens)
    np.testing.assert_allclose(run(model, merged, {}, tokens), expected, atol=1e-4)


def test_every_module_can_be_adapted_and_each_adapter_reaches_its_own():
    model, params = tiny_model()
    tokens = some_tokens()
    base = run(model, params, {}, tokens)
    adapters = tiny_adapters(model)
    assert set(adapters) == set(module_paths(model))
    for path in adapters:
        others = {other: jax.tree.map(jnp.zeros_like, adapters[other]) for other in adapters if other != path}
        assert not np.allclose(run(model, params, others | {path: adapters[path]}, tokens), base, atol=1e-3), path
    assert set(layer_adapters(adapters, 1)) == {"self_attn", "mlp"}


def test_given_positions_and_mask_replace_the_causal_ones():
    model, params = tiny_model()
    tokens = some_tokens()
    plain = run(model, params, {}, tokens)
    mask = np.broadcast_to(np.tri(LENGTH, dtype=bool), (ROWS, LENGTH, LENGTH))
    given = run(model, params, {}, tokens, np.arange(LENGTH), mask)
    assert same(given, plain)
    # Rotary positions count by difference only.
    np.testing.assert_allclose(run(model, params, {}, tokens, np.arange(LENGTH) + 7), plain, atol=1e-4)
    assert not np.allclose(run(model, params, {}, tokens, 2 * np.arange(LENGTH)), plain, atol=1e-3)


@pytest.mark.parametrize("remat", ["matmuls", "blocks"])
def test_recomputing_activations_changes_no_gradient(remat):
    tokens = some_tokens()

    def gradient(remat):
        model, params = tiny_model(remat=remat)
        adapters = tiny_adapters(model, targets=("q_proj",))
        return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(model.hidden(params, a, tokens)))))(adapters)

    for left, right in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())


# The trunk


def upper_adapters(model, lowest, leading=()):
    return {path: f for path, f in tiny_adapters(model, leading=leading).items() if int(path.split(".")[1]) >= lowest}


@pytest.mark.parametrize(("kind", "lowest"), [("plain", 0), ("plain", 1), *((kind, 2) for kind in KINDS)])
def test_layers_above_the_trunk_give_the_bits_of_the_whole(kind, lowest):
    model, params = tiny_model(layers=3, **KINDS[kind])
    adapters, tokens = upper_adapters(model, lowest, (ROWS,)), some_tokens()
    below = model.trunk(params, tokens, lowest)
    # Not under jit, where every layer is a program of its own: the same programs give the same bits.
    whole = model.hidden(params, adapters, tokens)
    assert same(model.hidden(params, adapters, tokens, below=below), whole)
    np.testing.assert_allclose(run(model, params, adapters, tokens, below=below), whole, rtol=0, atol=1e-5)


def test_above_the_trunk_each_layer_drops_what_it_does_in_the_whole():
    model, params = tiny_model(layers=3, dropout=0.5)
    adapters, tokens, keys = upper_adapters(model, 1), some_tokens(), jax.random.split(jax.random.key(3), ROWS)
    below = model.trunk(params, tokens, 1)
    whole = model.hidden(params, adapters, tokens, dropout_keys=keys)
    np.testing.assert_allclose(
        model.hidden(params, adapters, tokens, dropout_keys=keys, below=below), whole, rtol=0, atol=1e-5
    )
    assert not np.allclose(whole, model.hidden(params, adapters, tokens), atol=1e-3)


def test_the_trunk_takes_positions_and_mask():
    model, params = tiny_model(layers=3)
    adapters, tokens, positions = upper_adapters(model, 2), some_tokens(), 2 * np.arange(LENGTH)
    # The second half of a row does not see what stands just before it: a branch of a tree.
    mask = np.broadcast_to(np.tri(LENGTH, dtype=bool), (ROWS, LENGTH, LENGTH)).copy()
    mask[:, LENGTH // 2 :, LENGTH // 3 : LENGTH // 2] = False
    below = model.trunk(params, tokens, 2, positions, mask)
    whole = model.hidden(params, adapters, tokens, positions, mask)
    assert same(model.hidden(params, adapters, tokens, positions, mask, below=below), whole)
    for other in (model.trunk(params, tokens, 2, positions), model.trunk(params, tokens, 2, None, mask)):
        assert not np.allclose(other, below, atol=1e-3)


def test_layers_below_are_not_run_again():
    model, params = tiny_model(layers=3)
    adapters, tokens = upper_adapters(model, 2), some_tokens()
    below = model.trunk(params, tokens, 2)
    broken = params | {
        "layers": (*jax.tree.map(lambda leaf: leaf * jnp.nan, params["layers"][:2]), params["layers"][2])
    }
    assert not np.isfinite(model.hidden(broken, adapters, tokens)).any()
    whole = model.hidden(params, adapters, tokens)
    assert same(model.hidden(broken, adapters, tokens, below=below), whole)


def test_zeros_below_padding_reach_no_token_and_no_gradient():
    model, params = tiny_model(layers=3, head_norm=True)
    tokens, real = some_tokens(), np.arange(LENGTH) < np.array([LENGTH, 7, 0])[:, None]
    below = np.asarray(model.trunk(params, tokens, 2))

    def loss(adapters, below):
        hidden = model.hidden(params, adapters, tokens, below=below)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(hidden), 0.0)), hidden

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    adapters = upper_adapters(model, 2, (ROWS,))
    (plain, hidden), (zeroed, hidden_zeroed) = (gradient(adapters, b) for b in (below, below * real[..., None]))
    assert np.isfinite(hidden_zeroed).all()
    np.testing.assert_allclose(np.asarray(hidden_zeroed)[real], np.asarray(hidden)[real], atol=1e-5)
    for one, other in zip(jax.tree.leaves(zeroed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert not np.any(one[2])  # a row of padding alone


def test_the_lowest_adapted_layer_is_found_by_number():
    assert lowest_adapted(["layers.10.mlp.up_proj", "layers.9.self_attn.q_proj", "layers.11.mlp.up_proj"]) == 9
    assert lowest_adapted({}) == 0
    model, _ = tiny_model(layers=3)
    assert lowest_adapted(lora.target_modules(Lora(rank=2, layers=(-1,)), model)) == 2


# Dropout


def dropped(tokens, keys):
    model, params = tiny_model(dropout=0.5, layers=1)
    return np.asarray(run(model, params, tiny_adapters(model, targets=SOME), tokens, dropout_keys=keys))


def test_a_rows_dropout_depends_on_its_key_alone():
    tokens, keys = some_tokens(), jax.random.split(jax.random.key(3), ROWS)
    together = dropped(tokens, keys)
    longer = dropped(np.pad(tokens, ((0, 0), (0, 8))), keys)[:, :LENGTH]
    np.testing.assert_allclose(longer, together, atol=1e-5)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(dropped(tokens[order], keys[order]), together[order], atol=1e-5)
    for row in (0, 2):
        np.testing.assert_allclose(dropped(tokens[row : row + 1], keys[row : row + 1])[0], together[row], atol=1e-5)


def test_other_keys_drop_other_components_and_no_key_drops_none():
    tokens = np.repeat(some_tokens(rows=1), 2, axis=0)
    one, two = dropped(tokens, jax.random.split(jax.random.key(3), 2))
    assert not np.allclose(one, two, atol=1e-3)
    model, params = tiny_model(layers=1)
    assert same(dropped(tokens, None), np.asarray(run(model, params, tiny_adapters(model, targets=SOME), tokens)))


def test_layers_and_modules_drop_independently_and_at_the_given_rate():
    from fedjax_llm.models.layers import Projection

    layer = Projection(4, dropout=0.25, name="p")
    ones = jnp.ones((2, 500, 8))
    adapters = {"a": jnp.eye(8), "b": jnp.eye(8)[:, :4]}
    params = {"kernel": jnp.zeros((8, 4))}
    out = layer.apply({"params": params, "lora": adapters}, ones, jax.random.split(jax.random.key(0), 2))
    kept = np.asarray(out) > 0
    np.testing.assert_allclose(np.asarray(out)[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)


def test_the_largest_rank_fits_and_one_more_does_not():
    model, _ = tiny_model()
    assert lora.target_modules(Lora(rank=16, targets=("k_proj",)), model)
    with pytest.raises(Exception, match="17, more than the narrowest"):
        lora.target_modules(Lora(rank=17, targets=("k_proj",)), model)
