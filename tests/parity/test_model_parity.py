"""Our logits and tokenizer against transformers', within 1e-4 in float32."""

import numpy as np
import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedjax_llm import assets
from fedjax_llm.data.records import Message
from fedjax_llm.models.gguf_format import read_gguf

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama-2": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama-3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-3-tied": LlamaConfig(**SIZES | {"tie_word_embeddings": True}, rope_parameters=LLAMA3),
    "llama-linear-rope": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": LlamaConfig(**SIZES, head_dim=20),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "mistral-no-window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen2-window-unused": Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=7),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-biases": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
}
TEXTS = [
    "Hello world",
    " in 2024, 12345 x  \n\n  tabs\t\tend ",
    "<|im_start|>user\nWhat's up?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café Σίσυφος 日本語 العربية 😀👩‍👩‍👧 Ünïcode e\u0301",
    "def f(x):\r\n    return x**2 # 3.14e-10\r\n",
    " don't I'LL we've HbA1c>6.5% (p<0.001)",
    " ",
    "",
    "   leading and trailing   ",
    "<repo_name>x<|im_end><|im_end|><|endoftext|>",
]


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, tmp_path):
    theirs = reference.random_model(KINDS[kind])
    theirs.save_pretrained(tmp_path)
    model, params = reference.ours_of(tmp_path)
    rng = np.random.default_rng(1)
    tokens, mask = reference.padded([rng.integers(0, 97, length) for length in (40, 40, 23, 1)])
    reference.assert_close(
        reference.our_logits(model, params, {}, tokens), reference.torch_logits(theirs, tokens, mask), mask
    )


def test_logits_of_a_sharded_folder_in_bfloat16(tmp_path):
    reference.random_model(KINDS["qwen3"]).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, params = reference.ours_of(tmp_path)
    tokens, mask = reference.padded([np.arange(40)])
    reference.assert_close(
        reference.our_logits(model, params, {}, tokens), reference.torch_logits(theirs, tokens, mask), mask
    )


# The real model.


@pytest.mark.model
def test_smollm2_logits(smollm2, smollm2_in_torch, medical_chats):
    base, _ = smollm2
    tokens, mask = reference.padded(medical_chats)
    reference.assert_deep_model_close(base.model, base.params, {}, smollm2_in_torch, tokens, mask)


@pytest.mark.model
def test_smollm2_tokenizer_and_template(smollm2):
    base, folder = smollm2
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = base.tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert base.tokenizer.decode(ids) == theirs.decode(ids)
    assert (base.tokenizer.eos_id, base.tokenizer.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    user, assistant = Message("user", "What is a hand?\n"), Message("assistant", " A part. ")
    for turns in ([user], [Message("system", "Be brief."), user], [user, assistant, user]):
        plain = [{"role": turn.role, "content": turn.content} for turn in turns]
        for opened in (False, True):
            expected = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=opened)
            assert base.tokenizer.render(turns, opened) == expected


@pytest.mark.model
def test_smollm2_as_transformers_reads_the_gguf_file():
    path = assets.fetch(assets.SMOLLM2)
    ours = read_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert [ours.tokenizer.encode(text) for text in TEXTS] == [
        tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS
    ]
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights = dict(theirs.named_parameters())
    assert set(weights) == set(ours.tensors)
    for name, weight in weights.items():
        np.testing.assert_array_equal(ours.tensors[name], weight.detach().numpy(), err_msg=name)
    assert theirs.config.rope_parameters["rope_theta"] == ours.config["rope_theta"]
    assert np.float32(theirs.config.rms_norm_eps) == np.float32(ours.config["rms_norm_eps"])
