"""The Gemma, Phi and OLMo families against transformers, in float32, and their adapters against peft.

The bound is 2e-5: logits reach 5, and four layers of sums in float32, in another order, move them by up to 1e-5.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_adapters
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
)

from fedjax_llm import lora as lora_module
from fedjax_llm.lora import Lora
from fedjax_llm.peft import read_adapter_for, write_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
reference = pytest.importorskip("reference")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
WINDOW = 7
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = SIZES | {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
PARTIAL = LONGROPE | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 3.0], "long_factor": [1.0, 2.0, 8.0]}
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
KINDS: dict[str, PretrainedConfig] = {
    "gemma-2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma-2-uncapped": Gemma2Config(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma-2-biases": Gemma2Config(**GEMMA, attention_bias=True),
    "gemma-3": Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 6}),
    "gemma-3-ropes": Gemma3TextConfig(
        **GEMMA, rope_parameters=ROPES, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gemma-3-untied": Gemma3TextConfig(**GEMMA, final_logit_softcapping=3.0, tie_word_embeddings=False),
    "phi-3": Phi3Config(**SIZES, sliding_window=WINDOW),
    "phi-3-longrope": Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=LONGROPE),
    "phi-4-mini": Phi3Config(
        **SIZES, original_max_position_embeddings=64, rope_parameters=PARTIAL, tie_word_embeddings=True
    ),
    "olmo-2": Olmo2Config(**SIZES),
    "olmo-2-tied-biases": Olmo2Config(**SIZES, attention_bias=True, tie_word_embeddings=True),
}
ADAPTED = ("gemma-2", "gemma-3", "phi-4-mini", "olmo-2")


@pytest.fixture(scope="module")
def theirs_of():
    """Random models of transformers, whose norms and biases are random too, made once each."""
    made = {}

    def model(kind: str):
        if kind not in made:
            made[kind] = reference.random_model(KINDS[kind])
        return made[kind]

    return model


def some_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Rows longer and shorter than the window."""
    rng = np.random.default_rng(1)
    return reference.padded([rng.integers(0, 97, length) for length in (40, 40, 23, WINDOW, 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, theirs_of, tmp_path):
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path)
    model, params = reference.ours_of(tmp_path)
    tokens, mask = some_tokens()
    ours = reference.our_logits(model, params, {}, tokens)
    reference.assert_close(ours, reference.torch_logits(theirs, tokens, mask), mask, TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_gives_the_logits_of_their_whole_text(kind, theirs_of, tmp_path):
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path)
    model, params = reference.ours_of(tmp_path)
    tokens, mask = some_tokens()
    expected = reference.torch_logits(theirs, tokens[:2], mask[:2])
    cache, ours = model.empty_cache(2, 48, jnp.float32), []
    padding = jnp.zeros(2, jnp.int32)
    with jax.default_matmul_precision("highest"):
        for start, end in ((0, 30), *((at, at + 1) for at in range(30, 40))):
            hidden, cache = model.extend(params, {}, tokens[:2, start:end], cache, jnp.int32(start), padding)
            ours.append(model.logits(params, hidden.reshape(-1, hidden.shape[-1])).reshape(2, end - start, -1))
    reference.assert_close(np.concatenate(ours, axis=1), expected, mask[:2], TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma-2", "gemma-3", "olmo-2", "phi-3"])
def test_in_bfloat16_embeddings_and_norms_are_rounded_where_theirs_are(kind, theirs_of, tmp_path):
    folder = saved(theirs_of(kind), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model, params = reference.ours_of(folder)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens = np.arange(97, dtype=np.int32)[None]
    with torch.no_grad():
        embedded = theirs.model.embed_tokens(torch.from_numpy(tokens).long())
        normed = theirs.model.norm(embedded)
    ours = model.trunk(params, jnp.asarray(tokens), 0)
    assert np.array_equal(np.asarray(ours, np.float32), embedded.float().numpy())
    ours = np.asarray(model.family.finish(model.config, params, ours), np.float32)
    # A square root in float32 may be rounded otherwise; one in a thousand of its results shows in eight bits.
    assert (ours != normed.float().numpy()).mean() < 0.002


# Adapters


@pytest.mark.parametrize("kind", ADAPTED)
def test_peft_loads_what_we_write_and_we_what_it_writes(kind, theirs_of, tmp_path):
    folder = saved(theirs_of(kind), tmp_path / "model")
    model, params = reference.ours_of(folder)
    lora = Lora(rank=3, alpha=1.5, targets=("*_proj",))
    adapters = tiny_adapters(model, rank=3)
    write_adapter(tmp_path / "ours", adapters, lora, str(folder), model)
    theirs = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "ours").eval()
    assert sum(".lora_A." in name for name, _ in theirs.named_parameters()) == len(adapters)
    tokens, mask = some_tokens()
    expected = reference.torch_logits(theirs, tokens, mask)
    scaled = lora_module.scaled(adapters, lora.scaling)
    reference.assert_close(reference.our_logits(model, params, scaled, tokens), expected, mask, TOLERANCE)
    assert np.abs(expected - reference.our_logits(model, params, {}, tokens))[mask].max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    again, read = read_adapter_for(tmp_path / "theirs", model)
    assert again.scaling == lora.scaling
    assert list(read) == list(adapters)
    for path, factors in adapters.items():
        assert all(np.array_equal(read[path][name], factors[name]) for name in ("a", "b")), path


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def in_torch(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
