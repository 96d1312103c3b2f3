"""A base model with an adapter, opened from a run's folder or by name: for all that is asked of it afterwards."""

from dataclasses import dataclass
from pathlib import Path

from fedjax_llm import lora, peft
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel, BaseType, load
from fedjax_llm.models.quantised import Quantise
from fedjax_llm.runs import directory, encryption
from fedjax_llm.types import Adapters


@dataclass(frozen=True, eq=False)
class TunedModel:
    """A model as it is evaluated, asked or exported.

    Attributes:
      base: the frozen model.
      kind: of the adapter; ``None`` for the base model alone.
      adapters: its factors, not scaled; ``{}`` for the base model alone.
      system: the system message that it was trained with, or ``None``.
    """

    base: BaseModel
    kind: Lora | None = None
    adapters: Adapters | None = None
    system: str | None = None

    @property
    def scaled(self) -> Adapters:
        """The factors as the model takes them."""
        return {} if self.kind is None else lora.scaled(self.adapters or {}, self.kind.scaling)


def open_run(run: Path, base_alone: bool = False) -> TunedModel:
    """Loads the model and the adapter of a run's folder.

    Args:
      run: the folder.
      base_alone: leave the adapter out; then a run without one can be opened, too.

    Raises:
      UserError: the folder is no run, has no adapter, its model cannot be loaded, or its key is missing or another.
    """
    path = run / directory.CONFIG
    if not path.is_file():
        raise UserError(f"{run} is not the folder of a run (it has no {directory.CONFIG}); experiments.run makes one")
    config = directory.read_json(path)
    adapter = None if base_alone else run / "adapter"
    if adapter is not None and not adapter.is_dir():
        raise UserError(_why_no_adapter(run, config.get("setting")))
    try:
        model, system = config["model"], config["data"]["system"]
        name, dtype, quantise = model["name"], model["dtype"], model.get("quantise", "none")
    except (KeyError, TypeError) as missing:
        raise UserError(f"{path} is not the configuration of a run: {missing} is missing") from None
    return open_model(name, adapter, dtype, quantise, system)


def open_model(
    name: str,
    adapter: Path | None = None,
    dtype: BaseType = "float32",
    quantise: Quantise = "none",
    system: str | None = None,
) -> TunedModel:
    """Loads a model by name, with the PEFT adapter of a folder if one is given.

    Args:
      name: built-in name, hub id, folder or ``.gguf`` file.
      adapter: folder of a PEFT adapter, or the ``adapter`` of a run, encrypted or not.
      dtype: of the weights.
      quantise: how the matrices are stored.
      system: the system message that it was trained with.

    Raises:
      UserError: the model or the adapter cannot be loaded, they do not fit, or a key is missing or another.
    """
    if adapter is None:
        return TunedModel(load(name, dtype, quantise), system=system)
    if not adapter.is_dir():
        raise UserError(f"There is no folder {adapter}; an adapter is a folder with adapter_config.json")
    encryption.vault_of(adapter)  # a missing key is told before the model is loaded
    base = load(name, dtype, quantise)
    kind, adapters = peft.read_adapter_for(adapter, base.model, encryption.read)
    return TunedModel(base, kind, adapters, system)


def _why_no_adapter(run: Path, setting: str | None) -> str:
    """What to tell of a run without an adapter."""
    if setting == "base":
        return f"{run} evaluated the base model alone (--setting=base): it has no adapter"
    if setting == "local":
        return f"{run} trained every site for itself (--setting=local): it has no adapter of all sites"
    return f"{run} has no adapter yet; it is written when the run ends: let it end, or go on with --resume"
