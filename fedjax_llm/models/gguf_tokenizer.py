"""A tokenizer as the metadata of a GGUF file: the inverse of ``tokenizer.from_gguf_fields``.

A GGUF file names how text is split (``tokenizer.ggml.pre``) and does not say it, so not every ``tokenizer.json`` can be
written as one. Every way that is known here is tried, and the first is taken that gives the same tokens for texts of
all kinds; where none does, the export is refused rather than made wrong.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer, from_gguf_fields

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # values of "tokenizer.ggml.token_type"
_PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2", "gpt-2")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
PROBES = (
    "The patient's 3rd visit, on 12/03/2024, wasn't covered: $1234.56!",
    "  two  spaces, a\ttab\n\nand lines\r\n   indented ",
    "K+ > 5.5 mmol/L; pO₂ 98 %; 37,5 °C; x^2 != 1e-05 -> y_0",
    "naïve Ångström, cafe\u0301, Übelkeit, ВИЧ, 低钾血症, ألم, 🩺🧬",
    "don't DON'T we'll they've I'M it's",
    "I",
)
"""Texts of all kinds: numbers, contractions, white space, symbols, accents (joined and apart), scripts, emoji."""


def tokenizer_fields(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys ``tokenizer.*`` of a GGUF file.

    Args:
      tokenizer: byte-level BPE, or the SentencePiece kind of BPE with bytes as fallback.
      rows: of the model's embedding; ids that the tokenizer does not have become unused tokens.

    Raises:
      UserError: no GGUF file can hold a tokenizer that splits text in this way.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"The model's tokenizer is of the kind {model.get('type')!r}; a GGUF file is written for byte-pair "
            "encodings alone. Take --format=merged"
        )
    common = _common(tokenizer, rows)
    texts = [*PROBES, *(f"a{token}\nb" for token in common["tokenizer.ggml.tokens"][:3])]
    wanted = [tokenizer.encode(text) for text in texts]
    for fields in _candidates(tokenizer, model, common):
        made = from_gguf_fields(fields)
        if [made.encode(text) for text in texts] == wanted:
            return fields
    raise UserError(
        "The model's tokenizer splits text in a way that has no name in GGUF files here (known: "
        f"{', '.join(_PRE_TOKENIZERS)}, and SentencePiece's). Take --format=merged, and llama.cpp's "
        "convert_hf_to_gguf.py on its folder"
    )


def _common(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """What does not depend on how text is split."""
    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    tokens, kinds = [], []
    for index in range(max(rows, tokenizer.vocab_size)):
        token = backend.id_to_token(index)
        if token is None:
            kind, token = _UNUSED, f"[PAD{index}]"
        elif index in added:
            kind = _CONTROL if added[index].special else _USER_DEFINED
        else:
            kind = _NORMAL
        tokens.append(token)
        kinds.append(kind)
    names = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "padding": tokenizer.pad_id}
    # Two more ends of a turn have a place in the format; where there are both, the higher id is the end of a turn.
    names |= dict(zip(("eot", "eom"), sorted(tokenizer.end_ids - {tokenizer.eos_id}, reverse=True), strict=False))
    found = {"tokens": tokens, "token_type": kinds, "add_bos_token": bool(tokenizer.opening)}
    found |= {f"{name}_token_id": index for name, index in names.items() if index is not None}
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()} | template


def _candidates(tokenizer: Tokenizer, model: dict[str, Any], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every way to write this tokenizer, the likelier first."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not model.get("byte_fallback"):
        for pre in _PRE_TOKENIZERS:
            own = {"model": "gpt2", "pre": pre, "merges": merges}
            yield common | {f"tokenizer.ggml.{name}": value for name, value in own.items()}
        return
    tokens, kinds = common["tokenizer.ggml.tokens"], list(common["tokenizer.ggml.token_type"])
    unknown = tokenizer.backend.token_to_id(model.get("unk_token") or "<unk>")
    for index, token in enumerate(tokens):
        if _BYTE_TOKEN.fullmatch(token):
            kinds[index] = _BYTE
    if unknown is not None:
        kinds[unknown] = _UNKNOWN
    own = {"model": "llama", "token_type": kinds, "scores": _scores(tokens, model["merges"])}
    own |= {} if unknown is None else {"unknown_token_id": unknown}
    for prefix in (True, False):
        yield common | {f"tokenizer.ggml.{name}": value for name, value in (own | {"add_space_prefix": prefix}).items()}


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece's scores: what is merged earlier has the higher one; what no merge makes has the lowest."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, place)
    return [-float(rank.get(token, len(merges) + index)) for index, token in enumerate(tokens)]
