"""Text to tokens and back, and chats to text. From ``tokenizer.json`` or from the metadata of a GGUF file."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedjax_llm.errors import UserError
from fedjax_llm.models.json_files import read_object

if TYPE_CHECKING:
    import jinja2
    import tokenizers

#: For tokenizers without a chat template (base models): a plain question-and-answer text. It starts with the
#: beginning-of-text token where there is one; each answer ends with the end-of-text token.
FALLBACK_TEMPLATE = (
    "{{ bos_token if bos_token is defined }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ '### Question:\n' + message.content + '\n' }}"
    "{% else %}{{ '### Answer:\n' + message.content + eos_token + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)

# What splits text before byte-pair merges, by the names that GGUF files give (key "tokenizer.ggml.pre").
# The patterns are those of the tokenizer.json of Llama 3 and of Qwen2.
_SPLITS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2", "gpt-2", "default")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of "tokenizer.ggml.token_type"
# Control tokens that end a turn, in the families served here; files name only some of them.
_END_TOKENS = {
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"),
    *("<end_of_turn>", "<|end|>"),  # Gemma, Phi
}


class Turn(Protocol):
    """One turn of a chat, as the template sees it."""

    @property
    def role(self) -> str:
        """``system``, ``user`` or ``assistant``."""
        ...

    @property
    def content(self) -> str:
        """The text."""
        ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    Attributes:
      backend: does the splitting.
      eos_id: end of text (of a turn, in chat models).
      pad_id: fills up rows; the end of text where the model has no token of its own for it.
      bos_id: beginning of text, or ``None``.
      end_ids: every token after which generation stops; ``eos_id`` is among them.
      chat_template: Jinja source; ``None``: :data:`FALLBACK_TEMPLATE` is used.
    """

    backend: "tokenizers.Tokenizer"
    eos_id: int
    pad_id: int
    bos_id: int | None
    end_ids: frozenset[int]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included. The model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    @property
    def opening(self) -> tuple[int, ...]:
        """What the model expects before a text that is no chat: its beginning-of-text token, or nothing."""
        first = self.backend.encode("a").ids[:1]
        return (self.bos_id,) if self.bos_id is not None and first == [self.bos_id] else ()

    def encode(self, text: str) -> list[int]:
        """Token ids. Special tokens that stand in the text become one id each; none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones shown."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def render(self, messages: Sequence[Turn], add_generation_prompt: bool) -> str:
        """A chat as the text that the model was trained on.

        Args:
          messages: the turns, first to last.
          add_generation_prompt: also open the assistant's next turn.

        Raises:
          UserError: the template cannot be read, or refuses these messages (an order of roles, say).
        """
        import jinja2

        names = {"eos_token": self.eos_id, "pad_token": self.pad_id, "bos_token": self.bos_id}
        special = {name: self.backend.id_to_token(i) for name, i in names.items() if i is not None}
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            template = _compiled(self.chat_template or FALLBACK_TEMPLATE)
            given = {"messages": turns, "add_generation_prompt": add_generation_prompt}
            return template.render(given | special | {"tools": None, "documents": None})
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"The chat template does not take these messages (roles: {roles}): {error}") from error

    def save(self, folder: Path) -> None:
        """Writes the files that :func:`from_folder` (and ``transformers``) reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        names = {"eos_token": self.eos_id, "pad_token": self.pad_id, "bos_token": self.bos_id}
        config: dict[str, Any] = {name: None if i is None else self.backend.id_to_token(i) for name, i in names.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "generation_config.json", {"eos_token_id": sorted(self.end_ids)})


