"""The sweep's command line, and the sweeps that come along."""

import json
from pathlib import Path

import pytest
from small_run import write_small

from experiments.sweep import main
from fedjax_llm.experiment import sweep

ROOT = Path(__file__).parents[2]
FILE = '''"""A sweep in miniature."""

import dataclasses
import runpy

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.sweep import Sweep


def get_sweep():
    base = runpy.run_path({small!r})["get_config"]()
    evaluation = Evaluation(test_records=2, validation_every=1, generations=0, bootstrap_resamples=20)
    base = dataclasses.replace(base, evaluation=evaluation)
    return Sweep("in miniature", base, {algorithms}, {{"own": {{"federation.rounds": 1}}}}, seeds=(0, 1))
'''


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "files")


def write(small, folder, algorithms='{"FedAvg": {}}'):
    (folder / "sweep.py").write_text(FILE.format(small=str(small), algorithms=algorithms))
    return f"--config={folder / 'sweep.py'}"


def test_it_runs_from_the_command_line_and_goes_on(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([write(small, tmp_path), "--seeds", "3"]) == 0
    assert f"All figures: {tmp_path}/runs/in-miniature" in capsys.readouterr().out
    found = json.loads((tmp_path / "runs/in-miniature/sweep.json").read_text())
    assert [(cell["seed"], cell["status"]) for cell in found["cells"]] == [(3, "finished")]
    assert (tmp_path / "runs/in-miniature/FedAvg/own/seed-3/report.html").is_file()
    assert {path.name for path in (tmp_path / "runs/in-miniature").iterdir() if path.is_file()} >= {
        "sweep.json",
        "table.md",
        "table.csv",
        "loss_by_round.svg",
        "loss_by_bytes.svg",
        "error_by_round.svg",
    }
    assert main([write(small, tmp_path), "--seeds", "3"]) == 0
    assert "1 runs, 1 of them finished before." in capsys.readouterr().out


def test_a_failed_run_shows_in_the_exit_status(small, tmp_path, capsys):
    words = [write(small, tmp_path, '{"none": {"aggregation": FedAvg(server_lr=0.0)}}'), "--out", str(tmp_path / "out")]
    assert main([*words, "--seeds", "0"]) == 1
    assert "none, own, seed 0: failed: aggregation.server_lr is 0.0" in capsys.readouterr().out


def test_what_is_wrong_with_the_file_is_said(small, tmp_path, capsys):
    assert main(["--config", "configs/sweeps/aggregation_smal.py"]) == 2
    assert "did you mean 'aggregation_small.py'?" in capsys.readouterr().err
    assert main([f"--config={small}"]) == 2
    assert "has no function get_sweep() -> Sweep" in capsys.readouterr().err
    assert main([write(small, tmp_path, '{"x": {"lora.train_": "b"}}')]) == 2
    assert "changes lora.train_, which does not exist; did you mean 'train'" in capsys.readouterr().err
    assert main([write(small, tmp_path, '["FedAvg"]')]) == 2
    assert "error: " in capsys.readouterr().err


def test_ctrl_c_before_anything_was_begun(small, tmp_path, capsys, monkeypatch):
    def pressed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "load", pressed)
    assert main([write(small, tmp_path)]) == 130
    assert capsys.readouterr().out == "Stopped.\n"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_are_possible(path, tmp_path):
    found = sweep.load(path)
    cells = sweep.cells_of(found, tmp_path)
    assert len(cells) == len(found.algorithms) * len(found.data) * len(found.seeds)
    assert [cell.refused for cell in cells if cell.refused] == []
    assert len({cell.folder for cell in cells}) == len(cells)
    for cell in cells:
        cell.experiment.aggregation.make()
