"""A model as one GGUF file, which llama.cpp, Ollama and LM Studio load: the inverse of ``gguf_format.read_gguf``.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The names of tensors and the bytes of a
file are the ``gguf`` package's. A file is written tensor by tensor, so that no more than one of them is held.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.models.checkpoint import Checkpoint
from fedjax_llm.models.family import family_of
from fedjax_llm.models.gguf_tokenizer import tokenizer_fields

if TYPE_CHECKING:
    from gguf import GGUFWriter

GgufType = Literal["f32", "f16", "bf16"]
"""Of matrices; vectors (norms, biases) are f32 in every file, as llama.cpp wants them."""

# "architectures" of config.json -> the architecture in a GGUF file.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def write_gguf(
    checkpoint: Checkpoint, path: Path, kind: GgufType = "f16", advance: Callable[[int], None] = lambda count: None
) -> None:
    """Writes weights, configuration, tokenizer and chat template; the file is complete or absent.

    The rows of the query and key matrices of the architecture ``llama`` go from rotate-half to interleaved order, and
    stretched rotary frequencies become a tensor of divisors or a linear factor.

    Args:
      checkpoint: of a family that GGUF files are written of here: Llama, Mistral, Qwen2, Qwen3.
      path: of the file; one that is there is replaced.
      kind: of the matrices.
      advance: called with how many more tensors are written.

    Raises:
      UserError: another family, a tokenizer that the format does not know, or the file cannot be written.
    """
    name = (checkpoint.config.get("architectures") or [""])[0]
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"GGUF files are written for {known}, not for {name!r}. Take --format=merged")
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.source} has no tokenizer; a GGUF file needs one")
    config = family_of(checkpoint.config).config_from_hf(checkpoint.config)
    architecture, base = _ARCHITECTURES[name], _rope_base(checkpoint.config)
    if config.window is not None and architecture != "llama":
        raise UserError(f"{name} with a sliding window cannot be written as a GGUF file here. Take --format=merged")
    from gguf import GGUFWriter

    partial = path.with_name(path.name + ".part")
    writer = GGUFWriter(None, architecture)
    divisors = base ** -(np.arange(0, config.head_dim, 2) / config.head_dim) / np.asarray(config.frequencies)
    _add_fields(writer, config, base, divisors)
    writer.add_name(Path(checkpoint.source).stem)
    for key, value in tokenizer_fields(checkpoint.tokenizer, config.vocab_size).items():
        _add(writer, key, value)
    tensors = _tensors(checkpoint, architecture, config, divisors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(writer, partial, tensors, kind, advance)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()
        with suppress(OSError):
            partial.unlink()


def interleaved_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of ``gguf_format.rotate_half_order``: rows i and i + head_dim / 2 of a head become neighbours.

    Args:
      rows: ``[heads * head_dim, ...]``, a weight or a bias.
      heads: how many heads the rows hold.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _rope_base(raw: Mapping[str, Any]) -> float:
    """``rope_theta``, wherever a ``config.json`` has it."""
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return float(raw.get("rope_theta") or nested.get("rope_theta") or 10000.0)


def _is_linear(divisors: np.ndarray) -> bool:
    """Whether all frequencies are divided by the same number."""
    return bool(np.allclose(divisors, divisors[0], rtol=1e-6))


def _add_fields(writer: "GGUFWriter", config: Any, base: float, divisors: np.ndarray) -> None:
    """What describes the model's shape."""
    from gguf import RopeScalingType

    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_rope_freq_base(base)
    writer.add_vocab_size(config.vocab_size)
    if config.window is not None:
        writer.add_sliding_window(config.window)
    if _is_linear(divisors) and not math.isclose(divisors[0], 1.0, rel_tol=1e-6):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(np.float32(divisors[0])))


def _add(writer: "GGUFWriter", key: str, value: Any) -> None:
    """A field by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


Tensor = tuple[tuple[int, ...], Callable[[], np.ndarray]]
"""Its shape, and what reads it."""


def _tensors(checkpoint: Checkpoint, architecture: str, config: Any, divisors: np.ndarray) -> dict[str, Tensor]:
    """Every tensor of the file by its name in GGUF files."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(one for one, name in MODEL_ARCH_NAMES.items() if name == architecture)
    assert isinstance(arch, MODEL_ARCH)
    names, heads = get_tensor_name_map(arch, config.layers), {"q_proj": config.heads, "k_proj": config.kv_heads}
    found: dict[str, Tensor] = {}
    if not _is_linear(divisors):
        found["rope_freqs.weight"] = (divisors.shape, lambda: divisors)
    for name in checkpoint.tensors:
        if name == "lm_head.weight" and config.tied:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise UserError(f"the tensor {name!r} of {checkpoint.source} has no name in GGUF files")
        part = name.split(".")[-2]
        count = heads.get(part) if architecture == "llama" else None
        found[written] = (checkpoint.tensors.shape(name), _reader(checkpoint, name, count))
    return found


def _reader(checkpoint: Checkpoint, name: str, heads: int | None) -> Callable[[], np.ndarray]:
    """Reads a tensor, with its rows in the file's order."""
    if heads is None:
        return lambda: checkpoint.tensors[name]
    return lambda: interleaved_order(checkpoint.tensors[name], heads)


def _write(
    writer: "GGUFWriter", path: Path, tensors: Mapping[str, Tensor], kind: GgufType, advance: Callable[[int], None]
) -> None:
    """Writes the whole file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quantize

    wide = GGMLQuantizationType.F32
    matrix, whole = {
        "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }[kind]
    writer.add_file_type(whole)
    types = {name: matrix if len(shape) > 1 else wide for name, (shape, _) in tensors.items()}
    for name, (shape, _) in tensors.items():
        size = GGML_QUANT_SIZES[types[name]][1] * math.prod(shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, read) in tensors.items():
        writer.write_tensor_data(quantize(np.ascontiguousarray(read(), np.float32), types[name]))
        advance(1)
