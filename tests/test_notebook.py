"""The notebook's code, cell by cell, on a tiny model that learns invented words."""

import contextlib
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attacked import ATTACKS, known_experiment, load_tiny, write_words

from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "notebooks/course.ipynb").read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def smaller(folder: Path) -> dict[str, Any]:
    """What takes the place of the cell of parameters."""
    private = {
        "setting": "federated",
        "training": LocalTraining(16, 1, optimizer=Optimizer("sgd", 1.0)),
        "federation.weighting": "uniform",
        "privacy": Privacy(DpFedSgd(sampling_probability=0.5), "patient", target_epsilon=8.0, real_data=False),
    }
    return {
        "OUT": folder / "out",
        "load_model": load_tiny,
        "experiment": known_experiment(write_words(folder / "words")),
        "ways": {
            "centralised": {},
            "federated": {"setting": "federated", "training.local_steps": 8},
            "federated, epsilon 8": private,
        },
        "attacks": replace(ATTACKS, candidates=8, beams=0),
    }


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What each code cell prints, by its number among them."""
    space: dict[str, Any] = {}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "notebooks")
        for number, cell in enumerate(CODE):
            seen = io.StringIO()
            with contextlib.redirect_stdout(seen):
                exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", ()):
                space |= smaller(tmp_path_factory.mktemp("notebook"))
            found[number] = seen.getvalue()
        assert Path(os.getcwd()) == ROOT
    return found


def told(printed: dict[int, str], beginning: str) -> str:
    """The one output that begins like this."""
    (found,) = [text for text in printed.values() if text.lstrip().startswith(beginning)]
    return found


def test_training_is_compared_with_the_base_model(printed: dict[int, str]):
    rows = [re.split(r"  +", line.strip()) for line in told(printed, "nats a token").splitlines()[1:]]
    loss = {row[0]: float(row[1]) for row in rows}
    assert loss["centralised"] < loss["base model"]
    assert loss["federated"] < loss["base model"]
    assert rows[2][-1] != "0"


def test_the_taught_noise_has_the_epsilon_of_the_results(printed: dict[int, str]):
    text = told(printed, "as taught")
    stated = (ROOT / "docs/results/privacy.md").read_text("utf-8").partition("## As it is taught")[2]
    assert re.search(r"epsilon ([\d.,]+\d)", text)[1] == re.search(r"epsilon ([\d.,]+\d)", stated)[1]


def test_a_private_run_says_what_it_promises(printed: dict[int, str]):
    text = told(printed, "epsilon <= ")
    assert "for one patient" in text
    assert "not covered" in text


def test_secrets_that_were_stated_often_are_given_back_by_central_training(printed: dict[int, str]):
    rows = [re.split(r"  +", line.strip()) for line in told(printed, "secrets given back").splitlines()[1:]]
    exposure = {row[0]: float(row[2]) for row in rows}
    assert exposure["centralised"] > 3
    assert exposure["federated, epsilon 8"] < 2.5


def test_tables_of_the_results_are_shown_whole(printed: dict[int, str]):
    tables = [text for text in printed.values() if text.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_outputs_are_kept_small_and_say_nothing_of_a_machine():
    for cell in CODE:
        text = json.dumps(cell["outputs"])
        assert len(text) < 6000
        assert "Traceback" not in text
        assert str(Path.home()) not in text
