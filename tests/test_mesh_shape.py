"""Meshes of devices: what is refused, and where things are put."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from tiny import same, tiny_model

from fedjax_llm import mesh as meshes
from fedjax_llm.data.packing import Bins
from fedjax_llm.errors import UserError
from fedjax_llm.mesh import MeshShape

sizes = st.integers(1, 5)


@pytest.mark.parametrize("axis", meshes.AXES)
@pytest.mark.parametrize("value", [0, -2])
def test_an_axis_without_devices_is_refused(axis, value):
    with pytest.raises(UserError, match=f"mesh.{axis} is {value}; it must be at least 1"):
        MeshShape(**{axis: value})


@given(clients=sizes, fsdp=sizes, tensor=sizes)
def test_a_device_that_holds_rows_has_a_bin(clients, fsdp, tensor):
    shape = MeshShape(clients, fsdp, tensor)
    assert shape.size == clients * fsdp * tensor
    assert shape.bins == Bins(groups=clients, each=fsdp)
    assert shape.bins.count * tensor == shape.size


@given(groups=sizes, clients=st.integers(1, 40))
def test_slots_are_as_many_as_can_be_dealt_out_and_no_more(groups, clients):
    slots = meshes.slots(MeshShape(clients=groups), clients)
    assert slots % groups == 0
    assert clients <= slots < clients + groups


def test_one_device_needs_no_mesh():
    assert MeshShape() == MeshShape(1, 1, 1)
    assert meshes.make(MeshShape()) is None
    tree = {"a": np.ones(3)}
    assert meshes.place(None, tree, meshes.CLIENTS) is tree


def test_neighbouring_devices_share_the_products():
    mesh = meshes.make(MeshShape(2, 2, 2))
    assert mesh is not None
    assert mesh.axis_names == meshes.AXES == ("clients", "fsdp", "tensor")
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.local_devices()[:8]]
    assert meshes.make(MeshShape(2, 2, 2)) == mesh  # so that programs are compiled once


def test_given_devices_are_taken_in_their_order():
    devices = jax.local_devices()[::-1]
    mesh = meshes.make(MeshShape(clients=3), devices)
    assert mesh is not None
    assert list(mesh.devices.flat) == devices[:3]


def test_too_few_devices_are_refused_with_a_way_to_simulate_them():
    count = len(jax.local_devices())
    shape = MeshShape(2, count, 3)
    message = (
        rf"execution.mesh wants 2 x {count} x 3 = {6 * count} devices, but there are {count}. "
        rf"XLA_FLAGS=--xla_force_host_platform_device_count={6 * count} simulates them on a CPU"
    )
    with pytest.raises(UserError, match=message):
        meshes.make(shape)
    with pytest.raises(UserError, match="there are 1"):
        meshes.make(MeshShape(2), jax.local_devices()[:1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(fsdp=3), r"execution.mesh.fsdp is 3, which does not divide the 32 columns of model.embed_tokens"),
        (MeshShape(fsdp=5, tensor=5), r"execution.mesh.fsdp is 5, which does not divide the 32 columns of model.embed"),
        (MeshShape(tensor=3), r"execution.mesh.tensor is 3, .* the 32 columns of model.layers.N.self_attn.q_proj"),
        (MeshShape(tensor=32), r"execution.mesh.tensor is 32, .* the 16 columns of model.layers.N.self_attn.k_proj"),
    ],
)
def test_a_mesh_that_does_not_divide_the_weights_is_refused(shape, message):
    with pytest.raises(UserError, match=message + ".*; choose a divisor"):
        meshes.check_fits(tiny_model(layers=1)[0], shape)


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(7, 1, 1), MeshShape(1, 16, 16), MeshShape(3, 2, 2)])
def test_a_mesh_that_fits_is_taken(shape):
    """The vocabulary of 97 is no obstacle: it is then not cut."""
    meshes.check_fits(tiny_model(layers=1)[0], shape)


@pytest.mark.parametrize("vocabulary", [97, 98])
def test_weights_are_spread_and_stay_what_they_are(vocabulary):
    model, params = tiny_model(layers=1, vocab_size=vocabulary)
    mesh = meshes.make(MeshShape(2, 2, 2))
    assert mesh is not None
    placed = meshes.place_params(model, mesh, params)
    assert same(placed, params)
    layer = placed["layers"][0]
    up, down = (layer["mlp"][name]["kernel"] for name in ("up_proj", "down_proj"))
    assert (up.shape, up.sharding.shard_shape(up.shape)) == ((32, 48), (16, 24))
    assert (down.shape, down.sharding.shard_shape(down.shape)) == ((48, 32), (24, 16))
    assert up.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert down.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert layer["input_layernorm"]["scale"].sharding.is_fully_replicated
    table = placed["embed_tokens"]["embedding"]
    assert table.sharding.shard_shape(table.shape) == ((97, 16) if vocabulary == 97 else (49, 16))


def test_every_device_keeps_its_part_of_the_matrices_alone():
    model, params = tiny_model(layers=1, vocab_size=98)
    mesh = meshes.make(MeshShape(2, 2, 2))
    assert mesh is not None
    for leaf in jax.tree.leaves(meshes.place_params(model, mesh, params)):
        held = {shard.device: shard.data.size for shard in leaf.addressable_shards}
        assert set(held.values()) == {leaf.size // (4 if leaf.ndim == 2 else 1)}
        assert len(held) == 8


def test_inside_of_a_device_the_compiler_cuts_the_products():
    model, _ = tiny_model(layers=1)
    mesh = meshes.make(MeshShape(2, 2, 2))
    assert mesh is not None
    specs = meshes.manual_specs(model, mesh)
    assert specs["layers"][0]["mlp"]["up_proj"]["kernel"] == PartitionSpec("fsdp", None)
    named = {axis for spec in jax.tree.leaves(specs, is_leaf=meshes._is_spec) for axis in spec}
    assert named == {"fsdp", None}


def test_clients_and_rows_lie_where_their_group_is():
    mesh = meshes.make(MeshShape(2, 2, 2))
    assert mesh is not None
    tree = {"one": jnp.arange(8.0), "other": jnp.arange(24).reshape(8, 3)}
    for spec, part in ((meshes.CLIENTS, 4), (meshes.ROWS, 2), (PartitionSpec(), 8)):
        placed = meshes.place(mesh, tree, spec)
        assert same(placed, tree)
        for at, device in np.ndenumerate(mesh.devices):
            group = {4: at[0], 2: 2 * at[0] + at[1], 8: 0}[part]
            for leaf, whole in zip(*map(jax.tree.leaves, (placed, tree)), strict=True):
                (mine,) = (shard.data for shard in leaf.addressable_shards if shard.device == device)
                np.testing.assert_array_equal(mine, whole[group * part : (group + 1) * part])
