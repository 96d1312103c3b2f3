"""The examples in docstrings, run as they stand."""

import doctest
import importlib
from pathlib import Path

import pytest

import fedjax_llm

PACKAGE = Path(fedjax_llm.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if "    >>> " in path.read_text("utf-8"))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_examples_show_what_happens(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path))  # no figure of another version
    dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(dotted))
    assert result.attempted > 0
    assert result.failed == 0, "the differences are in the captured output"


def test_examples_are_found():
    found = {path.stem for path in WITH_EXAMPLES}
    assert {"clipping", "accounting", "calibration", "lora", "partition", "packing", "server_optimizer"} <= found


def test_a_wrong_example_would_fail():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1
