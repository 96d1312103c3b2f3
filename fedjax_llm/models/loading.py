"""From a name to a model that runs: the right family, every weight in its place, nothing silently left over."""

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fedjax_llm.assets import cache_dir
from fedjax_llm.errors import UserError
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.checkpoint import Checkpoint, LazyTensors
from fedjax_llm.models.family import Family, Weight, family_of, weight_tree
from fedjax_llm.models.quantised import Quantise, quantise
from fedjax_llm.models.tokenizer import Tokenizer
from fedjax_llm.types import Params

BaseType = Literal["float32", "bfloat16"]

_CONVERSION = 1
"""Raised whenever conversion gives other numbers or another tokenizer, so that no stale copy is read."""
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.(attention|attn)\.(masked_)?bias)$")
"""Tensors that old files carry and that are computed here: rotary frequencies, and causal masks with their filling."""
_HEADS = {"lm_head.weight", "embed_out.weight"}
"""Output layers, which files of tied models may hold as a second copy of the embedding."""


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen pre-trained model.

    Attributes:
      model: its pure functions.
      params: its weights, on the default device.
      tokenizer: of the same checkpoint.
      name: as the user named it.
      fingerprint: of the weights; a run that is resumed must find the same.
      size: how many parameters.
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    name: str
    fingerprint: str
    size: int


def load(name: str, dtype: BaseType = "float32", quantised: Quantise = "none") -> BaseModel:
    """The base model called ``name``: a built-in name, a hub id, a folder or a ``.gguf`` file.

    Args:
      name: see ``sources.open_checkpoint``.
      dtype: of the weights, and so of the activations.
      quantised: how the matrices within layers are stored; embeddings, norms and biases have ``dtype``.

    Raises:
      UserError: unknown, unreachable, unsupported, damaged or incomplete.
    """
    from fedjax_llm.models.sources import BUILT_IN, open_checkpoint

    checkpoint = open_checkpoint(name)
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.source} has no tokenizer; put its tokenizer.json beside the weights")
    family = family_of(checkpoint.config)
    config = family.config_from_hf(checkpoint.config)
    if name in BUILT_IN or name.endswith(".gguf"):
        checkpoint = converted(checkpoint)
    params = read_params(checkpoint, family, config, dtype, quantised)
    return BaseModel(
        model=CausalLM(family, config),
        params=params,
        tokenizer=_checked_tokenizer(checkpoint, config),
        name=name,
        fingerprint=checkpoint.fingerprint + ("" if quantised == "none" else f", {quantised}"),
        size=sum(int(np.prod(shape)) for shape in expected_tensors(family, config).values()),
    )


def read_params(
    checkpoint: Checkpoint, family: Family, config: Any, dtype: BaseType, quantised: Quantise = "none"
) -> Params:
    """The parameter tree of a checkpoint; every tensor is read exactly once.

    Raises:
      UserError: tensors are missing, left over or misshapen; their names are listed.
    """
    expected = expected_tensors(family, config)
    checkpoint = replace(checkpoint, tensors=_full_names(checkpoint.tensors, expected))
    check_names(checkpoint, expected, config)

    def read(weight: Weight, layer: int | None) -> Any:
        name = weight.name.format(layer=layer)
        array = checkpoint.tensors[name]
        array = array.T if weight.transpose else array
        if quantised != "none" and weight.path[-1] == "kernel":
            return quantise(array, quantised, dtype, name)
        return jnp.asarray(array, dtype)

    return weight_tree(family, config, read)


def check_names(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Compares a checkpoint's tensors with what the family expects.

    Raises:
      UserError: naming the missing, the left-over and the misshapen tensors.
    """
    found: LazyTensors = checkpoint.tensors
    spare = {name for name in found if _IGNORED.search(name)}
    if config.tied:
        spare |= _HEADS
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected) - spare)
    misshapen = [
        f"{name} is {list(found.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found.shape(name)) != shape
    ]
    faults = [
        f"{len(names)} {kind}: " + ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        for kind, names in (("missing", missing), ("not known to the family", extra), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise UserError(f"The tensors of {checkpoint.source} do not fit its config.json. " + "; ".join(faults))


def expected_tensors(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """What a family wants of a file: Hugging Face name -> shape, as it stands there.

    Args:
      family: of the model.
      config: of the model.
    """

    def names(weight: Weight) -> Sequence[str]:
        if "{layer}" not in weight.name:
            return [weight.name]
        return [weight.name.format(layer=layer) for layer in range(config.layers)]

    return {name: weight.shape for weight in family.weights(config) for name in names(weight)}


def _full_names(tensors: LazyTensors, expected: Mapping[str, tuple[int, ...]]) -> LazyTensors:
    """The tensors by the names of the whole model: in files of one without its head, the first part is missing."""
    whole = next(name for name in expected if name not in _HEADS).split(".")[0]

    def full(name: str) -> str:
        longer = f"{whole}.{name}"
        return longer if longer in expected and longer not in tensors else name

    return LazyTensors({full(name): tensor for name, tensor in tensors.entries.items()})


def _checked_tokenizer(checkpoint: Checkpoint, config: Any) -> Tokenizer:
    """The tokenizer, whose ids must all have an embedding."""
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokenizer of {checkpoint.source} has {tokenizer.vocab_size} tokens but the model embeds only "
            f"{config.vocab_size}; they are not of the same model"
        )
    return tokenizer


def converted(checkpoint: Checkpoint) -> Checkpoint:
    """A quantised checkpoint as a folder of f32 safetensors in the cache, written once and read by mapping after.

    Raises:
      UserError: the disk is full, or the cache cannot be written.
    """
    from fedjax_llm.models.safetensors_format import read_folder

    folder = converted_folder(checkpoint.fingerprint)
    if not (folder / "config.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="converting-", dir=folder.parent) as scratch:
                save_folder(checkpoint, Path(scratch) / "model")
                (Path(scratch) / "model").rename(folder)
        except OSError as error:
            if not (folder / "config.json").exists():  # else another process was quicker
                raise UserError(f"{folder} cannot be written: {error}") from error
    return replace(read_folder(folder), source=checkpoint.source, fingerprint=checkpoint.fingerprint)


def converted_folder(fingerprint: str) -> Path:
    """Where the conversion of a quantised checkpoint is kept; another way of converting has another place."""
    return cache_dir() / "converted" / f"{fingerprint[:32]}-{_CONVERSION}"


def save_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes ``config.json``, ``model.safetensors`` (f32) and the tokenizer, as Hugging Face libraries read them.

    Raises:
      UserError: the folder cannot be written, or the disk is full; says how much is needed.
    """
    import json

    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    needed = sum(4 * math.prod(checkpoint.tensors.shape(name)) for name in checkpoint.tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tensors = {name: np.ascontiguousarray(checkpoint.tensors[name], np.float32) for name in checkpoint.tensors}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps(dict(checkpoint.config), indent=2))
    except (OSError, SafetensorError) as error:  # the library wraps what the system says in an error of its own
        size = f"{needed / 2**20:.0f} MiB"
        raise UserError(f"The converted model ({size}) cannot be written to {folder}: {error}") from error
