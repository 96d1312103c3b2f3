"""The pages of the public modules name what is there, and leave none of these rooms' algorithms out."""

import importlib
import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs/api").glob("*.md"))
NAMED = sorted({name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)})


def found(dotted: str) -> object:
    """The module, or what a module holds under the last name."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", NAMED)
def test_what_a_page_names_is_there_and_documented(name: str):
    value = found(name)
    whole = hasattr(value, "__path__")  # a room: its files have docstrings, as tests/test_structure.py sees to
    assert whole or value.__doc__


def test_pages_lead_to_pages():
    index = (PAGES[0].parent / "index.md").read_text("utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert linked == {page.name for page in PAGES} - {"index.md"}
