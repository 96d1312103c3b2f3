"""From a parameter tree back to Hugging Face names and layout: the inverse of ``loading.read_params``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.checkpoint import LazyTensor, LazyTensors
from fedjax_llm.models.family import Weight, weight_tree
from fedjax_llm.models.quantised import dense
from fedjax_llm.types import Params


def tensors_of(model: CausalLM, params: Params, replaced: Callable[[str, Any], Any] | None = None) -> LazyTensors:
    """Every weight by its Hugging Face name, float32, computed when it is accessed.

    Quantised matrices are dequantised: the values are those that the model computes with.

    Args:
      model: whose weights.
      params: its weights.
      replaced: ``(module path, kernel [in, out] f32) -> kernel``, e.g. with an adapter merged in.
    """
    found: dict[str, LazyTensor] = {}

    def add(weight: Weight, layer: int | None) -> None:
        shape = tuple(weight.shape)
        found[weight.name.format(layer=layer)] = LazyTensor(shape, partial(_read, params, weight, layer, replaced))

    weight_tree(model.family, model.config, add)
    return LazyTensors(found)


def _read(params: Params, weight: Weight, layer: int | None, replaced: Callable[[str, Any], Any] | None) -> np.ndarray:
    """One tensor in its shape in the file."""
    leaf = params if layer is None else params["layers"][layer]
    for key in weight.path:
        leaf = leaf[key]
    values = dense(leaf).astype("float32")
    if replaced is not None and layer is not None and weight.path[-1] == "kernel":
        values = replaced(".".join(["layers", str(layer), *weight.path[:-1]]), values)
    array = np.asarray(values, np.float32)
    return array.T if weight.transpose else array
