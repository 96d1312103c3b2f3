"""Phi 3 and 4: what their files say, and that their fused projections compute what a Llama's do."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_configs import CONTEXT, TINY_CONFIGS, VOCABULARY, tiny_of

from fedjax_llm.errors import UserError
from fedjax_llm.models import llama
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.family import family_of
from fedjax_llm.models.llama import rotary_frequencies
from fedjax_llm.models.phi import FAMILY, config_from_hf

RAW = TINY_CONFIGS["Phi3ForCausalLM"]
LONGROPE = RAW["rope_scaling"]
PLAIN = {n: v for n, v in RAW.items() if n not in ("rope_scaling", "partial_rotary_factor")}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 14)).astype(np.int32)


# config.json


def test_without_longrope():
    config = config_from_hf(PLAIN | {"rope_theta": 250000, "sliding_window": 2047, "tie_word_embeddings": True})
    assert config.frequencies == rotary_frequencies(8, 250000, None)
    assert (config.rotary_scale, config.context, config.window, config.tied) == (1.0, 8 * CONTEXT, 2047, True)
    config = config_from_hf(PLAIN)
    assert (config.window, config.tied, config.epsilon) == (None, False, RAW["rms_norm_eps"])
    assert family_of(RAW) is FAMILY


def test_longrope_is_its_short_factors_up_to_the_length_of_pre_training():
    config = config_from_hf(RAW)
    assert config.frequencies == rotary_frequencies(4, 10000.0, {"rope_type": "factors", "factors": [1.0, 2.0]})
    assert config.context == CONTEXT
    assert config.rotary_scale == pytest.approx(math.sqrt(1 + math.log(8) / math.log(CONTEXT)))
    assert config_from_hf(RAW | {"max_position_embeddings": 100}).context == 100
    assert config_from_hf(RAW | {"max_position_embeddings": CONTEXT}).rotary_scale == 1.0
    given = LONGROPE | {"attention_factor": 1.25}
    assert config_from_hf(RAW | {"rope_scaling": given}).rotary_scale == 1.25


def test_old_and_new_names_mean_the_same():
    new = {name: value for name, value in LONGROPE.items() if name != "type"}
    new |= {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert config_from_hf(PLAIN | {"rope_parameters": new}) == config_from_hf(RAW)
    assert config_from_hf(RAW | {"rope_scaling": LONGROPE | {"type": "su"}}) == config_from_hf(RAW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported .*'silu'"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0, 2.0]}}, "no field 'short_factor'"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "short_factor .* has 1 numbers, not 2"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(RAW | fields)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"no field '{name}'"):
        config_from_hf({key: value for key, value in RAW.items() if key != name})


# Layers


def as_llama(config, params, stretch=1.0):
    """A Llama with the parts of the fused matrices, whose queries are stretched."""
    shared = ("vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads", "head_dim", "epsilon", "frequencies")
    own = {name: getattr(config, name) for name in (*shared, "context", "window", "tied")}
    cuts = np.array([config.heads, config.heads + config.kv_heads]) * config.head_dim

    def parted(layer):
        query, key, value = np.split(np.asarray(layer["self_attn"]["qkv_proj"]["kernel"]), cuts, axis=1)
        gate, up = np.split(np.asarray(layer["mlp"]["gate_up_proj"]["kernel"]), 2, axis=1)
        attention = {"q_proj": query * np.float32(stretch), "k_proj": key, "v_proj": value}
        parts = {"self_attn": attention, "mlp": {"gate_proj": gate, "up_proj": up}}
        kernels = {place: {name: {"kernel": k} for name, k in part.items()} for place, part in parts.items()}
        kernels["self_attn"]["o_proj"] = layer["self_attn"]["o_proj"]
        kernels["mlp"]["down_proj"] = layer["mlp"]["down_proj"]
        return layer | kernels

    layers = tuple(parted(layer) for layer in params["layers"])
    return CausalLM(llama.FAMILY, llama.LlamaConfig(**own)), params | {"layers": layers}


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 5}, {"num_key_value_heads": 1, "tie_word_embeddings": True}])
def test_fused_projections_compute_what_their_parts_do(fields):
    model, params = tiny_of(PLAIN | fields)
    theirs, parts = as_llama(model.config, params)
    hidden = model.hidden(params, {}, TOKENS)
    np.testing.assert_allclose(hidden, theirs.hidden(parts, {}, TOKENS), atol=2e-5)
    flat = hidden.reshape(-1, hidden.shape[-1])
    np.testing.assert_allclose(model.logits(params, flat), theirs.logits(parts, flat), atol=1e-5)


def test_the_rotary_scale_multiplies_queries_and_keys():
    model, params = tiny_of(PLAIN)
    stretched = replace(model, config=replace(model.config, rotary_scale=1.5))
    theirs, parts = as_llama(model.config, params, stretch=1.5**2)
    found = np.asarray(stretched.hidden(params, {}, TOKENS))
    np.testing.assert_allclose(found, theirs.hidden(parts, {}, TOKENS), atol=2e-5)
    assert not np.allclose(found, model.hidden(params, {}, TOKENS), atol=1e-2)
