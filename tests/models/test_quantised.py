"""Quantised matrices: what the formats promise, and that a model of them is the model of what they stand for."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec
from tiny import same, tiny_adapters, tiny_base, tiny_folder, tiny_model

from fedjax_llm import config, lora
from fedjax_llm import mesh as meshes
from fedjax_llm.config import Experiment, Model
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models import sharding
from fedjax_llm.models.decoding import generate
from fedjax_llm.models.loading import load
from fedjax_llm.models.quantised import BLOCK, NF4, Quantised, dense, is_quantised, quantise
from fedjax_llm.models.truncation import truncated

KINDS = ("int8", "nf4")
TOKENS = np.random.default_rng(0).integers(0, 97, (3, 12)).astype(np.int32)


def quantised_kernels(params, kind):
    """The parameters with every kernel of a layer quantised."""

    def stored(path, leaf):
        return quantise(np.asarray(leaf), kind) if path[-1].key == "kernel" else leaf

    return params | {"layers": jax.tree_util.tree_map_with_path(stored, params["layers"])}


def dequantised(params):
    return jax.tree.map(dense, params, is_leaf=is_quantised)


@functools.cache
def pair(kind, **overrides):
    """A model, its quantised weights, and the dense weights that these stand for."""
    model, params = tiny_model(**overrides)
    stored = quantised_kernels(params, kind)
    return model, stored, dequantised(stored)


def close(one, other, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), one, other)


matrices = hnp.arrays(
    np.float32,
    st.sampled_from([(8, 1), (24, 3), (64, 2), (192, 5)]),
    elements=st.floats(-1e6, 1e6, width=32),
)


def oracle(matrix, kind):
    """Of each number: what it should become, half the distance of the levels around it, and the block's largest."""
    block = np.gcd(matrix.shape[0], BLOCK)
    wide = matrix.astype(np.float64).reshape(-1, block, matrix.shape[1])
    largest = np.abs(wide).max(axis=1, keepdims=True)
    levels = np.asarray(NF4) if kind == "nf4" else np.arange(-127, 128) / 127
    shares = wide / np.where(largest > 0, largest, 1)
    distance = np.abs(shares[..., None] - levels)
    above = np.clip(np.searchsorted(levels, shares), 1, len(levels) - 1)
    gaps = (levels[above] - levels[above - 1]) / 2
    flat = [part.reshape(matrix.shape) for part in (levels[distance.argmin(-1)] * largest, gaps * largest)]
    return (*flat, np.broadcast_to(largest, wide.shape).reshape(matrix.shape))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(matrix=matrices)
def test_every_number_becomes_a_nearest_level_of_its_block(kind, matrix):
    _, half, largest = oracle(matrix, kind)
    error = np.abs(np.asarray(dense(quantise(matrix, kind)), np.float64) - matrix)
    assert np.all(error <= half + 1e-6 * largest + 2e-36)  # scales below the least normal number count as zero


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_weights_become_what_the_oracle_says(kind):
    matrix = np.random.default_rng(0).normal(size=(192, 7)).astype(np.float32)
    expected, _, _ = oracle(matrix, kind)
    np.testing.assert_allclose(dense(quantise(matrix, kind)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_quantised_already_stays_as_it_is(kind, dtype):
    once = dense(quantise(np.random.default_rng(1).normal(size=(128, 3)), kind))
    again = dense(quantise(np.asarray(once), kind, dtype))
    assert again.dtype == dtype
    assert np.array_equal(again, once.astype(dtype))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4)])
@pytest.mark.parametrize(("inputs", "block"), [(128, 64), (576, 64), (48, 16), (8, 8)])
def test_bytes_are_those_of_the_codes_and_one_f32_scale_a_block(kind, bits, inputs, block):
    stored = quantise(np.ones((inputs, 10), np.float32), kind)
    assert stored.shape == (inputs, 10)
    assert stored.size == inputs * 10
    assert stored.codes.nbytes == inputs * 10 * bits // 8
    assert (stored.scales.dtype, stored.scales.nbytes) == ("float32", inputs // block * 10 * 4)


def test_inputs_that_blocks_do_not_divide_and_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match=r"model.quantise is 'nf4', but up_proj has 12 inputs, no multiple of 8"):
        quantise(np.ones((12, 2)), "nf4", name="up_proj")
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="up_proj holds numbers that are not finite"):
            quantise(np.full((8, 2), value), "int8", name="up_proj")


