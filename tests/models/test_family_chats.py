"""The chats of Gemma, Phi and OLMo: one beginning of text, and an end of every turn that is known to be one."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fedjax_llm.data.chat import encode_example, encode_prompt
from fedjax_llm.data.records import Example, Message
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer, from_folder

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
OLMO_2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Template, special tokens beginning with (bos, eos), the ids of generation_config.json, what ends a turn.
KINDS = {
    "gemma": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), [1, 3], "<end_of_turn>"),
    "gemma without generation_config": (
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        None,
        "<end_of_turn>",
    ),
    "phi-3": (PHI_3, ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), [1, 3, 4], "<|end|>"),
    "phi-3 with one end": (PHI_3, ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), 1, "<|end|>"),
    "phi-4": (PHI_4, (None, "<|im_end|>", "<|im_start|>", "<|im_sep|>", "<|endoftext|>"), None, "<|im_end|>"),
    "olmo-2": (OLMO_2, ("<|endoftext|>", "<|endoftext|>"), None, "<|endoftext|>"),
}
QUESTION, ANSWER = Message("user", "What is a jaw?"), Message("assistant", "A bone.")


def folder_of(kind: str, path: Path) -> Path:
    """A tokenizer of bytes and the special tokens of a family, as its files have them."""
    template, (bos, eos, *others), ends, _ = KINDS[kind]
    special = list(dict.fromkeys(token for token in (bos, eos, *others) if token))
    vocabulary = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": eos, "add_bos_token": True, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if ends is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(kind, tmp_path) -> Tokenizer:
    return from_folder(folder_of(kind, tmp_path))


def test_what_ends_a_turn_is_known(kind, tokenizer):
    _, (_, eos, *_), ends, end = KINDS[kind]
    assert tokenizer.end_ids >= {tokenizer.backend.token_to_id(token) for token in (eos, end)}
    assert tokenizer.end_ids >= ({ends} if isinstance(ends, int) else set(ends or ()))
    inside = {"<start_of_turn>", "<|user|>", "<|im_start|>", "<|im_sep|>", "<bos>", "<s>"}
    assert not tokenizer.end_ids & {tokenizer.backend.token_to_id(token) for token in inside}


def test_an_answer_is_its_text_and_one_end_of_turn(kind, tokenizer):
    encoded = encode_example(Example((QUESTION, ANSWER)), tokenizer, "r")
    answer = encoded.tokens[encoded.prompt_length :].tolist()
    assert answer == [*tokenizer.encode(ANSWER.content), tokenizer.backend.token_to_id(KINDS[kind][3])]


def test_a_chat_begins_with_one_beginning_of_text_where_the_template_has_one(kind, tokenizer):
    ids = encode_prompt([QUESTION], tokenizer)
    template, (bos, *_), *_ = KINDS[kind]
    begins = "bos_token" in template
    assert (ids[0] == tokenizer.bos_id) == begins
    if bos:
        assert ids.count(tokenizer.backend.token_to_id(bos)) == int(begins)


def test_what_is_saved_is_read_again_with_its_ends(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "again")
    again = from_folder(tmp_path / "again")
    assert (again.end_ids, again.eos_id, again.bos_id) == (tokenizer.end_ids, tokenizer.eos_id, tokenizer.bos_id)
    assert encode_prompt([QUESTION], again) == encode_prompt([QUESTION], tokenizer)


def test_a_base_model_of_gemma_begins_with_its_beginning_of_text_too(tmp_path):
    folder = folder_of("gemma", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = from_folder(folder)
    assert encode_prompt([QUESTION], tokenizer)[0] == tokenizer.bos_id == 0


def test_a_template_without_system_turns_says_so(tmp_path):
    tokenizer = from_folder(folder_of("gemma", tmp_path))
    with pytest.raises(UserError, match="no system turn"):
        tokenizer.render([Message("system", "Be brief."), QUESTION], True)
