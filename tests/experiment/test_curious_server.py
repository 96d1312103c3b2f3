"""The experiment on a tiny model: what it finds, what it writes, and that finished cases are not run again."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console

from fedjax_llm.data.records import Dataset, Example, Message, Record, Site
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.curious_server import CuriousServer, run_curious_server
from fedjax_llm.models.loading import BaseModel
from tests.tiny import tiny_base


@dataclass(frozen=True)
class Letters:
    """Records with a few letters each."""

    def load(self) -> Dataset:
        """Sixteen of them."""
        words = [f"{chr(97 + i)}{chr(98 + i)}{chr(99 + i)}" for i in range(16)]
        records = [
            Record(str(i), (Example((Message("user", word), Message("assistant", word[::-1]))),))
            for i, word in enumerate(words)
        ]
        return Dataset((Site("all", tuple(records)),), "1", "nobody")


ATTACK = CuriousServer(
    model="tiny", data=Letters(), system=None, max_length=96, ranks=(2, 30), examples=(1,), rank=30, steps=(2,),
    clients=(2,), noise_multipliers=(1.0,), learning_rates=(1.0, 1e-3), warm_steps=1, inversion=None, seeds=(0,),
)  # fmt: skip


def model(name: str) -> BaseModel:
    """Wide enough for rank 30 in the values."""
    assert name == "tiny"
    return tiny_base(width=64, heads=4, kv_heads=4, head_dim=16)


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("curious")
    assert run_curious_server(ATTACK, path, silent(), model) == 0
    return path


def cases(folder: Path) -> dict[str, dict]:
    found = json.loads((folder / "curious_server.json").read_text())["cases"]
    return {f"{case['group']} {case['rank']} {case['train']}": case for case in found}


def test_rank_decides_and_steps_sums_and_first_rounds_do_not_protect(folder: Path):
    found = cases(folder)
    assert (found["rank 2 both"]["verdict"], found["rank 2 both"]["recall"]) == ("saturated", 0.0)
    for name in ("rank 30 both", "steps 30 both", "clients 30 both", "first round 30 b"):
        assert found[name]["verdict"] == "conclusive", name
        assert found[name]["recall"] == 1.0, name
    assert found["clients 30 both"]["tokens"] > found["rank 30 both"]["tokens"]


def test_noise_and_adam_take_the_update_out_of_the_span(folder: Path):
    for name in ("noise 30 both", "adam 30 both"):
        assert cases(folder)[name]["verdict"] == "saturated"
        assert cases(folder)[name]["recall"] == 0.0


def test_table_and_figure_are_written(folder: Path):
    table = (folder / "curious_server.md").read_text().splitlines()
    assert len(table) == 2 + len(list(ATTACK.cases()))
    assert "sum of 2 clients" in "\n".join(table)
    assert "</svg>" in (folder / "curious_server.svg").read_text()


def test_finished_cases_are_not_run_again(folder: Path):
    def never(name: str) -> BaseModel:
        raise AssertionError("nothing is left to run")

    before = cases(folder)
    assert run_curious_server(ATTACK, folder, silent(), never) == 0
    assert cases(folder) == before
    with pytest.raises(UserError, match="clip_norm"):
        run_curious_server(replace(ATTACK, clip_norm=0.7), folder, silent(), never)


@pytest.mark.parametrize(
    ("change", "match"), [({"depth": 1}, "depth"), ({"ranks": ()}, "ranks"), ({"clip_norm": 0.0}, "clip_norm")]
)
def test_impossible_attacks_are_refused(change: dict, match: str):
    with pytest.raises(UserError, match=match):
        replace(ATTACK, **change)
