"""An exported model in transformers, and as a PEFT adapter beside the base: the logits of the run."""

import numpy as np
import pytest
from tiny import tiny_adapters, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedjax_llm.experiment.export import export
from fedjax_llm.experiment.tuned import TunedModel
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
reference = pytest.importorskip("reference")

pytestmark = pytest.mark.parity

KIND = Lora(rank=3, alpha=6.0, targets=("*_proj",))
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
}
SPECIAL = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}


def tuned_of(folder, family="llama", **options):
    base = load(str(tiny_folder(folder, **FAMILIES[family], **SPECIAL)), **options)
    return TunedModel(base, KIND, tiny_adapters(base.model, targets=KIND.targets))


def batch():
    rng = np.random.default_rng(1)
    return reference.padded([rng.integers(3, 259, length) for length in (40, 23)])


def ours(tuned, tokens):
    return reference.our_logits(tuned.base.model, tuned.base.params, tuned.scaled, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_folder_in_transformers(tmp_path, family):
    tuned, (tokens, mask) = tuned_of(tmp_path / "model", family), batch()
    out = export(tuned, tmp_path / "out", "merged")
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.dtype == torch.float32
    reference.assert_close(ours(tuned, tokens), reference.torch_logits(theirs, tokens, mask), mask)
    read = AutoTokenizer.from_pretrained(out)
    text = "Is 12 mg enough?<|im_end|>"
    assert read.encode(text, add_special_tokens=False) == tuned.base.tokenizer.encode(text)
    chat = [{"role": "user", "content": "Why?"}]
    rendered = read.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_a_dequantised_base_in_transformers(tmp_path):
    tuned, (tokens, mask) = tuned_of(tmp_path / "model", quantised="nf4"), batch()
    theirs = AutoModelForCausalLM.from_pretrained(export(tuned, tmp_path / "out", "merged")).eval()
    reference.assert_close(ours(tuned, tokens), reference.torch_logits(theirs, tokens, mask), mask)


def test_the_gguf_file_in_transformers(tmp_path):
    """Transformers has a reader of GGUF files of its own, with a permutation of its own."""
    tuned, (tokens, mask) = tuned_of(tmp_path / "model"), batch()
    out = export(tuned, tmp_path / "model.gguf", "gguf", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32).eval()
    reference.assert_close(ours(tuned, tokens), reference.torch_logits(theirs, tokens, mask), mask)


def test_the_adapter_alone_in_peft(tmp_path):
    tuned, (tokens, mask) = tuned_of(tmp_path / "model"), batch()
    export(tuned, tmp_path / "adapter", "peft")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    reference.assert_close(ours(tuned, tokens), reference.torch_logits(theirs, tokens, mask), mask)
