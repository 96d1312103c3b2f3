"""GGUF files (llama.cpp's format), as Hugging Face names, layout and config.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; of the names and of the row order:
``convert_hf_to_gguf.py`` of llama.cpp. The ``gguf`` package dequantises. The header is read here, since its reader
makes an array object of every string and takes six seconds for one vocabulary.
"""

import functools
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.models import tokenizer as tokenizers
from fedjax_llm.models.checkpoint import Checkpoint, LazyTensor, LazyTensors, fingerprint_of

# GGUF architecture -> ("model_type", "architectures") of config.json.
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Stored:
    """A tensor as the file has it: ``shape`` slowest axis first, ``data`` uint8 ``[..., bytes of a row]``."""

    kind: int
    shape: tuple[int, ...]
    data: np.ndarray


def read_gguf(path: Path, source: str | None = None, fingerprint: str | None = None) -> Checkpoint:
    """Opens a GGUF file; tensors are dequantised to float32 when they are accessed.

    The rows of ``attn_q`` and ``attn_k``, which files of the architecture ``llama`` keep in the order of interleaved
    RoPE pairs, are put back into rotate-half order. Llama 3's RoPE scaling, which the format keeps as a tensor of
    divisors of the frequencies, becomes ``{"rope_type": "factors", "factors": [...]}`` in ``config["rope_scaling"]``.

    Args:
      path: the file.
      source: how to call it in messages; the path by default.
      fingerprint: of the file, where it is known already.

    Raises:
      UserError: no GGUF file, a damaged one, or an architecture, tensor, tensor type or tokenizer that is not served.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        fields, stored = _parse(np.asarray(np.memmap(path, mode="r")))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged or no GGUF file ({error}). Download it again.") from error
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{path} has the architecture {architecture!r}; supported in GGUF files: {known}.")
    if fields.get("split.count", 0) > 1:
        raise UserError(
            f"{path} is one part of several: join them with `llama-gguf-split --merge FIRST_PART OUT.gguf`."
        )
    if fields.get(f"{architecture}.expert_count", 0):
        raise UserError(f"{path} is a mixture of experts, which is not supported.")
    _check_types(stored, path)
    config = _config(architecture, fields, stored, path)
    return Checkpoint(
        config=config,
        tensors=LazyTensors(_tensors(architecture, config, stored, path)),
        tokenizer=tokenizers.from_gguf_fields(fields) if "tokenizer.ggml.model" in fields else None,
        source=source or str(path),
        fingerprint=fingerprint or fingerprint_of([path]),
    )


class _Cursor:
    """Reads one value after the other; raises ValueError at the end of the file."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.at = 0

    def take(self, length: int) -> np.ndarray:
        """The next bytes, uint8 ``[length]``, as a view."""
        if self.at + length > len(self.data):
            raise ValueError("it ends too early")
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, form: str) -> Any:
        """The next number, of one of the forms of :mod:`struct`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)).tobytes())[0]

    def string(self) -> str:
        """The next string."""
        return self.take(self.number("Q")).tobytes().decode()

    def value(self, kind: int) -> Any:
        """The next value of a metadata type."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"unknown kind of value {kind}")
        kind, length = self.number("I"), self.number("Q")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(length)]
        form = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return self.take(length * form.itemsize).view(form).tolist()


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata and tensors of a whole file, uint8 ``[bytes]``. Raises ValueError where it is damaged."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    if cursor.take(4).tobytes() != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version} of the format")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(field_count)}
    heads = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        heads.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = fields.get("general.alignment", 32)
    begin = math.ceil(cursor.at / alignment) * alignment
    stored = {}
    for name, (columns, *rows), kind, offset in heads:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if columns % block:
            raise ValueError(f"{name} has rows of {columns}, no multiple of {block}")
        shape, row = tuple(reversed(rows)), columns // block * size
        cursor.at = begin + offset
        stored[name] = _Stored(kind, (*shape, columns), cursor.take(row * math.prod(shape)).reshape(*shape, row))
    return fields, stored


def _check_types(stored: Mapping[str, _Stored], path: Path) -> None:
    """Refuses tensor types that the ``gguf`` package cannot dequantise."""
    from gguf import GGMLQuantizationType

    for name, tensor in stored.items():
        if not _is_supported(tensor.kind):
            known = ", ".join(kind.name for kind in GGMLQuantizationType if _is_supported(kind))
            found = GGMLQuantizationType(tensor.kind).name
            raise UserError(f"Tensor {name!r} in {path} has the type {found}; supported: {known}.")


