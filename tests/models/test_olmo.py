"""OLMo 2: what its files say, and what its layers compute."""

from functools import cache
from typing import Any

import jax
import numpy as np
import plain_layers as plain
import pytest
from tiny_configs import TINY_CONFIGS, VOCABULARY, tiny_of

from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.family import family_of
from fedjax_llm.models.llama import rotary_frequencies
from fedjax_llm.models.olmo import FAMILY, config_from_hf

RAW = TINY_CONFIGS["Olmo2ForCausalLM"]
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 14)).astype(np.int32)


@cache
def built(**fields: Any) -> tuple[CausalLM, Any]:
    return tiny_of(RAW | fields)


def test_what_a_file_says():
    config = config_from_hf(RAW | {"rope_theta": 500000, "attention_bias": True, "tie_word_embeddings": True})
    assert config.frequencies == rotary_frequencies(8, 500000, None)
    assert (config.heads, config.kv_heads, config.head_dim, config.window) == (4, 2, 8, None)
    assert (config.attention_bias, config.tied) == (True, True)
    assert config_from_hf({n: v for n, v in RAW.items() if n != "rms_norm_eps"}).epsilon == 1e-5
    assert config_from_hf({n: v for n, v in RAW.items() if n != "num_key_value_heads"}).kv_heads == 4
    assert family_of(RAW) is FAMILY


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported .*'silu'"),
        ({"clip_qkv": 8.0}, "clip_qkv is set"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(RAW | fields)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"no field '{name}'.*Olmo2ForCausalLM"):
        config_from_hf({key: value for key, value in RAW.items() if key != name})


def by_formula(model: CausalLM, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [L, V] of a text [L], in float64."""
    c, wide = model.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = wide["embed_tokens"]["embedding"][tokens]

    def norm(x, place):
        return plain.normed(x, place["scale"], c.epsilon)

    for layer in wide["layers"]:
        own = layer["self_attn"]
        flat = [x @ own[f"{n}_proj"]["kernel"] + own[f"{n}_proj"].get("bias", 0) for n in "qkv"]
        flat[:2] = [norm(flat[0], own["q_norm"]), norm(flat[1], own["k_norm"])]
        heads = [part.reshape(len(tokens), -1, c.head_dim) for part in flat]
        for turned in heads[:2]:
            for at, head in np.ndindex(turned.shape[:2]):
                turned[at, head] = plain.rotated(turned[at, head], at, np.array(c.frequencies))
        mixed = plain.attended(*heads, c.head_dim**-0.5, None, None) @ own["o_proj"]["kernel"]
        x = x + norm(mixed + own["o_proj"].get("bias", 0), layer["post_attention_layernorm"])
        x = x + norm(plain.gated(x, layer["mlp"], plain.silu), layer["post_feedforward_layernorm"])
    head = wide["embed_tokens" if c.tied else "lm_head"]["embedding"]
    return norm(x, wide["norm"]) @ head.T


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 6}])
def test_logits_are_those_of_the_formulas(fields):
    model, params = built(**fields)
    hidden = model.hidden(params, {}, TOKENS)
    found = np.asarray(model.logits(params, hidden.reshape(-1, hidden.shape[-1]))).reshape(*TOKENS.shape, -1)
    for row, tokens in zip(found, TOKENS, strict=True):
        np.testing.assert_allclose(row, by_formula(model, params, tokens), atol=2e-5)
