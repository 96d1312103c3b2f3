"""A tuned model for other programs: merged into its base as a folder or a GGUF file, or as a PEFT adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm import lora, peft
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.tuned import TunedModel
from fedjax_llm.models.checkpoint import Checkpoint
from fedjax_llm.models.export import tensors_of
from fedjax_llm.models.gguf_writer import GgufType, write_gguf
from fedjax_llm.models.loading import save_folder
from fedjax_llm.models.quantised import is_quantised
from fedjax_llm.models.sources import open_checkpoint

Format = Literal["merged", "gguf", "peft"]
_OTHER_TYPES = ("torch_dtype", "quantization_config")


def export(
    tuned: TunedModel,
    out: Path,
    form: Format,
    kind: GgufType = "f16",
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Writes the model.

    Args:
      tuned: base and adapter.
      out: a folder that is absent or empty; for ``gguf`` a file that is absent, or a folder to put ``model.gguf`` into.
      form: ``merged``: a folder that transformers loads (f32 safetensors); ``gguf``: one file; ``peft``: the adapter.
      kind: type of the matrices of a GGUF file.
      advance: called with how many more tensors of a GGUF file are written.

    Returns:
      What was written.

    Raises:
      UserError: something is in the way, there is no adapter for ``peft``, or the model has no such form.
    """
    if form == "gguf" and out.suffix != ".gguf":
        out = out / "model.gguf"
    _refuse_taken(out)
    if form == "peft":
        if tuned.kind is None or not tuned.adapters:
            raise UserError("the base model alone has no adapter to export; take --format=merged or --format=gguf")
        peft.write_adapter(out, tuned.adapters, tuned.kind, tuned.base.name, tuned.base.model)
    elif form == "gguf":
        write_gguf(merged(tuned), out, kind, advance)
    else:
        checkpoint = merged(tuned)
        if ((checkpoint.config.get("rope_scaling") or {}).get("rope_type")) == "factors":
            raise UserError(
                f"{tuned.base.name} keeps its rotary scaling as a tensor, which a config.json has no place for. Take "
                "--format=gguf, or tune the model's own folder instead of a GGUF file"
            )
        save_folder(checkpoint, out)
    return out


def merged(tuned: TunedModel) -> Checkpoint:
    """The model as one checkpoint in float32, its adapter merged into the weights tensor by tensor.

    A base that is quantised is dequantised first: the adapter was trained beside what the codes stand for, so merging
    it into the original weights would be another model.

    Raises:
      UserError: the base model's configuration cannot be read again.
    """
    base, factors = tuned.base, tuned.scaled
    config = {key: value for key, value in open_checkpoint(base.name).config.items() if key not in _OTHER_TYPES}

    def with_adapter(path: str, kernel: Array) -> Array:
        return _merged_kernel(kernel, factors[path]) if path in factors else kernel

    return Checkpoint(
        config=config | {"dtype": "float32"},
        tensors=tensors_of(base.model, base.params, with_adapter),
        tokenizer=base.tokenizer,
        source=base.name,
        fingerprint=base.fingerprint,
    )


def has_codes(tuned: TunedModel) -> bool:
    """Whether the base is quantised."""
    return any(map(is_quantised, jax.tree.leaves(tuned.base.params, is_leaf=is_quantised)))


def _merged_kernel(kernel: Array, factors: Any) -> Array:
    """One weight [in, out] with scaled factors merged in, in float32."""
    path = "layers.0.one"
    alone = lora.merge({"layers": ({"one": {"kernel": jnp.asarray(kernel)}},)}, {path: factors}, 1.0)
    return lora.kernel_of(alone, path)


def _refuse_taken(out: Path) -> None:
    """Refuses to write over what is there."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already and is not touched; give a place that is absent or empty")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is neither a file nor a folder; give another place")
