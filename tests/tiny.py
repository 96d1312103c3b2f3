"""Small random models and adapters, for tests that need a model but not a meaningful one."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from fedjax_llm import lora
from fedjax_llm.lora import Lora
from fedjax_llm.models import llama
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.family import Weight, weight_tree
from fedjax_llm.models.llama import LlamaConfig, rotary_frequencies
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.tokenizer import Tokenizer, from_gguf_fields
from fedjax_llm.types import Adapters, Params

ALL = ("*_proj",)
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


@cache
def tiny_model(
    *, seed: int = 0, dropout: float = 0.0, remat: str = "none", **overrides: Any
) -> tuple[CausalLM, Params]:
    """A Llama of two layers with random weights; ``overrides`` are fields of ``LlamaConfig``."""
    sizes = {"vocab_size": 97, "width": 32, "mlp_width": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
    fields = {"epsilon": 1e-5, "context": 512} | sizes | overrides
    fields.setdefault("frequencies", rotary_frequencies(fields["head_dim"], 10000.0, None))
    config = LlamaConfig(**fields)
    rng = np.random.default_rng(seed)

    def drawn(weight: Weight, layer: int | None) -> Any:
        array = _random(rng, weight.shape)
        return jnp.asarray(array.T if weight.transpose else array)

    params = weight_tree(llama.FAMILY, config, drawn)
    return CausalLM(llama.FAMILY, config, dropout, remat), params


def tiny_adapters(
    model: CausalLM, *, seed: int = 1, rank: int = 3, targets: tuple[str, ...] = ALL, leading: tuple[int, ...] = ()
) -> Adapters:
    """Random factors, neither of them zero; ``leading`` axes (rows or clients) all hold different ones."""
    rng, found = np.random.default_rng(seed), {}
    for path, (fan_in, fan_out) in lora.target_modules(Lora(rank, targets=targets), model).items():
        a = rng.normal(size=(*leading, fan_in, rank)) / np.sqrt(fan_in)
        b = rng.normal(size=(*leading, rank, fan_out)) / np.sqrt(rank)
        found[path] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return found


@cache
def tiny_tokenizer() -> Tokenizer:
    """A token a byte, and ChatML's special tokens (vocabulary 259)."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * 256,
        "merges": [],
        "eos_token_id": 2,
    }
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return from_gguf_fields(
        {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | {"tokenizer.chat_template": template}
    )


@cache
def tiny_base(**overrides: Any) -> BaseModel:
    """A tiny model with its tokenizer, as ``loading.load`` gives one; ``overrides`` as for :func:`tiny_model`."""
    tokenizer = tiny_tokenizer()
    model, params = tiny_model(vocab_size=tokenizer.vocab_size, **overrides)
    return BaseModel(model, params, tokenizer, "tiny", "0" * 64, sum(leaf.size for leaf in jax.tree.leaves(params)))


def tiny_folder(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Writes a tiny model with :func:`tiny_tokenizer` as Hugging Face libraries write one; gives the folder.

    ``overrides`` are fields of ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = HF_CONFIG | {"vocab_size": tiny_tokenizer().vocab_size} | overrides
    config, rng, tensors = llama.config_from_hf(raw), np.random.default_rng(seed), {}
    for weight in llama.weights(config):
        names = {weight.name.format(layer=layer) for layer in range(config.layers)}
        tensors |= {name: _random(rng, weight.shape) for name in sorted(names)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    tiny_tokenizer().save(folder)
    return folder


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Matrices that keep the scale of what they multiply; vectors around one."""
    if len(shape) == 1:
        return rng.normal(1.0, 0.1, shape).astype(np.float32)
    return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
