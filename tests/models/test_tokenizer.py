"""Tokenizers built from GGUF metadata and from folders."""

import json
import unicodedata
from dataclasses import dataclass

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from fedjax_llm import assets
from fedjax_llm.errors import UserError
from fedjax_llm.models.gguf_format import read_gguf
from fedjax_llm.models.tokenizer import FALLBACK_TEMPLATE, from_folder, from_gguf_fields

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "12 3", "123 4", "Ġ a", "i n"]


@dataclass(frozen=True)
class Said:
    role: str
    content: str


CHAT = [Said("system", "Be brief."), Said("user", "What is a\nhand?"), Said("assistant", "A part of the body.")]


def byte_level_fields(pre: str = "smollm", **changed) -> dict:
    """A small byte-level tokenizer; ``changed`` replaces fields (None removes one)."""
    tokens = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES), "whole", "<tool>"]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 4) + [4],
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    fields = {f"tokenizer.ggml.{key}": value for key, value in (fields | changed).items() if value is not None}
    return fields | {"tokenizer.chat_template": CHATML}


def pieces(tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2", "default"])
@given(text=st.text())
def test_any_text_comes_back(pre, text):
    tokenizer = from_gguf_fields(byte_level_fields(pre))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_qwen2_composes_letters(text):
    tokenizer = from_gguf_fields(byte_level_fields("qwen2"))
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("gpt-2", ["1234"]),
    ],
)
def test_digits_are_split_as_the_model_expects(pre, expected):
    assert pieces(from_gguf_fields(byte_level_fields(pre)), "1234") == expected


def test_words_are_split_before_they_are_merged():
    tokenizer = from_gguf_fields(byte_level_fields("smollm"))
    assert pieces(tokenizer, "in a") == ["in", "Ġa"]
    assert pieces(tokenizer, "a 1") == ["a", "Ġ", "1"]


def test_smollm_is_the_upstream_definition():
    backend = json.loads(from_gguf_fields(byte_level_fields("smollm")).backend.to_str())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert backend["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
    }
    assert backend["normalizer"] is None
    assert backend["model"]["unk_token"] is None


def test_llama_3_takes_known_words_whole():
    assert pieces(from_gguf_fields(byte_level_fields("llama-bpe")), "whole") == ["whole"]
    assert pieces(from_gguf_fields(byte_level_fields("gpt-2")), "whole") == list("whole")


def test_special_tokens():
    tokenizer = from_gguf_fields(byte_level_fields())
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>") == [1, 2, 0]
    assert pieces(tokenizer, "a<tool>b<|im_end|>") == ["a", "<tool>", "b", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("a<tool>b<|im_end|>")) == "a<tool>b<|im_end|>"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.end_ids == {0, 2}
    assert tokenizer.vocab_size == len(byte_level_fields()["tokenizer.ggml.tokens"])
    other = from_gguf_fields(byte_level_fields(padding_token_id=0, eot_token_id=5, bos_token_id=None))
    assert (other.bos_id, other.pad_id, other.end_ids) == (None, 0, {0, 2, 5})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "t5"}, "kind 't5'; supported: 'gpt2'"),
        ({"tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        ({"eos_token_id": None}, "names no end-of-text token"),
        ({"pre": "falcon"}, "'falcon'.*supported: smollm, llama-bpe, qwen2, gpt-2, default"),
        ({"model": "llama"}, r"lacks tokenizer\.ggml\.scores"),
    ],
)
def test_what_is_not_served_is_named(changed, message):
    with pytest.raises(UserError, match=message):
        from_gguf_fields(byte_level_fields(**changed))


# SentencePiece: pieces over a small alphabet with random scores, against the algorithm in its plainest form.

PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "ca", "cab", "bca", "aa", "▁abc"]


