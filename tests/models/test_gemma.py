"""Gemma 2 and 3: what their files say, and what their layers compute."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_layers as plain
import pytest
from tiny_configs import TINY_CONFIGS, VOCABULARY, tiny_of

from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.family import family_of
from fedjax_llm.models.gemma import FAMILY, config_from_hf
from fedjax_llm.models.llama import rotary_frequencies

SECOND, THIRD = TINY_CONFIGS["Gemma2ForCausalLM"], TINY_CONFIGS["Gemma3ForCausalLM"]
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LENGTH = 14
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


@cache
def built(second: bool, **fields: Any) -> tuple[CausalLM, Any]:
    return tiny_of((SECOND if second else THIRD) | {name: _listed(value) for name, value in fields.items()})


def _listed(value: Any) -> Any:
    """Fields come as tuples, so that they can be looked up."""
    return list(value) if isinstance(value, tuple) else value


def logits(model: CausalLM, params: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    hidden = model.hidden(params, {}, tokens)
    return np.asarray(model.logits(params, hidden.reshape(-1, hidden.shape[-1]))).reshape(*tokens.shape, -1)


# config.json


def test_gemma_2():
    config = config_from_hf(SECOND | {"num_hidden_layers": 4})
    assert config.window == (5, None, 5, None)
    assert (config.score_cap, config.logit_cap) == (50.0, 30.0)
    assert (config.scale, config.tied, config.head_norm) == (12**-0.5, True, False)
    assert config.frequencies == config.local_frequencies == rotary_frequencies(8, 1e4, None)
    uncapped = config_from_hf(SECOND | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (uncapped.score_cap, uncapped.logit_cap) == (None, None)


def test_gemma_3():
    config = config_from_hf({name: v for name, v in THIRD.items() if name != "sliding_window_pattern"})
    assert config.window == (5, 5)
    config = config_from_hf(THIRD | {"num_hidden_layers": 7, "sliding_window_pattern": 3})
    assert config.window == (5, 5, None, 5, 5, None, 5)
    assert (config.score_cap, config.logit_cap) == (None, None)
    assert (config.scale, config.tied, config.head_norm) == (1 / 16, True, True)
    assert config.frequencies == rotary_frequencies(8, 1e6, None)
    assert config.local_frequencies == rotary_frequencies(8, 1e4, None)


def test_old_and_new_names_of_gemma_3_mean_the_same():
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    new = {
        "rope_parameters": {
            GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            LOCAL: {"rope_type": "default", "rope_theta": 2e4},
        },
        "layer_types": [LOCAL, GLOBAL],
    }
    plainer = {name: value for name, value in THIRD.items() if name != "sliding_window_pattern"}
    config = config_from_hf(plainer | old)
    assert config == config_from_hf(plainer | new)
    assert config.frequencies == rotary_frequencies(8, 5e5, {"rope_type": "linear", "factor": 8.0})
    assert config.local_frequencies == rotary_frequencies(8, 2e4, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported .*'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "an encoder"),
        ({"layer_types": [LOCAL, "chunked_attention"]}, "'chunked_attention', which is not supported"),
        ({"layer_types": [LOCAL]}, "names 1 layers, but num_hidden_layers is 2"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(THIRD | fields)


@pytest.mark.parametrize("name", ["hidden_size", "num_key_value_heads", "intermediate_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"no field '{name}'.*Gemma2ForCausalLM"):
        config_from_hf({key: value for key, value in SECOND.items() if key != name})


def test_the_model_with_images_is_refused_with_the_reason():
    assert family_of(THIRD) is FAMILY
    with pytest.raises(UserError, match="'Gemma3ForConditionalGeneration' is not supported: it reads images"):
        family_of({"architectures": ["Gemma3ForConditionalGeneration"]})


# Layers


def by_formula(model: CausalLM, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [L, V] of a text [L], in float64."""
    c, wide = model.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = wide["embed_tokens"]["embedding"][tokens] * np.sqrt(c.width)

    def norm(x, place):
        return plain.normed(x, 1 + place["scale"], c.epsilon)

    for layer, window in zip(wide["layers"], c.window, strict=True):
        own, frequencies = layer["self_attn"], c.frequencies if window is None else c.local_frequencies
        inside = norm(x, layer["input_layernorm"])
        heads = [(inside @ own[f"{n}_proj"]["kernel"]).reshape(len(tokens), -1, c.head_dim) for n in "qkv"]
        if c.head_norm:
            heads[:2] = [norm(heads[0], own["q_norm"]), norm(heads[1], own["k_norm"])]
        for turned in heads[:2]:
            for at, head in np.ndindex(turned.shape[:2]):
                turned[at, head] = plain.rotated(turned[at, head], at, np.array(frequencies))
        mixed = plain.attended(*heads, c.scale, window, c.score_cap) @ own["o_proj"]["kernel"]
        x = x + norm(mixed, layer["post_attention_layernorm"])
        moved = plain.gated(norm(x, layer["pre_feedforward_layernorm"]), layer["mlp"], plain.gelu)
        x = x + norm(moved, layer["post_feedforward_layernorm"])
    found = norm(x, wide["norm"]) @ wide["embed_tokens"]["embedding"].T
    return found if c.logit_cap is None else c.logit_cap * np.tanh(found / c.logit_cap)


