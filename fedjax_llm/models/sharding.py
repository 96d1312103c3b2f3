"""Which axis of every weight is cut where a model is spread over devices, and how its parts come together again.

Two axes of a mesh hold weights. Over ``fsdp`` they are merely kept in parts, and gathered when they are used (fully
sharded data parallelism: Zhao et al. 2023, arXiv 2304.11277). Over ``tensor`` the products themselves are cut (Shoeybi
et al. 2019, arXiv 1909.08053), as a family's weight table says. Vectors are small: every device has all of them.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from fedjax_llm.models.family import Family, Weight, weight_tree
from fedjax_llm.types import Params, PyTree


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a backward pass may find kept (a policy for ``jax.checkpoint``): all but weights that were gathered."""
    return primitive.name != "all_gather"


def specs(family: Family, config: Any, tensor: int) -> PyTree:
    """A ``PartitionSpec`` over the axes ``fsdp`` and ``tensor`` for each weight, in a tree like the parameters.

    Args:
      family: of the model.
      config: of the model.
      tensor: devices along that axis. A vocabulary that they do not divide is not cut.
    """
    return weight_tree(family, config, lambda weight, _: _spec(weight, tensor))


def gather_layer(family: Family, config: Any, layer: Params, axis: str) -> Params:
    """All of a layer's weights, of which every device holds a part, inside of ``jax.shard_map``.

    Args:
      family: of the model.
      config: of the model.
      layer: the parts of its weights.
      axis: of the mesh over which they are spread.
    """
    return _gather(_axes(family, config)["layers"][0], layer, axis)


def gather_outer(family: Family, config: Any, params: Params, axis: str) -> Params:
    """The same for all weights outside of layers; the layers stay in parts."""
    axes = _axes(family, config)
    outer = {name: _gather(axes[name], params[name], axis) for name in params if name != "layers"}
    return outer | {"layers": params["layers"]}


def _axes(family: Family, config: Any) -> PyTree:
    """The axis of each weight that is cut over ``fsdp``."""
    return weight_tree(family, config, lambda weight, _: fsdp_axis(weight))


def _gather(axes: PyTree, parts: PyTree, axis: str) -> PyTree:
    """Whole weights."""

    def whole(cut: int, part: PyTree) -> PyTree:  # an array, or the codes and scales of one
        return part if cut < 0 else jax.lax.all_gather(part, axis, axis=cut, tiled=True)

    return jax.tree.map(whole, axes, parts)


def fsdp_axis(weight: Weight) -> int:
    """The axis of a weight that is cut over ``fsdp``: of a matrix, the one that ``tensor`` does not cut; else -1."""
    if len(weight.shape) < 2:
        return -1
    return 0 if weight.split is None else 1 - weight.split


def size_of(weight: Weight) -> tuple[int, ...]:
    """The shape of a weight in our layout."""
    return weight.shape[::-1] if weight.transpose else weight.shape


def _spec(weight: Weight, tensor: int) -> PartitionSpec:
    """Where the parts of a weight lie."""
    cuts: list[str | None] = [None] * len(weight.shape)
    if (axis := fsdp_axis(weight)) >= 0:
        cuts[axis] = "fsdp"
    if weight.split is not None and not size_of(weight)[weight.split] % tensor:
        cuts[weight.split] = "tensor"
    return PartitionSpec(*cuts)
