"""Exchanges between devices, read from the texts of compiled programs whose exchanges are known."""

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fedjax_llm.experiment.collectives import Collective, collectives, in_rows, seconds

AXES = ("clients", "fsdp", "tensor")
EVERYWHERE = PartitionSpec()
X = np.ones((4, 8), np.float32)
CUBE = {"clients": 2, "fsdp": 2, "tensor": 2}
FLAT = {"clients": 2, "fsdp": 4, "tensor": 1}


def mesh_of(sizes: dict[str, int] = CUBE) -> Mesh:
    devices = np.array(jax.devices("cpu")[: math.prod(sizes.values())])
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


def text_of(function: Any, mesh: Mesh, *arguments: Any) -> str:
    """The compiled program of what every device does with all of the arguments."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=EVERYWHERE, out_specs=EVERYWHERE, check_vma=False)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def of_pairs(mesh: Mesh, axis: str) -> list[tuple[int, int]]:
    size = mesh.shape[axis]
    return [(one, (one + 1) % size) for one in range(size)]


KINDS = {
    "all-gather": (lambda x, axis, mesh: lax.all_gather(x, axis, tiled=True), lambda n: 4 * n),
    "all-reduce": (lambda x, axis, mesh: lax.psum(x, axis), lambda n: 4),
    "reduce-scatter": (lambda x, axis, mesh: lax.psum_scatter(x, axis, tiled=True), lambda n: 4 // n),
    "collective-permute": (lambda x, axis, mesh: lax.ppermute(x, axis, of_pairs(mesh, axis)), lambda n: 4),
    "all-to-all": (lambda x, axis, mesh: lax.all_to_all(x, axis, 0, 1, tiled=True), lambda n: 4),
}
"""What a device does with 4 rows of 8 numbers, and of how many such rows the result has the size."""


@pytest.mark.parametrize("sizes", [CUBE, FLAT], ids=["cube", "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found_with_its_axis_and_its_bytes(kind, sizes):
    mesh, (exchange, rows) = mesh_of(sizes), KINDS[kind]
    for axis, devices in sizes.items():
        if devices == 1:
            continue
        found = collectives(text_of(lambda x, axis=axis: exchange(x, axis, mesh), mesh, X), mesh)
        assert found == Counter({Collective(kind, (axis,), rows(devices) * 8 * 4): 1})


@pytest.mark.parametrize("axes", [("clients", "tensor"), ("clients", "fsdp"), ("fsdp", "tensor"), AXES])
def test_an_exchange_over_several_axes_names_them_all(axes):
    mesh = mesh_of()
    found = collectives(text_of(lambda x: lax.psum(x, axes), mesh, X), mesh)
    assert found == Counter({Collective("all-reduce", axes, X.nbytes): 1})


def test_a_sum_of_several_arrays_has_the_bytes_of_all_of_them():
    mesh, other = mesh_of(), np.ones(5, np.int32)
    found = collectives(text_of(lambda *both: lax.psum(both, "fsdp"), mesh, X, other), mesh)
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("fsdp",))}
    assert sum(count * one.size for one, count in found.items()) == X.nbytes + other.nbytes


def test_equal_exchanges_are_counted():
    mesh = mesh_of()

    def program(x: Any) -> Any:
        for _ in range(3):  # each needs the one before
            x = jnp.sin(lax.all_gather(x, "tensor", tiled=True)[:4])
        return lax.psum(x, "clients")

    found = collectives(text_of(program, mesh, X), mesh)
    assert found == Counter(
        {
            Collective("all-gather", ("tensor",), 2 * X.nbytes): 3,
            Collective("all-reduce", ("clients",), X.nbytes): 1,
        }
    )


def test_what_stays_on_a_device_is_no_exchange():
    mesh = mesh_of(FLAT)
    assert not collectives(text_of(lambda x: lax.psum(jnp.sin(x), "tensor"), mesh, X), mesh)
    alone = "  %a = f32[4]{0} all-reduce(%b), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add"
    assert not collectives(alone, mesh)


# The forms of other compilers' texts, TPUs' above all.

SQUARE = {"clients": 4, "fsdp": 4, "tensor": 1}


class Devices:
    """As much of a mesh as is looked at, of any number of devices."""

    def __init__(self, sizes: dict[str, int]):
        self.shape, self.axis_names, self.size = sizes, tuple(sizes), math.prod(sizes.values())
        self.devices = np.empty(tuple(sizes.values()))


def read(text: str, sizes: dict[str, int] = SQUARE) -> list[Collective]:
    found: Any = collectives(text, Devices(sizes))
    return list(found.elements())


ROWS = "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}"
COLUMNS = "replica_groups=[4,4]<=[4,4]T(1,0)"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (ROWS, ("fsdp",)),
        ("replica_groups=[4,4]<=[16]", ("fsdp",)),
        (COLUMNS, ("clients",)),
        ("replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}", ("clients",)),
        ("replica_groups=[1,16]<=[16]", ("clients", "fsdp")),
        ("replica_groups={}", ("clients", "fsdp")),
        ("replica_groups=[8,2]<=[2,2,4]T(0,2,1)", ("clients",)),
        ("replica_groups=[16,1]<=[16]", ()),
    ],
)
def test_groups_are_read_in_both_notations(groups, axes):
    line = f"  %all-reduce.7 = f32[3,5]{{1,0:T(8,128)}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add.1"
    assert read(line) == ([Collective("all-reduce", axes, 60)] if axes else [])


@given(st.permutations([0, 1, 2]), st.integers(1, 2))
def test_iota_groups_are_those_of_numpy(order, axes):
    sizes = {"clients": 2, "fsdp": 3, "tensor": 4}
    lengths = [list(sizes.values())[axis] for axis in order]
    members = math.prod(lengths[-axes:])
    groups = f"[{24 // members},{members}]<=[2,3,4]T({','.join(map(str, order))})"
    found = read(f"%a = u8[9]{{0}} all-gather(%b), replica_groups={groups}, dimensions={{0}}", sizes)
    assert found == [Collective("all-gather", tuple(AXES[axis] for axis in sorted(order[-axes:])), 9)]


@pytest.mark.parametrize(
    ("result", "kind", "size"),
    [
        ("(bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[32,16]{1,0:T(8,128)(2,1)S(1)})", "all-gather", 1024),
        ("((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0}))", "all-gather", 80),
        ("(bf16[8]{0}, bf16[8]{0}, u32[]{:S(2)}, u32[]{:S(2)})", "collective-permute", 16),
        ("(f32[6]{0}, f32[10]{0}, f32[])", "all-reduce", 68),
        ("f32[6]{0}", "all-reduce", 24),
    ],
)
def test_what_begins_an_exchange_counts_its_results_alone(result, kind, size):
    end = f"%done = f32[8]{{0}} {kind}-done(%start)"
    text = f"  %start = {result} {kind}-start(%x), channel_id=2, {ROWS}, dimensions={{0}}\n  {end}\n"
    assert read(text) == [Collective(kind, ("fsdp",), size)]


def chained(chain: int, number: int, kind: str = "all-gather") -> str:
    """As TPUs' compiler writes a part of an exchange that is spread over fusions."""
    result = "bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)}"
    rest = f'channel_id=1, {ROWS}, dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}'
    return f'  %{kind}.{number} = {result} {kind}(%param_0.{number}), {rest}, metadata={{op_name="jit(f)/all_gather"}}'


