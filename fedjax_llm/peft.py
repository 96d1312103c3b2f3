"""Adapters in the format of PEFT, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT keeps ``lora_A`` as [R, in] and ``lora_B`` as [out, R], unscaled, and computes ``x W' + (alpha / R) x A' B'``:
ours, transposed, however the adapted matrix itself is stored. LoRA, rsLoRA and DoRA are read; a variant that computes
something else is refused by name.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import CausalLM, module_paths
from fedjax_llm.models.json_files import read_object
from fedjax_llm.types import Adapters

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE = re.compile(r"base_model\.model\.(.+?)\.(\d+\..+)\.lora_[AB]\.weight")
"""What a factor belongs to: the list of layers, and the layer's number with the module within."""
_FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}

_REFUSED = {
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules beside the adapters",
    "trainable_token_indices": "trained embeddings",
    "rank_pattern": "ranks that differ between modules",
    "alpha_pattern": "scalings that differ between modules",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Fields of the configuration that, where set, make an adapter compute something else than plain LoRA."""

_INITS = {"true": "kaiming", "false": "kaiming", "gaussian": "gaussian", "orthogonal": "kaiming", "eva": "kaiming"}
"""PEFT's initialisations that leave the base weights alone -> the nearest of ours (of no effect on trained factors)."""


Read = Callable[[Path], bytes]
"""The content of a file, which an encrypted run has to decrypt first."""
Seal = Callable[[Path, bytes], bytes]
"""What a file is to hold for a content."""


class Naming(NamedTuple):
    """What Hugging Face calls a model's adapted modules.

    Attributes:
      layers: the list of layers, e.g. ``model.layers`` or ``transformer.h``.
      fan_in_fan_out: whether files keep the matrices as [in, out].
    """

    layers: str = "model.layers"
    fan_in_fan_out: bool = False

    def tensor(self, path: str, factor: str) -> str:
        """The name of a factor (``a``, ``b`` or ``m``) of a module ``layers.N.module``."""
        return f"base_model.model.{self.module(path)}.{_FACTORS[factor]}"

    def module(self, path: str) -> str:
        """The name of a module ``layers.N.module``."""
        return f"{self.layers}.{path.removeprefix('layers.')}"


def naming_of(model: CausalLM) -> Naming:
    """The names and the layout of the matrices in the weight table of a model."""
    table = model.family.weights(model.config)
    names = {".".join(weight.path[:-1]): weight for weight in table if weight.path[-1] == "kernel"}
    found = {
        Naming(names[path].name.removesuffix(f".{{layer}}.{path}.weight"), not names[path].transpose)
        for path in model.family.projections(model.config)
    }
    (naming,) = found
    return naming


def write_adapter(
    folder: Path,
    adapters: Adapters,
    lora: Lora,
    base_model: str,
    model: CausalLM,
    seal: Seal | None = None,
) -> None:
    """Writes adapters as PEFT reads them: float32, for the base model's original weights.

    The two files are complete or absent: a folder that is interrupted while being written is refused by the readers.

    Args:
      folder: made where it is missing; an adapter in it is replaced, other files are left alone.
      adapters: factors ``a`` [in, R] and ``b`` [R, out], not scaled.
      lora: what they were made with.
      base_model: name or path of the model that they belong to; PEFT loads it on request.
      model: that model, whose files say what PEFT calls its modules.
      seal: encrypts the files, which PEFT then cannot read; ``None``: they are in clear.

    Raises:
      UserError: the folder cannot be written.
      ValueError: there are no adapters, a factor has another shape, or layers differ in what they adapt.
    """
    from safetensors.numpy import save

    naming, tensors = naming_of(model), {}
    for path, factors in adapters.items():
        a, b = (np.asarray(factors[name], np.float32) for name in ("a", "b"))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != lora.rank or b.shape[0] != lora.rank:
            raise ValueError(f"{path}: a {a.shape} and b {b.shape} are no factors of rank {lora.rank}")
        tensors[naming.tensor(path, "a")] = np.ascontiguousarray(a.T)
        tensors[naming.tensor(path, "b")] = np.ascontiguousarray(b.T)
        if lora.dora:
            tensors[naming.tensor(path, "m")] = np.asarray(factors["m"], np.float32)
    if not tensors:
        raise ValueError("there are no adapters to write")
    modules, layers = _grid(adapters)
    if len(adapters) != len(modules) * len(layers):
        raise ValueError("layers_to_transform can only say that every layer adapts the same modules")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "layers_to_transform": layers if lora.layers else None,
        "init_lora_weights": "gaussian" if lora.init == "gaussian" else True,
        "bias": "none",
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "fan_in_fan_out": naming.fan_in_fan_out,
        "inference_mode": True,
    }
    files = {_WEIGHTS: save(tensors, {"format": "pt"}), _CONFIG: json.dumps(config, indent=2).encode()}
    if seal is not None:
        files = {name: seal(folder / name, content) for name, content in files.items()}
    _replace(folder, files)


