"""A round that is small enough to compile for eight virtual devices in seconds, and slices made of these devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import pod_plan
from fedjax_llm import config
from fedjax_llm.config import Experiment
from fedjax_llm.experiment import pod_report
from fedjax_llm.experiment.tpu_topology import chip_of, chips_in
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models.shapes import SHAPES

CONFIG = Path(__file__).parents[1] / "configs/pod/llama3_8b.py"
WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY, LAYERS = 32, 64, 4, 2, 256, 3
NAME = "there-is-no-such-model-but-its-shape"
SHAPE = SHAPES["meta-llama/Llama-3.1-8B"] | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}


def small_experiment(mesh: MeshShape = MeshShape(2, 4), dtype: str = "float32", **execution: Any) -> Experiment:  # noqa: B008
    """The published configuration of a tiny model: two rows of 8 tokens on a device."""
    base = config.load(CONFIG)
    return replace(
        base,
        model=replace(base.model, name=NAME, dtype=dtype),
        lora=replace(base.lora, rank=1, targets=("q_proj",)),
        data=replace(base.data, max_length=8),
        execution=replace(base.execution, tokens_per_microbatch=16, mesh=mesh, **execution),
    )


def devices(topology: str) -> list[Any]:
    """Virtual devices in place of a slice's chips."""
    chip_of(topology)
    return jax.devices("cpu")[: chips_in(topology)]


@contextmanager
def on_virtual_devices() -> Iterator[None]:
    """The tiny shape is known, and slices are of virtual devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, NAME, SHAPE)
        patch.setattr(pod_report, "devices_of", devices)
        patch.setattr(pod_report, "SPARING", {})  # options of the TPU's compiler
        patch.setattr(pod_plan, "devices_of", devices)
        yield
