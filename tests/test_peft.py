import json
import math
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import same, tiny_adapters, tiny_model

from fedjax_llm import lora as lora_module
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora
from fedjax_llm.models import gpt2
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.peft import Naming, naming_of, read_adapter, read_adapter_for, write_adapter

ATTENTION = ("q_proj", "v_proj")
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def model():
    return tiny_model()[0]


@pytest.fixture
def folder(tmp_path, model):
    """An adapter of rank 3 on q_proj and v_proj of both layers."""
    adapters = tiny_adapters(model, rank=3, targets=ATTENTION)
    write_adapter(tmp_path / "adapter", adapters, Lora(rank=3, alpha=6, targets=ATTENTION), "some/model", model)
    return tmp_path / "adapter"


def configure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(folder, change):
    """Rewrites the tensors; a change to ``None`` removes one."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | change
    save_file({name: array for name, array in tensors.items() if array is not None}, path)


def refusal(folder, model=None) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(folder) if model is None else read_adapter_for(folder, model)
    return str(caught.value)


# Writing, and back.


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=3, alpha=6, targets=("q_proj", "v_proj")),
        Lora(rank=4, alpha=math.pi, targets=("mlp.*", "o_proj"), dropout=0.1, init="gaussian"),
        Lora(rank=2, targets=("*",), layers=(-1,)),
        Lora(rank=2, targets=("k_proj",), layers=(2, 10)),
    ],
)
def test_round_trip_is_bit_exact(tmp_path, lora):
    model, _ = tiny_model(layers=12)
    adapters = tiny_adapters(model, rank=lora.rank, targets=lora.targets)
    adapters = {path: adapters[path] for path in lora_module.target_modules(lora, model)}
    write_adapter(tmp_path, adapters, lora, "some/model", model)
    for back, again in (read_adapter(tmp_path), read_adapter_for(tmp_path, model)):
        assert same(again, adapters)
        assert (back.rank, back.alpha, back.dropout, back.init) == (lora.rank, lora.alpha, lora.dropout, lora.init)
        assert bool(back.layers) == bool(lora.layers)
        assert lora_module.target_modules(back, model) == lora_module.target_modules(lora, model)


def test_bfloat16_adapters_are_written_exactly_as_float32(tmp_path, model):
    adapters = tiny_adapters(model, rank=3, targets=ATTENTION)
    halves = {p: {n: leaf.astype(jnp.bfloat16) for n, leaf in f.items()} for p, f in adapters.items()}
    write_adapter(tmp_path, halves, Lora(rank=3, targets=ATTENTION, dtype="bfloat16"), "m", model)
    _, back = read_adapter(tmp_path)
    assert same({p: {n: leaf.astype(jnp.float32) for n, leaf in f.items()} for p, f in halves.items()}, back)


def test_files(folder, model):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["self_attn.q_proj", "self_attn.v_proj"],
        "layers_to_transform": None,
        "init_lora_weights": True,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert tensors[Q_A].shape == (3, 32)
    assert tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (16, 3)
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    a = tiny_adapters(model, rank=3, targets=ATTENTION)["layers.0.self_attn.q_proj"]["a"]
    np.testing.assert_array_equal(tensors[Q_A], np.asarray(a).T)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def tiny_gpt2():
    fields = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return CausalLM(gpt2.FAMILY, gpt2.config_from_hf(fields))


def test_names_and_layout_are_those_of_the_models_file(tmp_path, model):
    assert naming_of(model) == Naming("model.layers", fan_in_fan_out=False)
    assert naming_of(tiny_gpt2()) == Naming("transformer.h", fan_in_fan_out=True)
    lora = Lora(rank=3, targets=("c_attn", "c_proj"), layers=(1,))
    adapters = tiny_adapters(tiny_gpt2(), rank=3, targets=lora.targets)
    adapters = {path: factors for path, factors in adapters.items() if path.startswith("layers.1.")}
    write_adapter(tmp_path, adapters, lora, "gpt2", tiny_gpt2())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
    shapes = {name: array.shape for name, array in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert len(shapes) == 6
    assert shapes["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"] == (3, 32)
    assert shapes["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"] == (96, 3)
    configure(tmp_path, target_modules=["c_attn", "h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"])
    for found, again in (read_adapter(tmp_path), read_adapter_for(tmp_path, tiny_gpt2())):
        assert same(again, adapters)
        assert found.layers == (1,)


def test_an_older_adapter_is_replaced_and_other_files_stay(folder, model):
    (folder / "README.md").write_text("mine")
    newer = tiny_adapters(model, seed=9, rank=2, targets=("o_proj",))
    write_adapter(folder, newer, Lora(rank=2, targets=("o_proj",)), "m", model)
    assert same(read_adapter(folder)[1], newer)
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("instant", range(3))
def test_an_interrupted_write_never_mixes_old_and_new(folder, model, monkeypatch, instant):
    old = read_adapter(folder)[1]
    steps = []

    def dying(step):
        def run(path, *args, **kwargs):
            steps.append(path)
            if len(steps) > instant:
                raise KeyboardInterrupt
            return step(path, *args, **kwargs)

        return run

    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    with pytest.raises(KeyboardInterrupt):
        write_adapter(folder, tiny_adapters(model, seed=9, targets=ATTENTION), Lora(3, targets=ATTENTION), "m", model)
    monkeypatch.undo()
    if instant == 0:
        assert same(read_adapter(folder)[1], old)
    else:
        assert "has no adapter_config.json" in refusal(folder)


def test_a_place_that_cannot_be_written(tmp_path, model):
    (tmp_path / "file").write_text("")
    adapters = tiny_adapters(model, targets=ATTENTION)
    with pytest.raises(UserError, match=r"cannot be written to .*file"):
        write_adapter(tmp_path / "file", adapters, Lora(3, targets=ATTENTION), "m", model)


def test_writing_refuses_what_the_format_cannot_say(tmp_path, model):
    adapters = tiny_adapters(model, rank=3, targets=ATTENTION)
    with pytest.raises(ValueError, match="no adapters"):
        write_adapter(tmp_path, {}, Lora(3), "m", model)
    with pytest.raises(ValueError, match="no factors of rank 4"):
        write_adapter(tmp_path, adapters, Lora(4), "m", model)
    with pytest.raises(ValueError, match="no factors of rank 3"):
        write_adapter(tmp_path, tiny_adapters(model, targets=ATTENTION, leading=(2,)), Lora(3), "m", model)
    adapters.pop("layers.1.self_attn.q_proj")
    with pytest.raises(ValueError, match="every layer adapts the same modules"):
        write_adapter(tmp_path, adapters, Lora(3), "m", model)
    assert list(tmp_path.iterdir()) == []


# Reading what others wrote.


def test_rank_stabilised_scaling_is_kept(folder):
    configure(folder, use_rslora=True)
    lora, _ = read_adapter(folder)
    assert lora.rslora
    assert lora.scaling == pytest.approx(6 / math.sqrt(3), rel=1e-15)


def test_magnitudes_are_read_and_written(folder, tmp_path, model):
    lora, adapters = read_adapter(folder)
    for number, factors in enumerate(adapters.values()):
        factors["m"] = jnp.arange(factors["b"].shape[1]) + float(number)
    write_adapter(tmp_path / "dora", adapters, replace(lora, dora=True), "some/model", model)
    found, again = read_adapter(tmp_path / "dora")
    assert found.dora
    assert same(again, adapters)
    retensor(tmp_path / "dora", {Q_A.replace("lora_A.weight", "lora_magnitude_vector"): None})
    with pytest.raises(UserError, match=r"1 missing: .*layers.0.*q_proj.lora_magnitude_vector"):
        read_adapter(tmp_path / "dora")


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"target_modules": ["v_proj", "q_proj"]}, ()),
        ({"target_modules": "all-linear"}, (0, 1)),
        ({"target_modules": r".*\.self_attn\.[qv]_proj"}, (0, 1)),
        ({"target_modules": [f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in "qv"]}, (0, 1)),
        ({"layers_to_transform": [0, 1]}, (0, 1)),
        ({"init_lora_weights": "orthogonal", "lora_alpha": 6.0, "rank_pattern": {}, "modules_to_save": None}, ()),
    ],
)
def test_ways_to_name_targets(folder, model, fields, layers):
    expected = read_adapter(folder)[1]
    configure(folder, **fields)
    lora, adapters = read_adapter(folder)
    assert (lora.targets, lora.layers) == (("self_attn.q_proj", "self_attn.v_proj"), layers)
    assert same(adapters, expected)
    assert read_adapter_for(folder, model)[0].layers == ()  # all that this model has


def test_a_single_layer_as_a_number(folder, model):
    configure(folder, layers_to_transform=1)
    retensor(folder, {name: None for name in load_file(folder / "adapter_model.safetensors") if "layers.0" in name})
    assert read_adapter_for(folder, model)[0].layers == (1,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "of type 'LOHA'; only 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"trainable_token_indices": [3]}, "trained embeddings"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"bias": "lora_only"}, "trained biases .*'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which alters the base"),
        ({"target_modules": None}, "no usable target_modules"),
        ({"target_modules": [3]}, "no usable target_modules"),
        ({"target_modules": "(q_proj"}, "no valid pattern"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"r": "three"}, "impossible r, lora_alpha"),
        ({"r": 0}, "lora.rank is 0"),
        ({"lora_dropout": 1.5}, "lora.dropout is 1.5"),
    ],
)
def test_what_is_no_plain_lora_is_refused(folder, fields, message):
    configure(folder, **fields)
    with pytest.raises(UserError, match=f"adapter_config.json.*{message}"):
        read_adapter(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    embedding = "base_model.model.model.embed_tokens.weight"
    retensor(folder, {Q_A: None, Q_B: np.zeros((32, 4), np.float32), embedding: np.zeros((97, 32), np.float32)})
    message = refusal(folder)
    assert f"1 missing: {Q_A};" in message
    assert f"1 no LoRA factors of target_modules: {embedding};" in message
    assert f"1 misshapen: {Q_B} is [32, 4], not of rank 3" in message


def test_a_target_without_tensors_and_tensors_without_a_target(folder):
    configure(folder, target_modules=["q_proj", "up_proj"])
    message = refusal(folder)
    assert "1 missing: all of 'up_proj'" in message
    assert "4 no LoRA factors of target_modules: base_model.model.model.layers.0.self_attn.v_proj" in message


def test_layers_without_tensors_and_tensors_of_other_layers(folder):
    configure(folder, layers_to_transform=[1, 5])
    message = refusal(folder)
    assert "4 missing: base_model.model.model.layers.5.self_attn.q_proj.lora_A" in message
    assert "4 no LoRA factors of target_modules: " in message
    assert Q_A in message


def test_layers_that_differ_are_refused(folder):
    retensor(folder, {Q_A: None, Q_B: None})
    assert f"2 missing: {Q_A}, {Q_B}.\nEvery adapted layer must adapt the same modules" in refusal(folder)


def test_damaged_folders(folder, tmp_path):
    retensor(folder, {Q_A: np.full((3, 32), np.nan, np.float32)})
    assert f"not finite, in {Q_A}" in refusal(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors is damaged" in refusal(folder)
    weights.unlink()
    assert "has no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_model.bin").touch()
    assert "adapter_model.bin only" in refusal(folder)
    fields = json.loads(config.read_text())
    fields.pop("r")
    config.write_text(json.dumps(fields))
    assert "no field 'r'" in refusal(folder)
    config.write_text("[]")
    assert "holds a list" in refusal(folder)
    config.write_text("{")
    assert "not valid JSON" in refusal(folder)
    config.rename(folder / "adapter_config.jsn")
    assert "has no adapter_config.json, so it is no PEFT adapter; did you mean 'adapter_config.jsn'" in refusal(folder)
    assert "has no adapter_config.json" in refusal(tmp_path / "nowhere")


def test_how_the_adapted_matrix_is_stored_says_nothing_of_the_factors(folder, model):
    expected = read_adapter_for(folder, model)[1]
    configure(folder, fan_in_fan_out=True)
    assert same(read_adapter_for(folder, model)[1], expected)


def test_a_magnitude_without_dora_is_left_over(folder):
    name = Q_A.replace("lora_A.weight", "lora_magnitude_vector")
    retensor(folder, {name: np.ones(32, np.float32)})
    assert f"1 no LoRA factors of target_modules: {name}" in refusal(folder)


# For a model.


def test_an_adapter_of_another_family(folder):
    message = refusal(folder, tiny_gpt2())
    assert "adapts model.layers, but the model's layers are transformer.h; it was made for another kind" in message


def test_an_adapter_of_another_model(folder, tmp_path):
    message = refusal(folder, tiny_model(heads=2)[0])
    assert "2 misshapen: layers.0.self_attn.q_proj maps 32 to 32, not 32 to 16" in message
    assert "adapts layer 1; the model has layers 0 to 0" in refusal(folder, tiny_model(layers=1)[0])
    assert "has tensors for 2 layers, but the model has 3" in refusal(folder, tiny_model(layers=3)[0])
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "query_proj"): array for name, array in tensors.items()}
    retensor(folder, dict.fromkeys(tensors) | renamed)
    configure(folder, target_modules=["query_proj", "v_proj"])
    assert "'self_attn.query_proj', which the model lacks; did you mean" in refusal(folder, tiny_model()[0])