@pytest.mark.parametrize(
    ("kind", "remat", "leading"),
    [("int8", "none", (3,)), ("nf4", "none", ()), ("nf4", "matmuls", (3,)), ("nf4", "blocks", (3,))],
)
def test_losses_and_adapter_gradients_are_those_of_the_dense_weights(kind, remat, leading):
    model, stored, plain = pair(kind, remat=remat, qkv_bias=True)
    adapters = tiny_adapters(model, leading=leading)

    @jax.jit
    def found(params, adapters):
        def loss(adapters):
            hidden = model.hidden(params, adapters, TOKENS)
            logits = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), logits

        return jax.value_and_grad(loss, has_aux=True)(adapters)

    (_, logits), gradients = found(stored, adapters)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-3
    close(((_, logits), gradients), found(plain, adapters))


@pytest.mark.parametrize("kind", ["nf4"])
def test_magnitudes_are_relative_to_the_weights_that_are_used(kind):
    model, stored, plain = pair(kind)
    adapters = lora.init(jax.random.key(0), Lora(2, dora=True), model, stored)
    close(adapters, lora.init(jax.random.key(0), Lora(2, dora=True), model, plain))
    close(model.hidden(stored, lora.scaled(adapters, 2.0), TOKENS), model.hidden(stored, {}, TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing(kind):
    model, stored, _ = pair(kind)
    fresh = lora.scaled(lora.init(jax.random.key(0), Lora(2, targets=("*_proj",)), model), 8.0)
    assert np.array_equal(model.hidden(stored, fresh, TOKENS), model.hidden(stored, {}, TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_and_a_cache_give_what_the_whole_gives(kind):
    model, stored, plain = pair(kind)
    adapters = {path: own for path, own in tiny_adapters(model).items() if path.startswith("layers.1.")}
    below = model.trunk(stored, TOKENS, 1)
    close(below, model.trunk(plain, TOKENS, 1))
    expected = model.hidden(plain, adapters, TOKENS)
    close(model.hidden(stored, adapters, TOKENS, below=below), expected)
    cache, padding = model.empty_cache(3, 16, "float32"), jnp.zeros(3, jnp.int32)
    first, cache = model.extend(stored, adapters, TOKENS[:, :7], cache, jnp.int32(0), padding)
    rest, _ = model.extend(stored, adapters, TOKENS[:, 7:], cache, jnp.int32(7), padding)
    close(jnp.concatenate([first, rest], axis=1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_codes_and_no_dense_matrix(kind):
    model, stored, plain = pair(kind, kv_heads=1)
    adapters = tiny_adapters(model)
    sizes = {leaf.shape for leaf in jax.tree.leaves(plain["layers"]) if leaf.ndim == 2}

    def kept(params):
        """Shapes of the floats that it finds, of those that a matrix may have."""
        found = set()

        def forward(params, adapters):
            value, back = jax.vjp(lambda own: model.hidden(params, own, TOKENS), adapters)
            found.update(leaf.shape for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.float32)
            return value

        jax.eval_shape(forward, params, adapters)
        return found & sizes

    assert kept(plain) == sizes
    assert not kept(stored)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_dequantises_what_changes_and_leaves_the_rest(kind):
    model, stored, plain = pair(kind)
    adapters = tiny_adapters(model, targets=("q_proj", "down_proj"))
    merged = lora.merge(stored, adapters, 0.5)
    for layer in merged["layers"]:
        assert not is_quantised(layer["self_attn"]["q_proj"]["kernel"])
        assert is_quantised(layer["self_attn"]["k_proj"]["kernel"])
    close(dequantised(merged), lora.merge(plain, adapters, 0.5))
    close(model.hidden(merged, {}, TOKENS), model.hidden(stored, lora.scaled(adapters, 0.5), TOKENS), 1e-4)


def test_only_the_matrices_of_layers_are_quantised_when_a_model_is_loaded(tmp_path):
    folder = str(tiny_folder(tmp_path / "model"))
    plain = load(folder)
    for kind in KINDS:
        base = load(folder, "bfloat16", kind)
        expected = load(folder, "bfloat16")
        assert same(base.params["embed_tokens"], expected.params["embed_tokens"])
        assert same(base.params["lm_head"], expected.params["lm_head"])
        assert same(base.params["norm"], expected.params["norm"])
        for layer, dense_layer in zip(base.params["layers"], expected.params["layers"], strict=True):
            assert same(layer["input_layernorm"], dense_layer["input_layernorm"])
        assert same(
            jax.tree.map(jnp.bfloat16, dequantised(base.params)),
            jax.tree.map(jnp.bfloat16, dequantised(quantised_kernels(plain.params, kind))),
        )
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(dequantised(base.params)))
        assert base.size == plain.size
        assert base.fingerprint == f"{plain.fingerprint}, {kind}"
        assert base.model.hidden(base.params, {}, TOKENS).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["nf4"])
def test_a_model_cut_short_and_generation(kind):
    whole = tiny_base(layers=3)
    stored = replace(whole, params=quantised_kernels(whole.params, kind))
    cut, plain = truncated(stored, 2), truncated(replace(whole, params=dequantised(stored.params)), 2)
    assert cut.size == plain.size
    assert len([leaf for leaf in jax.tree.leaves(cut.params, is_leaf=is_quantised) if is_quantised(leaf)]) == 14
    options = {"max_new_tokens": 6, "end_ids": (), "pad_id": 0}
    prompts = [[5, 6, 7], [9, 8]]
    one, other = (generate(base.model, base.params, {}, prompts, **options) for base in (cut, plain))
    assert one == other


@pytest.mark.parametrize("kind", ["nf4"])
def test_spread_over_a_mesh_parts_are_gathered_as_codes(kind):
    model, stored, plain = pair(kind, width=128, mlp_width=128, heads=16)  # matrices of two blocks at least
    mesh = meshes.make(MeshShape(1, 2, 2))
    assert mesh is not None
    placed = meshes.place_params(model, mesh, stored)
    assert same(placed, stored)
    for part in jax.tree.leaves(placed["layers"][0]["mlp"]["up_proj"]["kernel"]):
        assert part.sharding.shard_shape(part.shape) == (part.shape[0] // 2, part.shape[1] // 2)
    own, adapters = replace(model, gathered_over="fsdp"), tiny_adapters(model)

    def total(model, params, adapters):
        return jnp.sum(jnp.sin(model.hidden(params, adapters, TOKENS)))

    def outside(params):
        return sharding.gather_outer(model.family, model.config, params, "fsdp")

    mapped = jax.shard_map(
        lambda p, a: jax.grad(functools.partial(total, own, outside(p)))(a),
        mesh=mesh,
        in_specs=(meshes.manual_specs(model, mesh), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"clients", "fsdp"},
        check_vma=False,
    )
    close(jax.jit(mapped)(placed, adapters), jax.grad(functools.partial(total, model, plain))(adapters), 1e-3)


def test_a_mesh_that_would_cut_a_block_is_refused():
    model, stored, _ = pair("nf4", width=64, heads=8)
    mesh = meshes.make(MeshShape(1, 2, 1))
    assert mesh is not None
    with pytest.raises(UserError, match=r"mesh.fsdp is 2, which does not divide the 1 blocks of 64 inputs"):
        meshes.place_params(model, mesh, stored)


def test_the_configuration_says_it_and_is_what_it_was_without():
    plain, stored = Experiment(), Experiment(model=Model(quantise="nf4"))
    assert config.to_json(plain)["model"].keys() == {"class", "name", "dtype"}
    assert config.to_json(stored)["model"]["quantise"] == "nf4"
    config.check(stored)
    with pytest.raises(UserError, match=r"model.quantise is 'int8s'.*int8"):
        config.check(Experiment(model=Model(quantise="int8s")))  # pyrefly: ignore


def test_a_quantised_matrix_is_a_tree_of_its_parts():
    stored = quantise(np.random.default_rng(0).normal(size=(64, 3)), "nf4", "bfloat16")
    leaves, structure = jax.tree.flatten(stored)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint8, jnp.float32]
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Quantised)
    assert (again.kind, again.dtype) == ("nf4", "bfloat16")
