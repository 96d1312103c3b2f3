import numpy as np
import pytest
from tiny_configs import TINY_CONFIGS, VOCABULARY, tiny_of

from fedjax_llm.errors import UserError
from fedjax_llm.models.decoding import generate
from fedjax_llm.models.gpt2 import config_from_hf, layer_terms

RAW = TINY_CONFIGS["GPT2LMHeadModel"]
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)).astype(np.int32)


def hidden(raw, positions=None, change=lambda layer: layer):
    """Of random weights, whose layers are changed before."""
    model, params = tiny_of(raw)
    params = params | {"layers": tuple(map(change, params["layers"]))}
    return np.asarray(model.hidden(params, {}, TOKENS, positions))


# config.json.


def test_gpt2():
    config = config_from_hf({key: value for key, value in RAW.items() if key != "n_inner"})
    assert (config.vocab_size, config.width, config.mlp_width, config.layers) == (97, 32, 128, 2)
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (4, 4, 8, 512)
    assert (config.epsilon, config.activation, config.window) == (1e-5, "gelu_new", None)
    assert (config.tied, config.scaled, config.scaled_by_layer) == (True, True, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_inner": 48}, {"mlp_width": 48}),
        ({"n_inner": None}, {"mlp_width": 128}),
        ({"tie_word_embeddings": False}, {"tied": False}),
        ({"n_positions": None, "n_ctx": 64}, {"context": 64}),
        ({"activation_function": "gelu", "layer_norm_epsilon": 1e-3}, {"activation": "gelu", "epsilon": 1e-3}),
        ({"scale_attn_weights": False}, {"scaled": False}),
        ({"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, {"scaled_by_layer": True}),
    ],
)
def test_switches(fields, expected):
    config = config_from_hf(RAW | fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["n_embd", "n_head", "n_layer", "vocab_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"no field '{name}'; is it a complete GPT2LMHeadModel"):
        config_from_hf({key: value for key, value in RAW.items() if key != name})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "gelu_tanh"}, "activation_function 'gelu_tanh' is not supported; did you mean"),
        ({"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ({"add_cross_attention": True}, "add_cross_attention is not supported: there is no encoder"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(RAW | fields)


# The block.


def test_all_queries_lie_before_all_keys_and_these_before_all_values():
    order = np.array([2, 0, 3, 1])

    def permuted(layer):
        fused, output = layer["attn"]["c_attn"], layer["attn"]["c_proj"]
        outputs = np.arange(96).reshape(3, 4, 8)[:, order].ravel()
        fused = {"kernel": fused["kernel"][:, outputs], "bias": fused["bias"][outputs]}
        rows = output["kernel"].reshape(4, 8, 32)[order].reshape(32, 32)
        return layer | {"attn": {"c_attn": fused, "c_proj": output | {"kernel": rows}}}

    np.testing.assert_allclose(hidden(RAW, change=permuted), hidden(RAW), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [8**-0.5, 8**-0.5]),
        ({"scale_attn_weights": False}, [1.0, 1.0]),
        ({"scale_attn_by_inverse_layer_idx": True}, [8**-0.5, 8**-0.5 / 2]),
    ],
)
def test_how_a_layer_scales_its_scores(fields, expected):
    config = config_from_hf(RAW | fields)
    np.testing.assert_allclose([layer_terms(config, (), layer) for layer in (0, 1)], expected, rtol=1e-6)


def test_queries_may_take_the_scale_over():
    def widened(layer):
        factors = np.repeat(np.float32([8**0.5, 1, 1]), 32)
        fused = {name: leaf * factors for name, leaf in layer["attn"]["c_attn"].items()}
        return layer | {"attn": layer["attn"] | {"c_attn": fused}}

    unscaled = hidden(RAW | {"scale_attn_weights": False})
    np.testing.assert_allclose(hidden(RAW, change=widened), unscaled, atol=1e-5)
    assert not np.allclose(unscaled, hidden(RAW), atol=1e-2)


# Learned positions.


def test_the_embedding_is_that_of_the_token_plus_that_of_the_position():
    model, params = tiny_of(RAW)
    positions = np.stack([np.arange(9), np.arange(9)[::-1] + 3])
    tables = {name: np.asarray(params[name]["embedding"]) for name in ("wte", "wpe")}
    expected = tables["wte"][TOKENS] + tables["wpe"][positions]
    np.testing.assert_array_equal(model.trunk(params, TOKENS, 0, positions), expected)


def test_padding_may_run_past_the_last_position():
    short = RAW | {"n_positions": 12}
    model, params = tiny_of(short)
    longer = np.pad(TOKENS, ((0, 0), (0, 11)), constant_values=5)
    found = np.asarray(model.hidden(params, {}, longer))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, :9], hidden(short), atol=1e-5)


def test_decoding_ends_where_the_positions_do():
    model, params = tiny_of(RAW | {"n_positions": 40})
    prompts = [TOKENS[0].tolist() * 4, TOKENS[1].tolist()]
    made = generate(model, params, {}, prompts, max_new_tokens=8, end_ids=(), pad_id=0)
    assert [len(row) for row in made] == [4, 8]
    tokens = np.array([[*prompts[0], *made[0]]], np.int32)
    whole = np.asarray(model.logits(params, model.hidden(params, {}, tokens)[0]))
    assert whole[35:39].argmax(-1).tolist() == made[0]