@pytest.mark.parametrize(
    ("second", "fields"),
    [
        (True, {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}),
        (True, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        (False, {"query_pre_attn_scalar": 3, "rope_theta": 50.0, "rope_local_base_freq": 10.0}),
        (False, {"final_logit_softcapping": 3.0, "layer_types": (GLOBAL, LOCAL)}),
    ],
)
def test_logits_are_those_of_the_formulas(second, fields):
    model, params = built(second, **fields)
    found = logits(model, params)
    for row, tokens in zip(found, TOKENS, strict=True):
        np.testing.assert_allclose(row, by_formula(model, params, tokens), atol=5e-5)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("kinds", "reach"), [((LOCAL, LOCAL), 9), ((LOCAL, GLOBAL), LENGTH), ((GLOBAL,) * 2, LENGTH)])
def test_local_layers_see_a_window_and_global_ones_all(second, kinds, reach):
    model, params = built(second, layer_types=kinds)
    changed = TOKENS.copy()
    changed[:, 0] = (TOKENS[:, 0] + 1) % VOCABULARY
    difference = np.abs(logits(model, params) - logits(model, params, changed)).max((0, 2))
    assert np.all(difference[:reach] > 0)
    assert np.all(difference[reach:] == 0)


def test_soft_caps_bound_the_logits_and_keep_their_order():
    (model, params), (plainer, _) = (built(True, final_logit_softcapping=cap) for cap in (2.0, None))
    bounded, free = logits(model, params), logits(plainer, params)
    assert np.abs(free).max() > 2 > np.abs(bounded).max()
    assert np.array_equal(free.argmax(-1), bounded.argmax(-1))
    np.testing.assert_allclose(bounded, 2 * np.tanh(free / 2), atol=1e-5)


def test_each_kind_of_layer_has_its_own_rotary_positions():
    for kinds, used in (((LOCAL, LOCAL), "local_frequencies"), ((GLOBAL, GLOBAL), "frequencies")):
        model, params = built(False, layer_types=kinds)
        for field in ("frequencies", "local_frequencies"):
            other = replace(model, config=replace(model.config, **{field: rotary_frequencies(8, 3.0, None)}))
            assert np.array_equal(logits(other, params), logits(model, params)) == (field != used)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_scaled_in_their_own_type(dtype):
    model, params = built(True)
    table = params["embed_tokens"]["embedding"].astype(dtype)
    found = model.trunk(params | {"embed_tokens": {"embedding": table}}, TOKENS, 0)
    root = {"float32": np.float32(32**0.5), "bfloat16": np.float32(5.65625)}[dtype]
    expected = jnp.asarray(np.asarray(table, np.float32)[TOKENS] * root, dtype)
    assert found.dtype == dtype
    assert np.array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
