"""A run's folder on a benchmark and into other programs, by command; of an encrypted run only with the key."""

import json
import sys

import numpy as np
import pytest
from tiny import tiny_adapters, tiny_folder

from experiments import evaluate, lm_eval
from experiments import export as export_main
from fedjax_llm import peft
from fedjax_llm.experiment.tuned import open_run
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load
from fedjax_llm.runs import directory, encryption, keys

KIND = Lora(rank=3, alpha=6.0, targets=("q_proj", "v_proj"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No key in the environment; the compilation cache of the tests as it is."""
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(evaluate, "use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model", num_hidden_layers=1, max_position_embeddings=1600)
    rows = [
        {
            "question": f"Which {n}?",
            "options": {"A": "heart", "B": "lung", "C": "skin", "D": "eye"},
            "answer_idx": "ABCD"[n],
        }
        for n in range(4)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made_run(base, folder, key=None):
    """A folder as a finished run leaves it."""
    config = {
        "model": {"name": str(base / "model"), "dtype": "float32"},
        "data": {"system": "Be brief."},
        "output": {"encryption": None if key is None else {"key_file": str(key)}},
    }
    run = directory.create(folder, config)
    model = load(str(base / "model")).model
    adapters = tiny_adapters(model, targets=KIND.targets)
    peft.write_adapter(run / "adapter", adapters, KIND, "tiny", model, encryption.seal)
    return run


def words(base, run, *more):
    return [str(run), "--benchmark.name=medqa", f"--benchmark.path={base / 'test.jsonl'}", *more]


def test_a_benchmark_of_a_run(base, tmp_path, capsys):
    run = made_run(base, tmp_path / "run")
    assert evaluate.main(words(base, run, "--scoring.forms", "letters", "match")) == 0
    shown = capsys.readouterr().out
    assert "medqa: share of right answers" in shown
    kept = json.loads((run / "benchmarks" / "medqa.json").read_text())
    assert list(kept["forms"]) == ["letters", "match"]
    assert kept["model"]["system"] == "Be brief."
    assert len(kept["forms"]["letters"]["tuned"]) == 4
    assert evaluate.main(words(base, run, "--json", "--base", "--scoring.forms", "letters")) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["forms"]["letters"]["base"] == kept["forms"]["letters"]["base"]
    assert "tuned" not in alone["forms"]["letters"]


@pytest.mark.parametrize("form", ["merged", "gguf", "peft"])
def test_an_export_of_a_run(base, tmp_path, capsys, form):
    run, out = made_run(base, tmp_path / "run"), tmp_path / "out"
    assert export_main.main([str(run), str(out), f"--format={form}"]) == 0
    assert "in clear" not in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names >= {"merged": {"config.json", "model.safetensors", "tokenizer.json"}, "gguf": {"model.gguf"},
                     "peft": {"adapter_config.json"}}[form]  # fmt: skip
    assert export_main.main([str(run), str(out), f"--format={form}"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_quantised_base_is_said_to_be_dequantised(base, tmp_path, capsys):
    run = made_run(base, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["quantise"] = "int8"
    (run / "config.json").write_text(json.dumps(config))
    assert export_main.main([str(run), str(tmp_path / "out")]) == 0
    assert "dequantised before the merge" in capsys.readouterr().out


def test_an_encrypted_run_needs_its_key_and_keeps_answers_sealed(base, tmp_path, capsys):
    key = tmp_path / "keys" / "key"
    key.parent.mkdir()
    keys.make_key(key)
    run = made_run(base, tmp_path / "run", key)
    away = key.rename(tmp_path / "keys" / "away")
    assert export_main.main([str(run), str(tmp_path / "out"), "--format=peft"]) == 2
    assert "key" in capsys.readouterr().err
    assert evaluate.main(words(base, run)) == 2
    assert "key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with_key = ["--key-file", str(away)]
    assert export_main.main([str(run), str(tmp_path / "out"), "--format=peft", *with_key]) == 0
    assert "what was exported is in clear" in capsys.readouterr().out
    base_model = load(str(base / "model")).model
    _, adapters = peft.read_adapter_for(tmp_path / "out", base_model)
    wanted = tiny_adapters(base_model, targets=KIND.targets)
    assert all(np.array_equal(adapters[path]["a"], wanted[path]["a"]) for path in wanted)
    assert evaluate.main(words(base, run, "--scoring.forms", "letters", *with_key)) == 0
    sealed = (run / "benchmarks" / "medqa.json").read_bytes()
    assert b"letters" not in sealed
    with keys.using(away):
        assert "letters" in directory.read_json(run / "benchmarks" / "medqa.json")["forms"]
        assert open_run(run).kind.rank == KIND.rank


def test_requests_that_cannot_be_met_are_told(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert evaluate.main(words(base, tmp_path / "empty")) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    run = made_run(base, tmp_path / "run")
    assert evaluate.main([str(run), "--benchmark.name=medqa", "--benchmark.path=none.jsonl"]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter").rmdir()
    assert export_main.main([str(run), str(tmp_path / "out")]) == 2
    assert "has no adapter yet" in capsys.readouterr().err
    assert export_main.main([str(run), str(tmp_path / "out"), "--base"]) == 0


def test_without_the_harness_it_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert lm_eval.main() == 2
    assert "pip install 'fedjax_llm[lm-eval]'" in capsys.readouterr().err