def from_folder(folder: Path) -> Tokenizer:
    """Reads ``tokenizer.json`` with its companions, as a Hugging Face model folder has them.

    The special tokens are those of ``tokenizer_config.json`` (else ``special_tokens_map.json``), the template that of
    ``chat_template.jinja`` (else of ``tokenizer_config.json``: the one named ``default`` where there are several),
    and the tokens that end a turn also those of ``generation_config.json``, and those known ones that the template
    writes.

    Raises:
      UserError: no ``tokenizer.json``, an unreadable file, or no end-of-text token.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"There is no tokenizer.json in {folder}.\nWhere there is a tokenizer.model or a vocab.json instead, "
            "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of transformers makes one of it."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    ends = generation.get("eos_token_id")
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    eos = _special_id(backend, config.get("eos_token"), path)
    if eos is None and not ends:
        raise UserError(f"No end-of-text token is known for {path}: set eos_token in tokenizer_config.json.")
    eos = ends[0] if eos is None else eos
    pad = _special_id(backend, config.get("pad_token"), path)
    template = _chat_template(folder, config)
    written = [backend.token_to_id(token) for token in _END_TOKENS if token in (template or "")]
    return Tokenizer(
        backend=backend,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        bos_id=_special_id(backend, config.get("bos_token"), path),
        end_ids=frozenset([eos, *ends, *(i for i in written if i is not None)]),
        chat_template=template,
    )


def from_gguf_fields(fields: Mapping[str, Any]) -> Tokenizer:
    """Rebuilds a tokenizer from GGUF metadata (the keys ``tokenizer.*`` of the GGUF specification).

    Served are byte-level BPE (``gpt2``) with the pre-tokenizers of SmolLM, Llama 3, Qwen2 and GPT-2, and the
    SentencePiece kind of BPE (``llama``) of Llama 2 and Mistral.

    Raises:
      UserError: another kind of tokenizer, or fields are missing.
    """
    import tokenizers

    missing = [key for key in ("model", "tokens", "token_type") if f"tokenizer.ggml.{key}" not in fields]
    kind = fields.get("tokenizer.ggml.model")
    if missing or kind not in ("gpt2", "llama"):
        what = f"lacks tokenizer.ggml.{missing[0]}" if missing else f"has a tokenizer of the kind {kind!r}"
        raise UserError(f"The GGUF file {what}; supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE).")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    backend = _byte_level_bpe(fields) if kind == "gpt2" else _sentencepiece_bpe(fields)
    pairs = list(zip(tokens, types, strict=True))
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t, kind in pairs if kind in (_UNKNOWN, _CONTROL)]
    )
    backend.add_tokens(
        [tokenizers.AddedToken(t, special=False, normalized=False) for t, kind in pairs if kind == _USER_DEFINED]
    )

    def special(name: str) -> int | None:
        return fields.get(f"tokenizer.ggml.{name}_token_id")

    eos = special("eos")
    if eos is None:
        raise UserError("The GGUF file names no end-of-text token (tokenizer.ggml.eos_token_id).")
    pad = special("padding")
    named = {i for i, (t, kind) in enumerate(pairs) if kind == _CONTROL and t in _END_TOKENS}
    return Tokenizer(
        backend=backend,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        bos_id=special("bos"),
        end_ids=frozenset({eos} | {i for i in (special("eot"), special("eom")) if i is not None} | named),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _byte_level_bpe(fields: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """GPT-2's kind of BPE, over bytes written as letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"The GGUF file's tokenizer splits text in the way {pre!r} (tokenizer.ggml.pre); supported: "
            f"{', '.join(_PRE_TOKENIZERS)}. The same model as a folder with tokenizer.json and safetensors works."
        )
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", ())]
    # Llama 3 takes a word that is in the vocabulary whole, even where the merges do not lead to it.
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """SentencePiece's kind of BPE: merges in the order of the pieces' scores, spaces as U+2581, bytes as fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None:
        raise UserError("The GGUF file lacks tokenizer.ggml.scores, which its tokenizer ('llama') needs.")
    # SentencePiece joins, again and again, the neighbours whose joint piece scores highest. Merges are looked up by
    # pair, so every way to cut a piece into two pieces is one merge with the rank of the piece.
    types = fields["tokenizer.ggml.token_type"]
    by_score = sorted((i for i in range(len(tokens)) if types[i] == _NORMAL), key=lambda i: -scores[i])
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in by_score
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in vocab and tokens[i][cut:] in vocab
    ]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def _special_id(backend: "tokenizers.Tokenizer", token: str | Mapping[str, Any] | None, path: Path) -> int | None:
    """The id of a special token, which the files give as text or as an object with its text in ``content``."""
    text = token["content"] if isinstance(token, Mapping) else token
    if text is None:
        return None
    found = backend.token_to_id(text)
    if found is None:
        raise UserError(f"The special token {text!r} of tokenizer_config.json is not in {path}.")
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a model folder."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default", next(iter(named.values()), None))
    return template


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> "jinja2.Template":
    """Compiles a template in the environment that chat templates are written for (that of ``transformers``)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what the assistant says: here it only passes it through."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own way)

        def parse(self, parser: Parser) -> Node | list[Node]:
            """The body of the tag."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    # A template comes with a model, from anybody: it runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    own = {"raise_exception": refuse}  # no strftime_now: a date in every prompt would make each day's tokens others
    return environment.from_string(source, globals=own)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_object(path) if path.is_file() else {}


def _write_json(path: Path, value: Any) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
