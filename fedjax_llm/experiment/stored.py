"""The experiment of a finished run, from its ``config.json``: for all that is asked of a run afterwards."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedjax_llm
from fedjax_llm import config
from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError
from fedjax_llm.runs import directory

_ROOMS = ("aggregation", "adversaries", "compression", "data", "evaluation", "federation", "models", "privacy", "runs")
_MORE = ("secure", "training")


def experiment_of(run: Path) -> Experiment:
    """The experiment that a run's folder holds.

    Raises:
      UserError: the folder is no run, or its configuration names a class that this project does not have (a source of
        your own, say: give the run's configuration file then) or other fields than it has here.
    """
    path = run / directory.CONFIG
    if not path.is_file():
        raise UserError(f"{run} is not the folder of a run (it has no {directory.CONFIG}); experiments.run makes one")
    return from_json(directory.read_json(path), str(path))


def from_json(stored: Mapping[str, Any], place: str = "config.json") -> Experiment:
    """The experiment of which ``config.to_json`` gave this.

    Args:
      stored: nested dictionaries, each with the name of its class.
      place: named in errors.

    Raises:
      UserError: as for :func:`experiment_of`.
    """
    found = _value(stored, place)
    if not isinstance(found, Experiment):
        raise UserError(f"{place} does not hold an Experiment")
    config.check(found)
    return found


def _value(stored: Any, place: str) -> Any:
    """A part of a configuration: dataclasses by their names, tuples for lists."""
    if isinstance(stored, list):
        return tuple(_value(inner, place) for inner in stored)
    if not isinstance(stored, Mapping):
        return stored
    fields = {key: _value(inner, place) for key, inner in stored.items() if key != "class"}
    if "class" not in stored:
        return fields
    kind = _classes().get(stored["class"])
    if kind is None:
        raise UserError(
            f"{place} holds a {stored['class']}, which is no class of this project; give the configuration file that "
            "the run was started with, by --config"
        )
    unknown = set(fields) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise UserError(
            f"{place} was written by another version: {stored['class']} has no {', '.join(sorted(unknown))} here"
        )
    try:
        return kind(**fields)
    except TypeError as error:  # a field without a default is missing, or holds a value of another type
        raise UserError(f"{place} does not fit this version's {stored['class']}: {error}") from error


@functools.cache
def _classes() -> dict[str, type]:
    """The dataclasses that configurations are made of, by name."""
    found: dict[str, type] = {}
    modules = [importlib.import_module(f"fedjax_llm.{name}") for name in ("config", "lora", "mesh")]
    for room in (*_ROOMS, *_MORE):
        package = importlib.import_module(f"{fedjax_llm.__name__}.{room}")
        names = [info.name for info in pkgutil.iter_modules(package.__path__, package.__name__ + ".")]
        modules += [importlib.import_module(name) for name in names]
    for module in modules:
        for name, value in vars(module).items():
            if is_part(value) and value.__module__ == module.__name__:
                found.setdefault(name, value)
    return found


def is_part(value: Any) -> bool:
    """Whether this is a class that a configuration may hold: a frozen dataclass, which Flax's modules are not."""
    return inspect.isclass(value) and getattr(getattr(value, "__dataclass_params__", None), "frozen", False)