def read_adapter(folder: Path, read: Read = Path.read_bytes) -> tuple[Lora, Adapters]:
    """Reads a PEFT adapter of LoRA, rank-stabilised or not, or of DoRA.

    Args:
      folder: of the adapter.
      read: gives the content of its files.

    Returns:
      What made it, with exact module paths as targets, and its factors in float32, unscaled.

    Raises:
      UserError: files are missing or damaged, the adapter is not plain LoRA, or tensors are missing, left over or
        misshapen; their names are listed.
    """
    return _read_adapter(folder, read, None)


def _read_adapter(folder: Path, read: Read, naming: Naming | None) -> tuple[Lora, Adapters]:
    """The same, of a model with these names; ``None``: with those that are found."""
    config = _read_config(folder, read)
    lora = _plain_lora(config, folder / _CONFIG)
    targets, named = _declared(config, folder / _CONFIG)
    tensors = _read_weights(folder, read)
    lists = {match[1]: None for match in map(_MODULE.fullmatch, tensors) if match}
    if naming is None:
        naming = Naming(next(iter(lists))) if lists else Naming()
    elif lists and naming.layers not in lists:
        raise UserError(
            f"The adapter in {folder} adapts {', '.join(lists)}, but the model's layers are {naming.layers}; "
            "it was made for another kind of model"
        )
    names = [name for name in tensors if lora.dora and name.endswith(f".{_FACTORS['m']}")]
    magnitudes = {name: tensors.pop(name) for name in names}
    paths = _check_tensors(folder, tensors, targets, named, lora.rank, naming)
    absent = [name for path in paths if lora.dora and (name := naming.tensor(path, "m")) not in magnitudes]
    _raise_faults(folder, absent, [], [])
    adapters: Adapters = {
        path: {factor: jnp.asarray(tensors[naming.tensor(path, factor)].T) for factor in ("a", "b")} for path in paths
    }
    if lora.dora:
        for path, factors in adapters.items():
            factors["m"] = jnp.asarray(magnitudes[naming.tensor(path, "m")])
    modules, layers = _grid(paths)
    all_layers = not named and not isinstance(targets, str) and not any(re.search(r"(^|\.)\d+\.", n) for n in targets)
    return replace(lora, targets=tuple(modules), layers=() if all_layers else tuple(layers)), adapters


def read_adapter_for(folder: Path, model: CausalLM, read: Read = Path.read_bytes) -> tuple[Lora, Adapters]:
    """Reads a PEFT adapter as the starting point of training ``model``.

    Raises:
      UserError: as :func:`read_adapter`, or the adapter does not fit the model; modules and shapes are listed.
    """
    lora, adapters = _read_adapter(folder, read, naming_of(model))
    sizes = module_paths(model)
    known = {_within(path) for path in sizes}
    unknown = [module for module in lora.targets if module not in known]
    if unknown:
        raise UserError(
            f"The adapter in {folder} adapts {unknown[0]!r}, which the model lacks{nearest(unknown[0], known)}"
        )
    layers, count = sorted({_layer(path) for path in adapters}), model.config.layers
    if layers[-1] >= count:
        raise UserError(f"The adapter in {folder} adapts layer {layers[-1]}; the model has layers 0 to {count - 1}.")
    if not lora.layers and len(layers) < count:
        raise UserError(f"The adapter in {folder} has tensors for {len(layers)} layers, but the model has {count}.")
    misshapen = [
        f"{path} maps {found[0]} to {found[1]}, not {sizes[path][0]} to {sizes[path][1]}"
        for path, factors in adapters.items()
        if (found := (factors["a"].shape[0], factors["b"].shape[1])) != sizes[path]
    ]
    _raise_faults(folder, [], [], misshapen)
    ordered = {path: adapters[path] for path in sizes if path in adapters}
    return replace(lora, layers=() if len(layers) == count else tuple(layers)), ordered


