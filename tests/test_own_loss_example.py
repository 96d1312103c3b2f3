"""The script in examples/ and what the pages show of it, run as they stand."""

import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
HEADING = "## As a library\n"


def test_the_readme_shows_the_example_as_it_is():
    _, _, section = (ROOT / "README.md").read_text("utf-8").partition(HEADING)
    indented = re.search(r"(?:^(?:    .*)?\n)+", section[section.index("\n    ") + 1 :], re.MULTILINE)
    assert indented, "README.md shows no code below its heading 'As a library'"
    shown = re.sub(r"^    ", "", indented[0], flags=re.MULTILINE)
    assert shown.strip() == (ROOT / "examples/own_loss.py").read_text("utf-8").split('"""', 2)[2].strip()


def test_the_example_learns_privately(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(ROOT / "examples/own_loss.py"))
    *rounds, guarantee = capsys.readouterr().out.splitlines()
    assert len(rounds) == 20
    shares = [float(re.search(r"([\d.]+)% right", line)[1]) for line in rounds]
    assert shares[-1] > 90 > shares[0]
    assert guarantee.startswith("epsilon <= 4.00 at delta 1e-05 for one record")


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs/api/own_loss.md").read_text("utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
    rng = np.random.default_rng(0)
    clients = {
        f"client {i}": {"x": rng.normal(size=(120, 3)).astype(np.float32), "y": rng.integers(0, 2, 120)}
        for i in range(6)
    }

    def loss(params: Any, example: Any) -> jax.Array:
        return jnp.square(example["x"] @ params["w"] - example["y"])

    exec(code, {"loss": loss, "params": {"w": jnp.zeros(3)}, "clients": clients})
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 21
    assert re.match(r"epsilon <= [34]\.\d\d at delta 1e-05 for one record", told[-1])