def sentencepiece_fields(scores: list[float], **changed) -> dict:
    raw = [f"<0x{i:02X}>" for i in range(256)]
    fields = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *raw, *PIECES],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "scores": [0.0] * 259 + scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changed).items()}


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """Joins the best-scoring pair of neighbours, the leftmost among equals, until none is a piece."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joints = [
            (scores[parts[i] + parts[i + 1]], -i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in scores
        ]
        if not joints:
            return parts
        at = -max(joints)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(text=st.text("abc ", min_size=1), scores=st.permutations(range(len(PIECES))))
def test_sentencepiece_merges_by_score(text, scores):
    tokenizer = from_gguf_fields(sentencepiece_fields([-float(score) for score in scores]))
    expected = sentencepiece(text, {piece: -score for piece, score in zip(PIECES, scores, strict=True)})
    assert pieces(tokenizer, text) == expected


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_sentencepiece_text_comes_back(text):
    tokenizer = from_gguf_fields(sentencepiece_fields([-float(i) for i in range(len(PIECES))]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_without_prefix_and_with_bytes():
    scores = [-float(i) for i in range(len(PIECES))]
    tokenizer = from_gguf_fields(sentencepiece_fields(scores, add_space_prefix=False))
    assert pieces(tokenizer, "ab") == ["ab"]
    assert pieces(tokenizer, "é</s>") == ["<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" é</s>")) == " é</s>"
    assert tokenizer.end_ids == {2}


# Chat templates.


def with_template(template: str | None):
    return from_gguf_fields(byte_level_fields() | {"tokenizer.chat_template": template})


def test_render_is_exactly_the_template():
    tokenizer = with_template(CHATML)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a\nhand?<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    assert tokenizer.render(CHAT[:2], add_generation_prompt=True) == prompt
    assert tokenizer.render(CHAT, add_generation_prompt=False) == prompt + "A part of the body.<|im_end|>\n"


def test_fallback_template():
    tokenizer = with_template(None)
    prompt = "<|im_start|>Be brief.\n\n### Question:\nWhat is a\nhand?\n### Answer:\n"  # this one's bos is <|im_start|>
    assert tokenizer.render(CHAT[:2], add_generation_prompt=True) == prompt
    assert tokenizer.render(CHAT, add_generation_prompt=False) == prompt + "A part of the body.<|im_end|>\n"
    without_bos = from_gguf_fields(byte_level_fields(bos_token_id=None) | {"tokenizer.chat_template": None})
    assert without_bos.render(CHAT[:1], add_generation_prompt=False) == "Be brief.\n\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "does not take these messages"),
        ("{{ raise_exception('Roles must alternate') }}", r"\(roles: system, user, assistant\): Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_templates_that_fail(template, message):
    with pytest.raises(UserError, match=message):
        with_template(template).render(CHAT, add_generation_prompt=False)


TEMPLATES = [
    CHATML,
    FALLBACK_TEMPLATE,
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ bos_token }}[INST] {{ m.content | trim }} [/INST]\n"
    "  {% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}\n{% endfor %}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} é<&> {{ tools is defined and tools }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers_does(tmp_path, template):
    from transformers import PreTrainedTokenizerFast

    tokenizer = with_template(template)
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [vars(said) for said in CHAT]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render(CHAT, prompt) == expected
        assert tokenizer.encode(expected) == theirs(expected, add_special_tokens=False)["input_ids"]


def test_no_template_sees_the_date():
    tokenizer = with_template("{{ strftime_now('%Y') if strftime_now is defined else 'a fixed date' }}")
    assert tokenizer.render(CHAT, False) == "a fixed date"


# Folders.


@given(text=st.text())
@settings(max_examples=30)
def test_save_and_read_again(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = from_gguf_fields(byte_level_fields(padding_token_id=0))
    tokenizer.save(folder)
    again = from_folder(folder)
    text += "<|im_end|><tool> 12"
    assert again.encode(text) == tokenizer.encode(text)
    for name in ("eos_id", "pad_id", "bos_id", "end_ids", "chat_template", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name), name


@pytest.fixture
def folder(tmp_path):
    from_gguf_fields(byte_level_fields()).save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    return tmp_path


def configure(folder, name="tokenizer_config.json", **content):
    (folder / name).write_text(json.dumps(content))


def test_special_tokens_of_a_folder(folder):
    configure(folder, eos_token={"content": "<|im_end|>", "lstrip": False})
    plain = from_folder(folder)
    assert (plain.eos_id, plain.pad_id, plain.bos_id, plain.end_ids) == (2, 2, None, {2})
    configure(folder, "special_tokens_map.json", bos_token="<|im_start|>", eos_token="<|endoftext|>")
    configure(folder, "generation_config.json", eos_token_id=[2, 0])
    mapped = from_folder(folder)
    assert (mapped.eos_id, mapped.bos_id, mapped.end_ids) == (2, 1, {0, 2})
    configure(folder)
    configure(folder, "special_tokens_map.json")
    configure(folder, "generation_config.json", eos_token_id=0)
    assert from_folder(folder).eos_id == 0


def test_templates_of_a_folder(folder):
    configure(folder, eos_token="<|im_end|>", chat_template="one")
    assert from_folder(folder).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    configure(folder, eos_token="<|im_end|>", chat_template=named)
    assert from_folder(folder).chat_template == "three"
    configure(folder, eos_token="<|im_end|>", chat_template=named[:1])
    assert from_folder(folder).chat_template == "two"
    (folder / "chat_template.jinja").write_text("four")
    assert from_folder(folder).chat_template == "four"


def test_truncation_and_padding_are_switched_off(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert len(from_folder(folder).encode("b c d")) == 5


def test_damaged_folders(folder):
    configure(folder, eos_token="<eos>")
    with pytest.raises(UserError, match=r"special token '<eos>' .* is not in"):
        from_folder(folder)
    configure(folder)
    with pytest.raises(UserError, match="No end-of-text token"):
        from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not valid JSON"):
        from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json .*(?s:.*)save_pretrained"):
        from_folder(folder)


# The real one.


@pytest.fixture(scope="module")
def smollm2():
    tokenizer = read_gguf(assets.fetch(assets.SMOLLM2)).tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.mark.model
def test_smollm2(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("Hello world") == [19556, 905]
    assert pieces(smollm2, "in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is a hand?<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [Said("user", "What is a hand?"), Said("assistant", "A part.")]
    assert smollm2.render(chat[:1], add_generation_prompt=True) == prompt
    assert smollm2.render(chat, add_generation_prompt=False) == prompt + "A part.<|im_end|>\n"
    ids = smollm2.encode(prompt)
    assert ids.count(1) == 3
    assert ids.count(2) == 2


@pytest.mark.model
@given(text=st.text())
def test_smollm2_text_comes_back(smollm2, text):
    # The model's vocabulary lacks some bytes (control characters, the highest planes of Unicode), and drops them.
    known = {token for token in BYTES if smollm2.backend.token_to_id(token) is not None}
    lost = {byte for byte, letter in byte_letters().items() if letter not in known}
    text = "".join(c for c in text if not lost & set(c.encode()))
    assert smollm2.decode(smollm2.encode(text)) == text


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for 256, 257, ..."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}
