import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HF_CONFIG

from fedjax_llm.errors import UserError
from fedjax_llm.models import llama
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.family import family_of
from fedjax_llm.models.llama import FAMILY, config_from_hf, rotary_frequencies

RAW = HF_CONFIG | {"vocab_size": 97}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def raw(architecture="LlamaForCausalLM", **fields):
    return RAW | {"architectures": [architecture]} | fields


# config.json.


def test_llama():
    config = config_from_hf(raw())
    assert (config.vocab_size, config.width, config.mlp_width, config.layers) == (97, 32, 48, 2)
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (4, 2, 8, 512)
    assert (config.epsilon, config.window, config.tied) == (1e-5, None, False)
    assert not any([config.qkv_bias, config.output_bias, config.mlp_bias, config.head_norm])
    assert config.frequencies == rotary_frequencies(8, 10000.0, None)


def test_what_old_files_leave_out():
    config = config_from_hf({name: value for name, value in raw().items() if name != "num_key_value_heads"})
    assert config.kv_heads == 4
    assert config_from_hf(raw(head_dim=None)).head_dim == 8
    assert config_from_hf(raw(head_dim=20)).head_dim == 20


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        ("LlamaForCausalLM", {"mlp_bias": True}, {"qkv_bias": False, "mlp_bias": True}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, {"tied": True}),
        ("MistralForCausalLM", {"sliding_window": 4096}, {"window": 4096, "qkv_bias": False}),
        ("MistralForCausalLM", {"sliding_window": None}, {"window": None}),
        ("Qwen2ForCausalLM", {}, {"qkv_bias": True, "output_bias": False, "head_norm": False}),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": False}, {"window": None}),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
            {"window": 64},
        ),
        ("Qwen3ForCausalLM", {"head_dim": 16}, {"head_norm": True, "qkv_bias": False, "head_dim": 16}),
    ],
)
def test_switches(architecture, fields, expected):
    config = config_from_hf(raw(architecture, **fields))
    assert {name: getattr(config, name) for name in expected} == expected
    assert family_of(raw(architecture)) is FAMILY


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"no field '{name}'"):
        config_from_hf({key: value for key, value in raw().items() if key != name})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported .*'silu'"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported; supported: default"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "no field 'low_freq_factor'"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "a part of the layers"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(raw("Qwen2ForCausalLM", **fields))


def test_another_architecture_is_refused():
    with pytest.raises(UserError, match=r"'LlamaForCausalML' is not supported; did you mean 'LlamaForCausalLM'"):
        family_of(raw("LlamaForCausalML"))
    with pytest.raises(UserError, match=r"none named in config.json"):
        family_of({})


# Rotary frequencies.


def test_plain_and_linear_frequencies():
    np.testing.assert_allclose(rotary_frequencies(4, 100.0, None), [1.0, 0.1], rtol=1e-7)
    scaling = {"type": "linear", "factor": 4.0}  # the old name of the field
    np.testing.assert_allclose(rotary_frequencies(4, 100.0, scaling), [0.25, 0.025], rtol=1e-7)
    factors = {"rope_type": "factors", "factors": [1.0, 5.0]}
    np.testing.assert_allclose(rotary_frequencies(4, 100.0, factors), [1.0, 0.02], rtol=1e-7)


def test_llama3_frequencies():
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    expected = []
    for frequency in plain:  # the reference code of the model card, by wavelength
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            expected.append(frequency)
        elif wavelength > 8192 / 1.0:
            expected.append(frequency / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    found = rotary_frequencies(128, 500000.0, LLAMA3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    ratios = np.asarray(found) / plain
    assert np.isclose(ratios, 1).any()
    assert np.isclose(ratios, 1 / 8).any()
    assert ((ratios > 0.13) & (ratios < 0.99)).any()


def test_the_base_is_found_in_old_and_new_files():
    expected = rotary_frequencies(8, 500000.0, LLAMA3)
    assert config_from_hf(raw(rope_theta=500000.0, rope_scaling=LLAMA3)).frequencies == expected
    assert config_from_hf(raw(rope_parameters=LLAMA3 | {"rope_theta": 500000.0})).frequencies == expected
    plain = config_from_hf(raw(rope_theta=500000.0, rope_scaling=None)).frequencies
    assert plain == rotary_frequencies(8, 500000.0, None) != expected


# The weight table.


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 16}),
        ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
    ],
)
def test_the_table_has_every_parameter_of_the_model_once(architecture, fields):
    config = config_from_hf(raw(architecture, **fields))
    table = {}
    for weight in llama.weights(config):
        assert (weight.path, "{layer}" in weight.name) not in table
        table[weight.path, "{layer}" in weight.name] = weight.shape[::-1] if weight.transpose else weight.shape
    assert len({weight.name for weight in llama.weights(config)}) == len(table)
    terms = llama.embed(
        config, {"embed_tokens": {"embedding": jnp.zeros((97, 32))}}, jnp.zeros((1, 3), int), jnp.arange(3)
    )
    mask = jnp.ones((1, 3, 3), bool)
    variables = jax.eval_shape(FAMILY.block(config, 0.0).init, jax.random.key(0), *terms, mask)
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    block = {(tuple(key.key for key in path), True): leaf.shape for path, leaf in flat}
    assert {place: shape for place, shape in table.items() if place[1]} == block
    outside = {("embed_tokens", "embedding"): (97, 32), ("norm", "scale"): (32,)}
    if not config.tied:
        outside["lm_head", "embedding"] = (97, 32)
    assert {place: shape for (place, layered), shape in table.items() if not layered} == outside


def test_projections_are_the_matrices_of_a_layer():
    config = config_from_hf(raw("Qwen3ForCausalLM", head_dim=16))
    matrices = {
        ".".join(weight.path[:-1]): weight.shape[::-1]
        for weight in llama.weights(config)
        if weight.path[-1] == "kernel"
    }
    assert llama.projections(config) == matrices
    assert matrices["self_attn.q_proj"] == (32, 64)


def test_a_configuration_is_a_static_argument():
    assert hash(CausalLM(FAMILY, config_from_hf(raw()))) == hash(CausalLM(FAMILY, config_from_hf(raw())))