def _plain_lora(config: Mapping[str, Any], path: Path) -> Lora:
    """The configuration without targets and layers; refuses what is not plain LoRA."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise UserError(f"{path} describes an adapter of type {kind!r}; only 'LORA' is supported.")
    for field, what in _REFUSED.items():
        if config.get(field):
            raise UserError(f"{path} sets {field} ({what}), which is not supported: only plain LoRA is read.")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path} has trained biases (bias {config['bias']!r}), which are not supported.")
    if str(start).lower() not in _INITS:
        raise UserError(
            f"{path} has init_lora_weights {start!r}, which alters the base model's weights. Convert the adapter with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) first."
        )
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        return Lora(
            rank=rank,
            alpha=alpha,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            init="gaussian" if _INITS[str(start).lower()] == "gaussian" else "kaiming",
        )
    except KeyError as missing:
        raise UserError(f"{path} has no field {missing}; is it a complete PEFT adapter?") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has an impossible r, lora_alpha or lora_dropout: {error}") from None
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _declared(config: Mapping[str, Any], path: Path) -> tuple[str | list[str], list[int]]:
    """``target_modules``, a pattern or a list, and the layers that are named beside it; empty where none are."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not targets or not (isinstance(targets, str) or all(isinstance(name, str) for name in targets)):
        raise UserError(f"{path} has no usable target_modules: {targets!r}. It should be a list of module names.")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"{path} has target_modules {targets!r}, which is no valid pattern: {error}") from None
    layers = [layers] if isinstance(layers, int) else layers or []
    if not all(isinstance(layer, int) for layer in layers):
        raise UserError(f"{path} has layers_to_transform {layers!r}. It should be a list of layer numbers.")
    return targets, layers


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    targets: str | list[str],
    named: list[int],
    rank: int,
    naming: Naming,
) -> list[str]:
    """The adapted module paths, layer by layer, each with its two factors; lists what does not fit."""
    matches = {name: match for name in tensors if (match := _MODULE.fullmatch(name)) and match[1] == naming.layers}
    path_of = {name: f"layers.{match[2]}" for name, match in matches.items()}
    found = sorted(set(path_of.values()), key=_by_layer)
    modules = {path: naming.module(path) for path in found if not named or _layer(path) in named}
    known = [path for path, module in modules.items() if _is_declared(module, targets)]
    extra = [name for name in tensors if path_of.get(name) not in known]
    wanted = {targets: targets} if isinstance(targets, str) else {target: [target] for target in targets}
    unmet = [name for name, one in wanted.items() if not any(_is_declared(modules[path], one) for path in known)]
    missing = [f"all of {name!r}" for name in unmet]
    within, layers = _grid(known)
    paths = [f"layers.{layer}.{module}" for layer in sorted({*layers, *named}) for module in within]
    misshapen = []
    for path in paths:
        for factor, axis in (("a", 0), ("b", 1)):
            name = naming.tensor(path, factor)
            if name not in tensors:
                missing.append(name)
            elif tensors[name].ndim != 2 or tensors[name].shape[axis] != rank:
                misshapen.append(f"{name} is {list(tensors[name].shape)}, not of rank {rank}")
    _raise_faults(folder, missing, extra, misshapen)
    return paths


def _is_declared(module: str, targets: str | Sequence[str]) -> bool:
    """Whether ``target_modules`` covers a module, as PEFT decides it: by a whole path or its end, or by a pattern."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _grid(paths: Iterable[str]) -> tuple[list[str], list[int]]:
    """The modules and the layers that occur in the paths, each once."""
    paths = list(paths)
    return list(dict.fromkeys(map(_within, paths))), sorted(set(map(_layer, paths)))


def _layer(path: str) -> int:
    """``layers.3.mlp.up_proj`` -> 3."""
    return int(path.split(".", 2)[1])


def _within(path: str) -> str:
    """``layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    return path.split(".", 2)[2]


def _by_layer(path: str) -> tuple[int, str]:
    """Sorts layer 10 after layer 9."""
    return _layer(path), path


def _raise_faults(folder: Path, missing: list[str], extra: list[str], misshapen: list[str]) -> None:
    """Lists what does not fit, if anything."""
    kinds = (("missing", missing), ("no LoRA factors of target_modules", extra), ("misshapen", misshapen))
    faults = [
        f"{len(names)} {kind}: " + ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        for kind, names in kinds
        if names
    ]
    if faults:
        raise UserError(
            f"The tensors of the adapter in {folder} do not fit. " + "; ".join(faults) + ".\n"
            "Every adapted layer must adapt the same modules, and nothing else may be trained."
        )


def _read_config(folder: Path, read: Read) -> dict[str, Any]:
    """The JSON object of ``adapter_config.json``."""
    path = folder / _CONFIG
    if not path.is_file():
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{folder} has no {_CONFIG}, so it is no PEFT adapter{nearest(_CONFIG, names)}")
    return read_object(path, read)


def _read_weights(folder: Path, read: Read) -> dict[str, np.ndarray]:
    """The tensors as float32."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = folder / _WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder} has its weights as adapter_model.bin only, which can run code and is not read.\n"
                "Save it again with PEFT: `model.save_pretrained(NEW_FOLDER, safe_serialization=True)`."
            )
        raise UserError(f"{folder} has no {_WEIGHTS}; the adapter is incomplete.")
    try:
        tensors = {name: array.astype(np.float32) for name, array in sorted(load(read(path)).items())}
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}).") from error
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise UserError(f"{path} holds values that are not finite, in {', '.join(broken[:6])}.")
    return tensors


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replaces files in the order given. The last one is removed first, so that old and new never stand together."""
    last = folder / list(files)[-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / f"{name}.partial").write_bytes(content)
        last.unlink(missing_ok=True)
        for name in files:
            (folder / f"{name}.partial").replace(folder / name)
    except OSError as error:
        raise UserError(f"The adapter cannot be written to {folder}: {error}") from error
