"""What every family promises to the code that trains, decodes, quantises and spreads its models.

A family is found by its file; all it takes to be tested here is a small ``config.json`` in ``tiny_configs.py``.
"""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import same, tiny_adapters
from tiny_configs import TINY_CONFIGS, VOCABULARY, tiny_checkpoint, tiny_of

from fedjax_llm import lora
from fedjax_llm.lora import Lora
from fedjax_llm.models import llama, sharding
from fedjax_llm.models.family import families, family_of
from fedjax_llm.peft import naming_of, read_adapter_for, write_adapter

ROWS, LENGTH = 3, 12
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
RUN = [name for name in TINY_CONFIGS if name == "LlamaForCausalLM" or name not in llama.FAMILY.architectures]
"""Architectures whose models are run. The Llama family's switches have tests of their own."""

of_every_architecture = pytest.mark.parametrize("name", TINY_CONFIGS)
of_every_block = pytest.mark.parametrize("name", RUN)


@cache
def built(name: str, **options: Any):
    return tiny_of(TINY_CONFIGS[name], **options)


def everything(model: Any) -> tuple[str, ...]:
    """All that can be adapted."""
    return tuple(model.family.projections(model.config))


def adapters_of(model: Any, leading: tuple[int, ...] = ()) -> Any:
    return tiny_adapters(model, targets=everything(model), leading=leading)


# What a family says of itself.


def test_every_architecture_has_a_small_model():
    assert set(TINY_CONFIGS) == set(families())
    for raw in TINY_CONFIGS.values():
        config = family_of(raw).config_from_hf(raw)
        assert (config.layers, config.width, config.vocab_size) == (2, 32, VOCABULARY)
        assert hash(config) == hash(family_of(raw).config_from_hf(raw))


@of_every_architecture
def test_the_table_has_every_parameter_of_the_block_once(name):
    model, params = built(name)
    table = model.family.weights(model.config)
    assert len({weight.name for weight in table}) == len(table)
    layered = {weight.path: sharding.size_of(weight) for weight in table if "{layer}" in weight.name}
    assert len(layered) == sum("{layer}" in weight.name for weight in table)
    x, terms = model.family.embed(model.config, params, TOKENS, jnp.arange(LENGTH))
    terms, mask = model.family.layer_terms(model.config, terms, 0), jnp.ones((1, LENGTH, LENGTH), bool)
    block = jax.eval_shape(model.family.block(model.config, 0.0).init, jax.random.key(0), x, terms, mask)
    flat = jax.tree_util.tree_flatten_with_path(block["params"])[0]
    assert layered == {tuple(key.key for key in path): leaf.shape for path, leaf in flat}


@of_every_architecture
def test_what_can_be_adapted_are_the_matrices_of_a_layer_by_the_names_in_the_file(name):
    model, _ = built(name)
    kernels = [weight for weight in model.family.weights(model.config) if weight.path[-1] == "kernel"]
    found = {".".join(weight.path[:-1]): sharding.size_of(weight) for weight in kernels}
    assert model.family.projections(model.config) == found
    layers = naming_of(model).layers
    assert {weight.name for weight in kernels} == {f"{layers}.{{layer}}.{path}.weight" for path in found}


@of_every_architecture
def test_no_axis_is_cut_twice_and_every_layer_is_cut(name):
    model, _ = built(name)
    specs = sharding.specs(model.family, model.config, 2)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)):
        cut = Counter(axis for axis in spec if axis is not None)
        assert cut["fsdp"] == (len(spec) == 2), path
        assert cut["tensor"] <= (len(spec) == 2), path
    kernels = [weight for weight in model.family.weights(model.config) if weight.path[-1] == "kernel"]
    assert {weight.split for weight in kernels} >= {0, 1}


@of_every_architecture
def test_a_target_that_is_missing_is_answered_with_those_that_are_there(name):
    model, _ = built(name)
    (first, *_) = (path.rsplit(".", 1)[-1] for path in everything(model))
    with pytest.raises(Exception, match=f"'{first}x', which matches no module; did you mean '{first}'"):
        lora.target_modules(Lora(targets=(f"{first}x",)), model)


def test_the_document_names_every_architecture_and_every_module():
    named = set(re.findall(r"`([\w.]+)`", (Path(__file__).parents[2] / "docs/families.md").read_text("utf-8")))
    assert set(TINY_CONFIGS) <= named
    for name in TINY_CONFIGS:
        model, _ = built(name)
        assert {part for path in everything(model) for part in path.rsplit(".", 1)} <= {n.rstrip(".") for n in named}


# Files.


@of_every_architecture
def test_adapters_are_written_and_read_again(name, tmp_path):
    model, _ = built(name)
    adapters, kind = adapters_of(model), Lora(rank=3, targets=everything(model))
    write_adapter(tmp_path, adapters, kind, "some/model", model)
    found, again = read_adapter_for(tmp_path, model)
    assert same(again, adapters)
    assert lora.target_modules(found, model) == lora.target_modules(kind, model)


@of_every_architecture
def test_each_tensor_lies_in_its_place(name):
    (model, params), tensors = built(name), tiny_checkpoint(TINY_CONFIGS[name]).tensors
    assert len(jax.tree.leaves(params)) == len(tensors)
    for weight in model.family.weights(model.config):
        for layer in range(model.config.layers) if "{layer}" in weight.name else (None,):
            place = params if layer is None else params["layers"][layer]
            for key in weight.path:
                place = place[key]
            array = tensors[weight.name.format(layer=layer)]
            np.testing.assert_array_equal(place, array.T if weight.transpose else array)
