"""A model written as a GGUF file and read back: the same weights, configuration and tokens."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import tokenizers
from tiny import tiny_folder, tiny_tokenizer
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from fedjax_llm.errors import UserError
from fedjax_llm.models import gguf_tokenizer
from fedjax_llm.models.family import family_of
from fedjax_llm.models.gguf_format import read_gguf, rotate_half_order
from fedjax_llm.models.gguf_tokenizer import PROBES, tokenizer_fields
from fedjax_llm.models.gguf_writer import interleaved_order, write_gguf
from fedjax_llm.models.safetensors_format import read_folder
from fedjax_llm.models.tokenizer import Tokenizer, from_gguf_fields

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5000.0},
    "llama 3 rope": {"rope_scaling": LLAMA3, "rope_theta": 100.0},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "wide heads": {"head_dim": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "more rows than tokens": {"vocab_size": 270},
}


def there_and_back(tmp_path, kind="f32", **overrides):
    before = read_folder(tiny_folder(tmp_path / "model", **overrides))
    write_gguf(before, tmp_path / "out" / "model.gguf", kind)
    return before, read_gguf(tmp_path / "out" / "model.gguf")


@pytest.mark.parametrize("name", KINDS)
def test_weights_and_configuration_come_back(tmp_path, name):
    before, after = there_and_back(tmp_path, **KINDS[name])
    assert set(after.tensors) == set(before.tensors)
    for tensor in before.tensors:
        np.testing.assert_array_equal(after.tensors[tensor], before.tensors[tensor], err_msg=tensor)
    configs = [family_of(one.config).config_from_hf(one.config) for one in (before, after)]
    frequencies = [np.array(config.frequencies) for config in configs]
    np.testing.assert_allclose(*frequencies, rtol=2e-7)
    assert dataclasses.replace(configs[1], frequencies=configs[0].frequencies) == configs[0]


@pytest.mark.parametrize(("kind", "error"), [("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_narrow_types_round_matrices_and_leave_vectors_alone(tmp_path, kind, error):
    before, after = there_and_back(tmp_path, kind)
    for name, wanted in before.tensors.items():
        worst = np.abs(after.tensors[name] - wanted).max()
        assert (worst > 0) == (wanted.ndim > 1), name
        assert worst <= error * np.abs(wanted).max()


def test_the_packages_own_reader_finds_the_file_whole(tmp_path):
    """With another implementation: every tensor, aligned, and the fields that llama.cpp asks for."""
    before, _ = there_and_back(tmp_path, "f16")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = before.tensors["model.layers.1.mlp.down_proj.weight"].astype(np.float16)
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"].data, wanted)
    assert len(found) == len(before.tensors)
    assert reader.get_field("llama.rope.dimension_count").contents() == 8
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_F16
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_row_orders_undo_each_other(shape):
    rows = np.arange(np.prod(shape)).reshape(shape)
    moved = interleaved_order(rows, 3)
    assert not np.array_equal(moved, rows)
    np.testing.assert_array_equal(rotate_half_order(moved, 3), rows)
    np.testing.assert_array_equal(interleaved_order(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


def byte_level(pre):
    """A byte-level tokenizer with a few merges, that splits text in one of the ways that have a name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "th"), ("1", "2"), ("Ċ", "Ċ"), ("'", "t"), ("Ġ", "Ġ"), ("c", "o")]
    tokens = ["<|endoftext|>", "<|im_end|>", *letters, *("".join(merge) for merge in merges), "Ġ[who]", "<tool>"]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3, *[1] * (len(tokens) - 3), 4],
        "merges": [" ".join(merge) for merge in merges],
        "eos_token_id": 1,
        "bos_token_id": 0,
        "padding_token_id": 0,
    }
    return from_gguf_fields({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


def sentencepiece(prefix):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgt", "ab", "▁a", "▁ab", "de"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259, 0, -1)]
    fields = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "add_space_prefix": prefix}
    fields |= {"eos_token_id": 2, "bos_token_id": 1, "unknown_token_id": 0}
    return from_gguf_fields({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


TOKENIZERS = {
    **{pre: byte_level(pre) for pre in ("smollm", "llama-bpe", "qwen2", "gpt-2")},
    "tiny": tiny_tokenizer(),
    "sentencepiece": sentencepiece(True),
    "sentencepiece, no prefix": sentencepiece(False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_come_back(name):
    tokenizer = TOKENIZERS[name]
    fields = tokenizer_fields(tokenizer, tokenizer.vocab_size + 3)
    made = from_gguf_fields(fields)
    for text in [*PROBES, "the thethe 1212 co</s><|im_end|><tool> [who]\n\n\nabab deg"]:
        assert made.encode(text) == tokenizer.encode(text)
        assert made.decode(made.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    for attribute in ("eos_id", "bos_id", "pad_id", "end_ids", "chat_template"):
        assert getattr(made, attribute) == getattr(tokenizer, attribute)
    assert fields["tokenizer.ggml.token_type"][-3:] == [5] * 3


def test_whether_texts_begin_with_a_special_token_is_kept(tmp_path):
    tokenizer = sentencepiece(True)
    assert tokenizer_fields(tokenizer, 10)["tokenizer.ggml.add_bos_token"] is False
    raw = json.loads(tokenizer.backend.to_str())
    begin = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": begin},
    }
    with_begin = dataclasses.replace(tokenizer, backend=tokenizers.Tokenizer.from_str(json.dumps(raw)))
    assert tokenizer_fields(with_begin, 10)["tokenizer.ggml.add_bos_token"] is True


def unknown_split():
    tokenizer = byte_level("gpt-2")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("e"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return dataclasses.replace(tokenizer, backend=backend)


def test_a_tokenizer_without_a_name_in_the_format_is_refused_not_approximated():
    with pytest.raises(UserError, match="has no name in GGUF files"):
        tokenizer_fields(unknown_split(), 300)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    with pytest.raises(UserError, match="'WordLevel'"):
        tokenizer_fields(Tokenizer(words, 0, 0, None, frozenset({0}), None), 2)


def test_a_normalised_tokenizer_is_not_taken_for_one_without():
    tokenizer = byte_level("gpt-2")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.normalizer, backend.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    with pytest.raises(UserError, match="has no name in GGUF files"):
        tokenizer_fields(dataclasses.replace(tokenizer, backend=backend), 300)


def test_what_cannot_be_written_is_told_before_a_file_is_there(tmp_path, monkeypatch):
    before = read_folder(tiny_folder(tmp_path / "model"))
    out = tmp_path / "model.gguf"
    other = dataclasses.replace(before, config={**before.config, "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UserError, match="not for 'GPT2LMHeadModel'"):
        write_gguf(other, out)
    with pytest.raises(UserError, match="no tokenizer"):
        write_gguf(dataclasses.replace(before, tokenizer=None), out)
    windowed = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": True}
    windowed |= {"max_window_layers": 0}
    with pytest.raises(UserError, match="sliding window"):
        write_gguf(dataclasses.replace(before, config={**before.config, **windowed}), out)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_gguf(before, tmp_path / "taken" / "model.gguf")
    monkeypatch.setattr(gguf_tokenizer, "_PRE_TOKENIZERS", ("qwen2",))
    with pytest.raises(UserError, match="has no name"):
        write_gguf(before, out)
    assert not list(tmp_path.glob("*.gguf*"))
