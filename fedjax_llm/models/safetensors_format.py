"""Model folders as Hugging Face lays them out: config.json, safetensors (one file or shards), tokenizer files."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.models import tokenizer as tokenizers
from fedjax_llm.models.checkpoint import Checkpoint, LazyTensor, LazyTensors, fingerprint_of
from fedjax_llm.models.json_files import read_object

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_FLOATS = ("F32", "F16", "BF16", "F64")


def read_folder(folder: Path, source: str | None = None) -> Checkpoint:
    """Opens a model folder; tensors are read (as float32) when they are accessed.

    Args:
      folder: with ``config.json`` and ``*.safetensors``; tokenizer files are optional.
      source: how to call it in messages; the folder by default.

    Raises:
      UserError: files are missing, unreadable, of a kind that is not served, or do not fit each other.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(_no_config(folder))
    config = read_object(config_path)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"The weights in {folder} are quantised ({method}), which is not supported in safetensors files.\n"
            "Use the model's unquantised repository, or a GGUF file of it."
        )
    shards = _shards(folder)
    return Checkpoint(
        config=config,
        tensors=LazyTensors(_tensors(shards)),
        tokenizer=tokenizers.from_folder(folder) if any((folder / n).is_file() for n in _TOKENIZER_FILES) else None,
        source=source or str(folder),
        fingerprint=fingerprint_of([config_path, *shards]),
    )


def _shards(folder: Path) -> list[Path]:
    """The weight files: those of the index, else ``model.safetensors``, else all there are. Sorted by name."""
    index = folder / _INDEX
    if index.is_file():
        content = read_object(index)
        if not isinstance(content.get("weight_map"), dict):
            raise UserError(f"{index} has no weight_map. Download it again.")
        names = sorted(set(content["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing)}.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    shards = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if not shards:
        raise UserError(_no_weights(folder))
    return shards


def _tensors(shards: list[Path]) -> dict[str, LazyTensor]:
    """The tensors of all shards by name."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, LazyTensor] = {}
    for path in shards:
        try:
            file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file ({error}). Download it again.") from error
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name in tensors:
                raise UserError(f"The tensor {name!r} is in {path} and in another file of the folder as well.")
            part = file.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                known = ", ".join(_FLOATS)
                raise UserError(f"Tensor {name!r} in {path} has the type {part.get_dtype()}; supported: {known}.")
            tensors[name] = LazyTensor(tuple(part.get_shape()), functools.partial(_read, file, name))
    return tensors


def _read(file: Any, name: str) -> np.ndarray:
    """One tensor of an open file, float32."""
    return np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)


def _no_config(folder: Path) -> str:
    """What to say of a folder without config.json."""
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{folder} holds GGUF files ({', '.join(ggufs)}): give the path of one of them."
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a model: give the model that it was trained on."
    return f"{folder} has no config.json, so it is no model folder{nearest('config.json', _names(folder))}"


def _no_weights(folder: Path) -> str:
    """What to say of a folder without safetensors."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return (
            f"{folder} has its weights as PyTorch files only (.bin, .pth), which can run code and are not read.\n"
            "Take a revision with *.safetensors, or convert with transformers and torch: "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`."
        )
    return (
        f"{folder} has no *.safetensors files, and no other weights are read{nearest('*.safetensors', _names(folder))}"
    )


def _names(folder: Path) -> list[str]:
    """The names in a folder."""
    return [path.name for path in folder.iterdir()]