def test_an_exchange_that_is_spread_over_fusions_counts_once():
    parts = [chained(1, 121), chained(1, 123), chained(2, 135), chained(1, 125), chained(2, 137)]
    assert read("\n".join(parts)) == [Collective("all-gather", ("fsdp",), 8 * 2**20)] * 2
    alone = re.sub(r", frontend_attributes=\{.*?\}", "", parts[0])
    assert len(read("\n".join([*parts, alone, alone]))) == 4


def test_names_and_operands_are_no_exchanges():
    text = """
      %all-gather.1 = bf16[8]{0} bitcast(%all-reduce.2), metadata={op_name="jit(f)/all-gather"}
      %fusion = f32[8]{0} fusion(%all-gather.1), kind=kLoop, calls=%all-reduce-scatter.3
      %tuple = (f32[8]{0}) tuple(%all-to-all)
    """
    assert not read(text)


@pytest.mark.parametrize(
    ("kind", "width"), [("pred", 1), ("s8", 1), ("f8e4m3fn", 1), ("bf16", 2), ("u32", 4), ("f64", 8), ("c64", 8)]
)
def test_every_type_has_its_width(kind, width):
    assert read(f"%a = {kind}[2,3]{{1,0}} all-gather(%b), {ROWS}")[0].size == 6 * width
    assert read(f"%a = {kind}[] all-reduce(%b), {ROWS}")[0].size == width
    assert read(f"%a = s4[2,3]{{1,0:E(4)}} all-gather(%b), {ROWS}")[0].size == 3


# What exchanges take.


def sent_on_a_ring(kind: str, devices: int, size: int) -> float:
    """Bytes that a device sends, step by step: a ring passes on one of ``devices`` parts at a time."""
    whole = size * devices if kind == "reduce-scatter" else size
    steps = {"all-gather": devices - 1, "reduce-scatter": devices - 1, "all-reduce": 2 * (devices - 1)}
    return sum(whole / devices for _ in range(steps[kind]))


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
@pytest.mark.parametrize("axes", [("fsdp",), ("clients", "fsdp"), ("tensor",)])
def test_time_is_what_a_ring_sends_over_the_links(kind, axes):
    mesh: Any = Devices({"clients": 4, "fsdp": 8, "tensor": 2})
    devices = math.prod(mesh.shape[axis] for axis in axes)
    found = Counter({Collective(kind, axes, 3 * 2**20): 5})
    expected = 5 * sent_on_a_ring(kind, devices, 3 * 2**20) / 2e11
    np.testing.assert_allclose(seconds(found, mesh, 2e11), expected, rtol=1e-12)


def test_a_sum_takes_what_its_two_halves_take_and_times_add_up():
    mesh: Any = Devices({"clients": 4, "fsdp": 8, "tensor": 1})
    whole = Collective("all-reduce", ("fsdp",), 1024)
    halves = Counter([Collective("reduce-scatter", ("fsdp",), 128), Collective("all-gather", ("fsdp",), 1024)])
    assert seconds({whole: 1}, mesh, 1.0) == seconds(halves, mesh, 1.0) == 2 * 1024 * 7 / 8
    assert seconds(halves + halves, mesh, 4.0) == seconds(halves, mesh, 2.0)
    assert seconds({Collective("collective-permute", ("fsdp",), 100): 3}, mesh, 10.0) == 30
    assert seconds({}, mesh, 1.0) == 0


def test_rows_sum_up_kinds_and_axes_the_largest_first():
    found = {
        Collective("all-gather", ("fsdp",), 10): 3,
        Collective("all-reduce", ("clients", "fsdp"), 100): 1,
        Collective("all-gather", ("fsdp",), 20): 4,
        Collective("all-reduce", ("fsdp",), 1): 2,
    }
    expected = [
        ("all-gather", "fsdp", 7, 110),
        ("all-reduce", "clients x fsdp", 1, 100),
        ("all-reduce", "fsdp", 2, 2),
    ]
    assert in_rows(found) == expected
