"""A small model of every architecture: what the contract of the families is tested on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tiny import HF_CONFIG

from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.checkpoint import Checkpoint, LazyTensor, LazyTensors
from fedjax_llm.models.family import family_of
from fedjax_llm.models.loading import BaseType, expected_tensors, read_params
from fedjax_llm.models.quantised import Quantise
from fedjax_llm.types import Params

VOCABULARY, CONTEXT = 97, 512

_LLAMA = HF_CONFIG | {"vocab_size": VOCABULARY}
_BY_NAME: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA | {"sliding_window": 5},
    "Qwen2ForCausalLM": _LLAMA | {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": _LLAMA | {"head_dim": 16},
    "GPTNeoXForCausalLM": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "rotary_pct": 0.5,
    },
    "GPT2LMHeadModel": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
    },
    # Every second layer sees a window only.
    "Gemma2ForCausalLM": _LLAMA | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12},
    "Gemma3ForCausalLM": _LLAMA | {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "Phi3ForCausalLM": _LLAMA
    | {
        "max_position_embeddings": 8 * CONTEXT,
        "original_max_position_embeddings": CONTEXT,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 8.0]},
    },
    "Olmo2ForCausalLM": _LLAMA,
}
TINY_CONFIGS = {name: raw | {"architectures": [name]} for name, raw in _BY_NAME.items()}
"""Architecture -> ``config.json``: two layers, D = 32, a vocabulary of ``VOCABULARY``."""


def tiny_checkpoint(raw: Mapping[str, Any], seed: int = 0) -> Checkpoint:
    """Random weights for a ``config.json``: matrices that keep the scale of what they multiply, vectors around one."""
    family = family_of(raw)
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in expected_tensors(family, family.config_from_hf(raw)).items():
        array = rng.normal(1.0, 0.1, shape) if len(shape) == 1 else rng.normal(size=shape) / np.sqrt(shape[-1])
        tensors[name] = array.astype(np.float32)
    entries = {name: LazyTensor(array.shape, lambda array=array: array) for name, array in tensors.items()}
    return Checkpoint(raw, LazyTensors(entries), None, "tiny", "0" * 64)


def tiny_of(
    raw: Mapping[str, Any], dtype: BaseType = "float32", quantised: Quantise = "none", **fields: Any
) -> tuple[CausalLM, Params]:
    """A model of a ``config.json`` with random weights, as loading makes it; ``fields`` are those of ``CausalLM``."""
    family = family_of(raw)
    config = family.config_from_hf(raw)
    return CausalLM(family, config, **fields), read_params(tiny_checkpoint(raw), family, config, dtype, quantised)