@functools.cache
def _is_supported(kind: int) -> bool:
    """Whether the package dequantises this type: tried on one block of zeros."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1], np.uint8), GGMLQuantizationType(kind))
    except NotImplementedError:
        return False
    return True


def _dequantised(tensor: _Stored) -> np.ndarray:
    """The values of a tensor, float32, in the tensor's shape."""
    from gguf import GGMLQuantizationType, dequantize

    return dequantize(tensor.data, GGMLQuantizationType(tensor.kind)).astype(np.float32).reshape(tensor.shape)


def _config(architecture: str, fields: Mapping[str, Any], stored: Mapping[str, _Stored], path: Path) -> dict[str, Any]:
    """The metadata in the terms of a Hugging Face ``config.json``."""

    def number(key: str, default: float | None = None) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if isinstance(value, list):  # one for each layer
            value = value[0] if len(set(value)) == 1 else None
        if value is None:
            raise UserError(f"{path} lacks one value for {architecture}.{key}, without which the model is not known.")
        # A float32 such as 1e-5 arrives as 9.999999747378752e-06: its shortest form is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    model_type, name = _ARCHITECTURES[architecture]
    width, heads = number("embedding_length"), number("attention.head_count")
    if not heads or not number("attention.head_count_kv", heads):
        raise UserError(f"{path} is damaged: it says that there are no attention heads. Download it again.")
    head_dim = number("attention.key_length", width // heads)
    if number("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{path} rotates a part of each head only ({architecture}.rope.dimension_count): not supported."
        )
    if "token_embd.weight" not in stored:
        raise UserError(f"{path} lacks the tensor 'token_embd.weight'.")
    config = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": stored["token_embd.weight"].shape[0],
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(architecture, fields, stored),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_gate.bias" in stored,
    }
    if f"{architecture}.attention.sliding_window" in fields:
        config["sliding_window"] = number("attention.sliding_window")
    return config


def _rope_scaling(architecture: str, fields: Mapping[str, Any], stored: Mapping[str, _Stored]) -> dict | None:
    """What the file says about stretched positions, in the terms of ``config["rope_scaling"]``."""
    if _ROPE_FACTORS in stored:
        return {"rope_type": "factors", "factors": _dequantised(stored[_ROPE_FACTORS]).tolist()}
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    factor = fields.get(f"{architecture}.rope.scaling.factor")
    if "rope.scale_linear" in {key.removeprefix(f"{architecture}.") for key in fields}:  # the key of older files
        kind, factor = "linear", fields[f"{architecture}.rope.scale_linear"]
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": factor}
    original = fields.get(f"{architecture}.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _tensors(
    architecture: str, config: Mapping[str, Any], stored: Mapping[str, _Stored], path: Path
) -> dict[str, LazyTensor]:
    """The tensors by Hugging Face names, all of them or an error that names the others."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors, unknown = {}, []
    for name, tensor in stored.items():
        if name == _ROPE_FACTORS:
            continue
        target = _hugging_face_name(name)
        if target is None:
            unknown.append(name)
            continue
        part = target.split(".")[-2]
        permuted = architecture == "llama" and part in heads
        read = functools.partial(_read, tensor, heads[part] if permuted else None)
        tensors[target] = LazyTensor(tensor.shape, read)
    if unknown:
        shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise UserError(f"{path} has tensors that no {architecture} model here knows: {shown}.")
    return tensors


def _hugging_face_name(name: str) -> str | None:
    """E.g. ``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; ``None``: not known."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}" if part in _LAYER_NAMES else None
    part, _, kind = name.rpartition(".")
    return f"{_GLOBAL_NAMES[part]}.{kind}" if part in _GLOBAL_NAMES else None


def _read(tensor: _Stored, heads: int | None) -> np.ndarray:
    """Values, float32; with ``heads`` the rows of each head go from interleaved to rotate-half order."""
    values = _dequantised(tensor)
    return values if heads is None else rotate_half_order(values, heads)


def rotate_half_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes ``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py``.

    In a GGUF file of the architecture ``llama`` rows 2i and 2i+1 of a head are rotated together; in Hugging Face's
    layout rows i and i + head_dim / 2 are.

    Args:
      rows: ``[heads * head_dim, ...]``, a weight or a bias.
      heads: how many heads the rows hold.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
