"""What the models of every family promise to the code that trains, decodes, quantises and spreads them.

Those of ``tiny_configs.py``; what their families say of themselves is tested in ``test_families.py``.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import same, tiny_adapters
from tiny_configs import TINY_CONFIGS, VOCABULARY, tiny_of

from fedjax_llm import lora, mesh
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models import llama
from fedjax_llm.models.causal_lm import module_paths
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.quantised import is_quantised
from fedjax_llm.models.truncation import truncated

ROWS, LENGTH = 3, 12
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
RUN = [name for name in TINY_CONFIGS if name == "LlamaForCausalLM" or name not in llama.FAMILY.architectures]
"""The Llama family's switches have tests of their own."""

of_every_block = pytest.mark.parametrize("name", RUN)


@cache
def built(name: str, **options: Any):
    return tiny_of(TINY_CONFIGS[name], **options)


def adapters_of(model: Any, leading: tuple[int, ...] = ()) -> Any:
    return tiny_adapters(model, targets=tuple(model.family.projections(model.config)), leading=leading)


@of_every_block
def test_a_token_changes_nothing_before_it(name):
    model, params = built(name)
    for place in (0, LENGTH // 2, LENGTH - 1):
        changed = TOKENS.copy()
        changed[1, place] = (TOKENS[1, place] + 1) % VOCABULARY
        before, after = (np.asarray(model.hidden(params, {}, tokens)) for tokens in (TOKENS, changed))
        assert np.array_equal(before[:, :place], after[:, :place])
        assert np.array_equal(before[[0, 2]], after[[0, 2]])
        assert not np.allclose(before[1, place], after[1, place])


@of_every_block
def test_the_order_of_tokens_counts(name):
    model, params = built(name)
    swapped = TOKENS.copy()
    swapped[:, :2] = TOKENS[:, 1::-1]
    before, after = (np.asarray(model.hidden(params, {}, tokens)) for tokens in (TOKENS, swapped))
    assert np.abs(before - after)[:, -1].max() > 1e-4


@of_every_block
def test_a_rows_own_adapters_are_those_adapters_shared_and_are_those_merged(name):
    model, params = built(name)
    own = adapters_of(model, (ROWS,))
    together, base = (np.asarray(model.hidden(params, adapters, TOKENS)) for adapters in (own, {}))
    for row in range(ROWS):
        shared = jax.tree.map(lambda leaf, row=row: leaf[row], own)
        np.testing.assert_allclose(together[row], model.hidden(params, shared, TOKENS)[row], atol=2e-5)
        merged = lora.merge(params, shared, 1.0)
        np.testing.assert_allclose(together[row], model.hidden(merged, {}, TOKENS)[row], atol=1e-4)
        assert not np.allclose(together[row], base[row], atol=1e-2)


@of_every_block
def test_each_adapter_reaches_its_module(name):
    model, params = built(name)
    adapters, base = adapters_of(model), model.hidden(params, {}, TOKENS)
    assert set(adapters) == set(module_paths(model))
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    np.testing.assert_allclose(model.hidden(params, nothing, TOKENS), base, atol=1e-5)
    for path in adapters:
        found = model.hidden(params, nothing | {path: adapters[path]}, TOKENS)
        assert not np.allclose(found, base, atol=1e-3), path


@of_every_block
def test_the_cache_gives_what_the_whole_gives(name):
    model, params = built(name)
    adapters, padding = adapters_of(model), np.array([0, 2, 7])
    shifted = np.stack([np.roll(row, skip) for row, skip in zip(TOKENS, padding, strict=True)])  # padded on the left
    cache, at, parts = model.empty_cache(ROWS, 16, jnp.float32), 0, []
    for until in (9, *range(10, LENGTH + 1)):
        hidden, cache = model.extend(params, adapters, shifted[:, at:until], cache, jnp.int32(at), padding)
        parts.append(np.asarray(hidden))
        at = until
    found, whole = np.concatenate(parts, axis=1), np.asarray(model.hidden(params, adapters, TOKENS))
    for row, skip in enumerate(padding):
        np.testing.assert_allclose(found[row, skip:], whole[row, : LENGTH - skip], atol=1e-4)


@of_every_block
def test_the_first_layers_alone_are_the_trunk_of_the_whole(name):
    model, params = built(name)
    adapters = {path: factors for path, factors in adapters_of(model).items() if path.startswith("layers.1.")}
    below = model.trunk(params, TOKENS, 1)
    assert same(model.hidden(params, adapters, TOKENS, below=below), model.hidden(params, adapters, TOKENS))
    short = truncated(BaseModel(model, params, None, "tiny", "0", 0), 1)  # pyrefly: ignore[bad-argument-type]
    found = short.model.hidden(short.params, {}, TOKENS)
    assert same(found, model.family.finish(model.config, params, below))


@of_every_block
def test_every_weight_counts_and_recomputing_activations_changes_no_gradient(name):
    def gradient(remat):
        model, params = built(name, remat=remat)

        def total(params, adapters):
            hidden = model.hidden(params, adapters, TOKENS)
            return jnp.sum(jnp.sin(model.logits(params, hidden.reshape(-1, model.config.width))))

        return jax.grad(total, (0, 1))(params, adapters_of(model))

    plain, again = (jax.tree_util.tree_leaves_with_path(gradient(remat)) for remat in ("none", "blocks"))
    for (path, left), (_, right) in zip(plain, again, strict=True):
        assert np.any(left), path
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max(), err_msg=str(path))


@of_every_block
def test_half_the_bits_give_hidden_states_of_half_the_bits_and_wide_logits(name):
    (model, params), (_, wide) = built(name, dtype="bfloat16"), built(name)
    found, expected = model.hidden(params, {}, TOKENS), np.asarray(model.hidden(wide, {}, TOKENS))
    assert found.dtype == jnp.bfloat16
    assert model.logits(params, found[:, -1]).dtype == jnp.float32
    assert np.abs(np.asarray(found, np.float32) - expected).max() < 0.1 * np.abs(expected).max()


@of_every_block
def test_quantised_matrices_are_near_the_whole_ones(name):
    (model, params), (_, whole) = built(name, quantised="int8"), built(name)
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantised) if is_quantised(leaf)]
    assert len(kernels) == len(module_paths(model))
    adapters = adapters_of(model)
    expected = np.asarray(model.hidden(whole, adapters, TOKENS))
    assert 0 < np.abs(model.hidden(params, adapters, TOKENS) - expected).max() < 0.1 * np.abs(expected).max()


@of_every_block
def test_dropout_is_of_the_adapters_alone(name):
    (dropping, params), (model, _) = built(name, dropout=0.5), built(name)
    keys, adapters = jax.random.split(jax.random.key(3), ROWS), adapters_of(model)
    plain, nothing = model.hidden(params, adapters, TOKENS), jax.tree.map(jnp.zeros_like, adapters)
    assert not np.allclose(dropping.hidden(params, adapters, TOKENS, dropout_keys=keys), plain, atol=1e-3)
    base = dropping.hidden(params, nothing, TOKENS, dropout_keys=keys)
    np.testing.assert_allclose(base, model.hidden(params, nothing, TOKENS), atol=1e-5)


@of_every_block
def test_a_model_in_parts_computes_what_it_does_in_one(name):
    model, params = built(name)
    devices = mesh.make(MeshShape(1, 2, 2))
    assert devices is not None
    adapters = adapters_of(model)
    parts = mesh.place_params(model, devices, params)
    found = jax.jit(model.hidden)(parts, adapters, TOKENS)
    np.testing.assert_allclose(found, model.hidden(params, adapters, TOKENS), atol=1e-4)
