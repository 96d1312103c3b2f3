"""One mesh of devices for everything: clients side by side, and models that are too large for one device.

Axes: ``clients`` (each part holds client slots of its own, and all their rows), ``fsdp`` (the rows of these clients are
dealt out, and every device keeps a part of the base weights) and ``tensor`` (the products themselves are cut). Local
training needs nothing over the axis ``clients``; the sum at a round's end is all that travels there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_llm.data.packing import Bins
from fedjax_llm.errors import UserError
from fedjax_llm.models import sharding
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.quantised import Quantised
from fedjax_llm.types import Params, PyTree

AXES = ("clients", "fsdp", "tensor")
CLIENTS = PartitionSpec("clients")
"""Of leaves [C, ...]."""
ROWS = PartitionSpec(("clients", "fsdp"))
"""Of leaves [M, ...] and [K, ...]: one bin a device (``data/packing.py``)."""


@dataclass(frozen=True)
class MeshShape:
    """How many devices there are along each axis.

    Attributes:
      clients: groups of devices, each with clients of its own.
      fsdp: devices over which a group's rows and the base weights are spread.
      tensor: devices over which each matrix product is spread.
    """

    clients: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in AXES:
            if getattr(self, name) < 1:
                raise UserError(f"mesh.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def size(self) -> int:
        """How many devices in all."""
        return self.clients * self.fsdp * self.tensor

    @property
    def bins(self) -> Bins:
        """Of a microbatch: one for each device that holds rows."""
        return Bins(self.clients, self.fsdp)


def make(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh; ``None`` where one device is enough.

    Args:
      shape: devices along each axis.
      devices: to take them from; ``None``: all that jax sees here.

    Raises:
      UserError: there are too few.
    """
    if shape.size == 1:
        return None
    devices = jax.local_devices() if devices is None else devices
    if len(devices) < shape.size:
        raise UserError(
            f"execution.mesh wants {shape.clients} x {shape.fsdp} x {shape.tensor} = {shape.size} devices, but there "
            f"are {len(devices)}. XLA_FLAGS=--xla_force_host_platform_device_count={shape.size} simulates them on a CPU"
        )
    return Mesh(np.array(devices[: shape.size]).reshape(shape.clients, shape.fsdp, shape.tensor), AXES)


def check_fits(model: CausalLM, shape: MeshShape) -> None:
    """Refuses a mesh whose axes do not divide the model's weights.

    Raises:
      UserError: names the first weight that cannot be cut.
    """
    for weight in model.family.weights(model.config):
        size, cuts = sharding.size_of(weight), [(sharding.fsdp_axis(weight), "fsdp", shape.fsdp)]
        if weight.split is not None and "{layer}" in weight.name:
            cuts.append((weight.split, "tensor", shape.tensor))
        for axis, name, parts in cuts:
            if axis >= 0 and size[axis] % parts:
                raise UserError(
                    f"execution.mesh.{name} is {parts}, which does not divide the {size[axis]} "
                    f"{'rows' if axis == 0 else 'columns'} of {weight.name.format(layer='N')}; choose a divisor"
                )


def param_shardings(model: CausalLM, mesh: Mesh) -> PyTree:
    """Where the parts of each weight lie, in a tree like the parameters."""
    specs = sharding.specs(model.family, model.config, mesh.shape["tensor"])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def place_params(model: CausalLM, mesh: Mesh, params: Params) -> Params:
    """The weights, spread over the devices: codes and scales of a quantised one as it would be itself.

    Raises:
      UserError: a quantised weight would be cut within a block.
    """
    shardings = param_shardings(model, mesh)
    jax.tree.map(_check_blocks, shardings, params)
    return jax.device_put(params, shardings)


def _check_blocks(sharding: NamedSharding, weight: PyTree) -> None:
    """Refuses parts that do not hold whole blocks."""
    axis = sharding.spec[0] if isinstance(weight, Quantised) else None
    if axis is not None and weight.scales.shape[0] % sharding.mesh.shape[axis]:
        blocks, inputs = weight.scales.shape[0], weight.shape[0]
        raise UserError(
            f"execution.mesh.{axis} is {sharding.mesh.shape[axis]}, which does not divide the {blocks} blocks of "
            f"{inputs // blocks} inputs of a quantised matrix; choose a divisor, or set model.quantise to 'none'"
        )


def manual_specs(model: CausalLM, mesh: Mesh) -> PyTree:
    """The same as specifications without ``tensor``, which the compiler takes care of inside of ``jax.shard_map``."""
    specs = sharding.specs(model.family, model.config, mesh.shape["tensor"])
    return jax.tree.map(
        lambda spec: PartitionSpec(*(None if axis == "tensor" else axis for axis in spec)), specs, is_leaf=_is_spec
    )


def place(mesh: Mesh | None, tree: PyTree, spec: PartitionSpec = PartitionSpec()) -> PyTree:  # noqa: B008
    """A tree on the mesh, all leaves alike: everywhere in full, or cut by ``spec``; as it is where there is no mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))


def slots(shape: MeshShape, clients: int) -> int:
    """As many client slots, or a few more, as can be dealt out evenly."""
    return math.ceil(clients / shape.clients) * shape.clients


def _is_spec(leaf: Any) -> bool:
    """Whether it is a specification, which is a tuple too."""
    return isinstance(leaf, PartitionSpec)
