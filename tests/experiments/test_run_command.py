"""The main job's command line: overrides, help, exit statuses."""

import json

import pytest
from small_run import write_small

from experiments import ask, compare
from experiments.run import main, parse
from fedjax_llm.config import load
from fedjax_llm.errors import UserError
from fedjax_llm.runs.directory import read_json


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "files")


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run by the command line, with overrides."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    words = [
        "--config",
        str(files),
        "--out",
        str(folder),
        "--federation.rounds=1",
        "--data.source.prompt-column=prompt",
    ]
    assert main([*words, "--lora.targets", "q_proj", "o_proj", "--training.optimizer.options", "b2", "0.9"]) == 0
    return folder


def test_overrides_reach_their_fields(run):
    config = read_json(run / "config.json")
    assert config["federation"]["rounds"] == 1
    assert config["lora"]["targets"] == ["q_proj", "o_proj"]
    assert config["training"]["optimizer"]["options"] == {"b2": 0.9}
    assert read_json(run / "summary.json")["rounds"] == 1


def test_without_overrides_the_file_stands(files):
    command = parse([f"--config={files}"])
    experiment = load(files)
    assert all(getattr(command, name) == value for name, value in vars(experiment).items())
    assert (command.config, command.out, command.resume) == (str(files), None, False)


def test_options_that_do_not_exist_get_suggestions(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"--config={files}", "--federation.round", "3"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Unrecognized options: --federation.round" in said
    assert "--federation.rounds INT" in said
    with pytest.raises(SystemExit) as stopped:
        main([f"--config={files}", "--setting", "federatd"])
    assert stopped.value.code == 2
    assert "federated" in capsys.readouterr().err


def test_help_shows_the_files_values(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"--config={files}", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--lora.rank" in said
    assert "(default: adamw)" in said


def test_a_configuration_that_is_not_there(capsys):
    assert main(["--config", "configs/all_layer.py"]) == 2
    said = capsys.readouterr().err
    assert said == "error: there is no configuration file configs/all_layer.py; did you mean 'all_layers.py'?\n"


def test_ctrl_c_before_anything_was_begun(files, capsys, monkeypatch):
    def pressed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.run.parse", pressed)
    assert main([]) == 130
    assert capsys.readouterr().out == "Stopped.\n"


def test_the_tuned_model_and_the_base_can_be_asked(run, capsys):
    ask.main(run, "Who keeps hill 1?", base=True, max_new_tokens=5)
    lines = capsys.readouterr().out
    assert lines.startswith("tuned: ")
    assert "\nbase: " in lines
    with pytest.raises(UserError, match="is not the folder of a run"):
        ask.main(run.parent, "Who?")


def test_runs_are_compared_by_the_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare", str(run)])
    assert compare.main() == 0
    assert "tuned" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path)])
    assert compare.main() == 2
    assert "summary.json is missing; is" in capsys.readouterr().err


def test_the_configuration_of_a_run_is_plain_json(run):
    config = json.loads((run / "config.json").read_text())
    assert config["class"] == "Experiment"
    assert config["data"]["source"]["class"] == "SiteFiles"
