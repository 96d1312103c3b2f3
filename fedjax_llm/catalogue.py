"""What there is in a room of one thing a file: nothing has to be registered to be found."""

import dataclasses
import importlib
import inspect
import pkgutil
from types import ModuleType


def makers(room: ModuleType) -> list[type]:
    """The dataclasses with ``make`` that the files of a room define, in the order of the files' names.

    Args:
      room: a package, such as ``fedjax_llm.aggregation``.
    """
    found = []
    for info in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        module = importlib.import_module(info.name)
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and value.__module__ == module.__name__ and dataclasses.is_dataclass(value)
            if hasattr(value, "make")
        ]
    return found
