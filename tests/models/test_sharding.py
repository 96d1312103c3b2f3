"""Which axes of the weights are cut, and that layers gathered when they are used compute what whole ones do."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import same, tiny_adapters, tiny_model
from tiny_configs import TINY_CONFIGS, tiny_of

from fedjax_llm import mesh as meshes
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models import sharding
from fedjax_llm.models.causal_lm import CausalLM, Remat

EVERYWHERE = PartitionSpec()
SPREAD = MeshShape(1, 2, 2)
REMATS: tuple[Remat, ...] = ("none", "matmuls", "blocks")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 7)))


@cache
def base(**overrides: Any) -> tuple[CausalLM, Any, Any]:
    """Model, weights and adapters."""
    model, params = tiny_model(**overrides)
    return model, params, tiny_adapters(model, targets=("q_proj", "down_proj"))


def total(model: CausalLM, params: Any, adapters: Any) -> jax.Array:
    """A number in which all hidden states have a part."""
    return jnp.sum(jnp.sin(model.hidden(params, adapters, TOKENS)))


def on_devices(function: Any, model: CausalLM, mesh: jax.sharding.Mesh) -> Any:
    """A function of the weights and of what every device has, with the weights in parts over ``fsdp``."""

    def mapped(params: Any, *rest: Any) -> Any:
        specs = (meshes.manual_specs(model, mesh), *(EVERYWHERE for _ in rest))
        axes = {"axis_names": {"clients", "fsdp"}, "check_vma": False}
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE, **axes)(params, *rest)

    return jax.jit(mapped)


def mesh_of(shape: MeshShape = SPREAD) -> jax.sharding.Mesh:
    mesh = meshes.make(shape)
    assert mesh is not None
    return mesh


def close(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), one, other)


@pytest.mark.parametrize("overrides", [{}, {"tied": False, "qkv_bias": True, "head_norm": True}], ids=["plain", "all"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_weight_has_a_place_and_no_axis_is_cut_twice(overrides, tensor):
    model, params = tiny_model(**overrides)
    specs = sharding.specs(model.family, model.config, tensor)
    places = jax.tree.map(lambda spec: spec, specs, is_leaf=meshes._is_spec)
    assert jax.tree.structure(places, is_leaf=meshes._is_spec) == jax.tree.structure(params)
    for spec, leaf in zip(jax.tree.leaves(specs, is_leaf=meshes._is_spec), jax.tree.leaves(params), strict=True):
        assert len(spec) == leaf.ndim
        cut = Counter(axis for axis in spec if axis is not None)
        assert cut["fsdp"] == (1 if leaf.ndim == 2 else 0)
        whole = leaf.ndim == 1 or (97 in leaf.shape and tensor > 1)  # 97 rows cannot be cut
        assert cut["tensor"] == (0 if whole else 1)


def test_what_is_followed_by_a_function_is_cut_by_outputs_and_what_sums_up_by_inputs():
    model, _, _ = base()
    layer = sharding.specs(model.family, model.config, 2)["layers"][0]
    for block, name in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        for module in name:
            assert layer[block][f"{module}_proj"]["kernel"] == PartitionSpec("fsdp", "tensor")
    for block, name in (("self_attn", "o"), ("mlp", "down")):
        assert layer[block][f"{name}_proj"]["kernel"] == PartitionSpec("tensor", "fsdp")


def test_the_sizes_are_those_of_our_layout():
    model, params, _ = base()
    for weight in model.family.weights(model.config):
        place = params["layers"][0] if "{layer}" in weight.name else params
        for key in weight.path:
            place = place[key]
        assert sharding.size_of(weight) == place.shape


def test_gathered_weights_are_the_whole_ones():
    model, params, _ = base()
    mesh = mesh_of()

    def gathered(params: Any) -> Any:
        layer = partial(sharding.gather_layer, model.family, model.config, axis="fsdp")
        outer = sharding.gather_outer(model.family, model.config, params, "fsdp")
        return {**outer, "layers": tuple(layer(layer=own) for own in params["layers"])}

    mapped = on_devices(gathered, model, mesh)
    assert same(mapped(meshes.place_params(model, mesh, params)), params)


def outside(model: Any, params: Any) -> Any:
    """Weights of which those outside of layers are whole."""
    return sharding.gather_outer(model.family, model.config, params, "fsdp")


@pytest.mark.parametrize("remat", REMATS)
def test_spread_weights_give_the_values_and_gradients_of_whole_ones(remat):
    model, params, adapters = base()
    expected = jax.jit(jax.value_and_grad(partial(total, model, params)))(adapters)
    mesh, own = mesh_of(), replace(model, remat=remat, gathered_over="fsdp")
    mapped = on_devices(lambda p, a: jax.value_and_grad(partial(total, own, outside(own, p)))(a), model, mesh)
    close(mapped(meshes.place_params(model, mesh, params), adapters), expected)


def counted(jaxpr: Any, found: Counter | None = None) -> Counter:
    """How often each primitive is in a program and those within it."""
    found = Counter() if found is None else found
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    counted(inner, found)
    return found


def test_the_backward_pass_keeps_what_it_is_told_to():
    model, params, adapters = base()
    products, elementwise = [], []
    for remat in REMATS:
        own = replace(model, remat=remat)
        found = counted(jax.make_jaxpr(jax.grad(partial(total, own, params)))(adapters).jaxpr)
        products.append(found["dot_general"])
        elementwise.append(found["logistic"])
    none, matmuls, blocks = products
    assert none <= matmuls < blocks
    assert elementwise[0] < elementwise[1] <= elementwise[2]


def kept_for_backward(remat: Remat) -> tuple[set, set]:
    """Shapes of what the backward pass finds, and of the layers' matrices."""
    model, params, adapters = base(kv_heads=1)  # so that no part has the shape of another whole
    mesh, kept = mesh_of(MeshShape(1, 2, 1)), set()
    own = replace(model, remat=remat, gathered_over="fsdp")

    def forward(params: Any, adapters: Any) -> jax.Array:
        value, back = jax.vjp(partial(total, own, outside(own, params)), adapters)
        kept.update(leaf.shape for leaf in jax.tree.leaves(back))
        return value

    jax.eval_shape(on_devices(forward, model, mesh), params, adapters)
    return kept, {leaf.shape for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 2}


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "Phi3ForCausalLM", "Olmo2ForCausalLM"])
def test_other_families_are_spread_too(name):
    """Layers of two kinds, fused projections, and norms over all heads that the axis ``tensor`` cuts."""
    model, params = tiny_of(TINY_CONFIGS[name])
    adapters = tiny_adapters(model)
    expected = jax.jit(jax.value_and_grad(partial(total, model, params)))(adapters)
    mesh, own = mesh_of(), replace(model, gathered_over="fsdp")
    mapped = on_devices(lambda p, a: jax.value_and_grad(partial(total, own, outside(own, p)))(a), model, mesh)
    close(mapped(meshes.place_params(model, mesh, params), adapters), expected)


@pytest.mark.parametrize("remat", REMATS)
def test_no_gathered_weight_outlives_its_layer(remat):
    kept, whole = kept_for_backward(remat)
    assert kept
    assert not kept & whole


def test_without_the_policy_they_would(monkeypatch):
    monkeypatch.setattr(sharding, "all_but_gathered", jax.checkpoint_policies.everything_saveable)
    kept, whole = kept_for_backward("none")
    assert kept & whole


def test_a_trunk_is_gathered_as_well():
    model, params, _ = base()
    mesh, own = mesh_of(), replace(model, gathered_over="fsdp")
    mapped = on_devices(lambda p: own.trunk(outside(own, p), TOKENS, 1), model, mesh)
    close(mapped(meshes.place_params(model, mesh, params)), model.trunk(params, TOKENS, 1))
