"""Every algorithm there is: the dataclasses with ``make`` that the files of this room hold."""

import dataclasses
import importlib
import inspect
import pkgutil


def algorithms() -> list[type]:
    """Their classes, in the order of the files' names. Nothing has to be registered."""
    import fedjax_llm.aggregation as room

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
