import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_configs import TINY_CONFIGS, VOCABULARY, tiny_of

from fedjax_llm.errors import UserError
from fedjax_llm.models.gpt_neox import config_from_hf
from fedjax_llm.models.llama import rotary_frequencies

RAW = TINY_CONFIGS["GPTNeoXForCausalLM"]
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)).astype(np.int32)


def hidden(raw, positions=None, change=lambda layer: layer):
    """Of random weights, whose layers are changed before."""
    model, params = tiny_of(raw)
    params = params | {"layers": tuple(map(change, params["layers"]))}
    return np.asarray(model.hidden(params, {}, TOKENS, positions))


# config.json.


def test_pythia():
    config = config_from_hf(RAW)
    assert (config.vocab_size, config.width, config.mlp_width, config.layers) == (97, 32, 48, 2)
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (4, 4, 8, 512)
    assert (config.epsilon, config.activation, config.window) == (1e-5, "gelu", None)
    assert (config.parallel, config.bias, config.tied) == (True, True, False)
    assert config.frequencies == rotary_frequencies(4, 10000.0, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_parallel_residual": False}, {"parallel": False}),
        ({"tie_word_embeddings": True}, {"tied": True}),
        ({"attention_bias": False}, {"bias": False}),
        ({"hidden_act": "gelu_fast", "layer_norm_eps": 1e-3}, {"activation": "gelu_fast", "epsilon": 1e-3}),
        ({"rotary_pct": 1.0, "rotary_emb_base": 500}, {"frequencies": rotary_frequencies(8, 500.0, None)}),
        (
            {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.25, "rope_type": "default"}},
            {"frequencies": rotary_frequencies(2, 500.0, None)},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"frequencies": rotary_frequencies(4, 10000.0, {"type": "linear", "factor": 2.0})},
        ),
    ],
)
def test_switches(fields, expected):
    config = config_from_hf(RAW | fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"no field '{name}'; is it a complete GPTNeoXForCausalLM"):
        config_from_hf({key: value for key, value in RAW.items() if key != name})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "geglu"}, "hidden_act 'geglu' is not supported; did you mean 'gelu'"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"rotary_pct": 0.4}, "rotary_pct 0.4 of 8 components of a head is no even number"),
        ({"rotary_pct": 0.0}, "rotary_pct 0.0 of 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(RAW | fields)


# The block.


def test_query_key_and_value_lie_head_by_head():
    order = np.array([2, 0, 3, 1])

    def permuted(layer):
        fused, dense = layer["attention"]["query_key_value"], layer["attention"]["dense"]
        outputs = np.arange(96).reshape(4, 24)[order].ravel()
        fused = {"kernel": fused["kernel"][:, outputs], "bias": fused["bias"][outputs]}
        rows = dense["kernel"].reshape(4, 8, 32)[order].reshape(32, 32)
        return layer | {"attention": {"query_key_value": fused, "dense": dense | {"kernel": rows}}}

    np.testing.assert_allclose(hidden(RAW, change=permuted), hidden(RAW), atol=1e-5)


def test_without_attention_it_is_the_same_whether_parallel_or_not():
    def deaf(layer):
        return layer | {"attention": jax.tree.map(jnp.zeros_like, layer["attention"])}

    parallel, sequential = RAW, RAW | {"use_parallel_residual": False}
    np.testing.assert_allclose(hidden(parallel, change=deaf), hidden(sequential, change=deaf), atol=1e-6)
    assert not np.allclose(hidden(parallel), hidden(sequential), atol=1e-2)


def test_positions_count_by_their_differences():
    every = np.arange(TOKENS.shape[1])
    np.testing.assert_allclose(hidden(RAW, every + 7), hidden(RAW, every), atol=1e-4)
    assert not np.allclose(hidden(RAW, 2 * every), hidden(RAW, every), atol=1e-3)


def test_a_part_of_every_head_is_not_turned():
    def unturned(layer):
        """Queries and keys are zero where they are turned."""
        parts = np.ones((4, 3, 8), np.float32)
        parts[:, :2, :4] = 0
        fused = jax.tree.map(lambda leaf: leaf * parts.ravel(), layer["attention"]["query_key_value"])
        return layer | {"attention": layer["attention"] | {"query_key_value": fused}}

    every = np.arange(TOKENS.shape[1])
    np.testing.assert_array_equal(hidden(RAW, 5 * every, unturned), hidden(RAW, every, unturned))
