"""Configuration files: reading, checking, JSON, and those that the project ships."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from fedjax_llm import config
from fedjax_llm.config import Data, Experiment, Model, Output, check, load, to_json
from fedjax_llm.errors import UserError
from fedjax_llm.federation.plan import Federation
from fedjax_llm.lora import Lora
from fedjax_llm.runs.directory import differences
from fedjax_llm.training.optimizers import Optimizer

ROOT = Path(__file__).parents[2]
OTHERS = ("sweeps", "attacks")
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.parent.name not in OTHERS and p.name != "site.py")


def written(folder, body, imports="from fedjax_llm.config import *"):
    path = folder / "mine.py"
    path.write_text(f"{imports}\n\ndef get_config():\n    {body}\n")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_whole(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = load(path)
    assert json.loads(json.dumps(to_json(experiment))) == to_json(experiment)
    experiment.aggregation.make()
    experiment.training.optimizer.make()
    assert hasattr(experiment.data.source, "load")
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    assert f"--config={path.relative_to(ROOT).as_posix()}" in text


def test_there_are_shipped_configurations():
    assert {"quickstart", "tenth_percent"} <= {path.stem for path in SHIPPED}


def test_a_configuration_is_what_get_config_gives(tmp_path):
    assert load(written(tmp_path, "return Experiment(seed=7)")) == Experiment(seed=7)


FAULTS = {
    # what get_config does: what is said
    "return Experiment(Model(nme='x'))": r"mine\.py: .*'nme'; did you mean 'name'\?",
    "return Experiment(sede=1)": r"unexpected keyword argument 'sede'; did you mean 'seed'",
    "return Experiment(model='tiny')": r"model is 'tiny', a str; it must be a Model\(\.\.\.\)",
    "return Experiment(setting='federatd')": "setting is 'federatd'; did you mean 'federated'",
    "return Experiment(seed='one')": "seed is 'one', a str; it must be of type int",
    "return Experiment(seed=True)": "seed is True, a bool; it must be of type int",
    "return Experiment(start_from=3)": "start_from is 3, a int; it must be of type str",
    "return Experiment(Model(dtype='float16'))": "model.dtype is 'float16'; did you mean",
    "return 3": "gave a int, not an Experiment",
    "return Experimnt()": "cannot be read: NameError: name 'Experimnt' is not defined",
    "import nowhere": "cannot be read: ModuleNotFoundError",
    "return (": "cannot be read: SyntaxError",
    "raise TypeError('odd')": r"mine\.py: odd$",
}


@pytest.mark.parametrize("body", FAULTS)
def test_faults_in_a_configuration_are_told(tmp_path, body):
    with pytest.raises(UserError, match=FAULTS[body]):
        load(written(tmp_path, body))


def test_near_fields_are_found_through_a_module(tmp_path):
    with pytest.raises(UserError, match="'rnk'; did you mean 'rank'"):
        load(written(tmp_path, "return lora.Lora(rnk=1)", "from fedjax_llm import lora"))


def test_files_that_are_no_configurations(tmp_path):
    written(tmp_path, "return 3")
    with pytest.raises(UserError, match=r"there is no configuration file .*mime\.py; did you mean 'mine\.py'"):
        load(tmp_path / "mime.py")
    with pytest.raises(UserError, match="there is no configuration file"):
        load(tmp_path / "absent" / "mine.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py has no function get_config\(\) -> Experiment"):
        load(tmp_path / "empty.py")


def test_whole_numbers_serve_where_fractions_are_wanted_and_infinity_does_not():
    check(Experiment(lora=Lora(alpha=16), training=dataclasses.replace(Experiment().training, proximal=1)))
    with pytest.raises(UserError, match=r"training\.optimizer\.learning_rate is nan; it must be a finite number"):
        check(with_optimizer(Optimizer("sgd", float("nan"))))
    with pytest.raises(UserError, match=r"federation\.rounds is 2\.0, a float; it must be of type int"):
        check(Experiment(federation=Federation(rounds=2.0)))
    with pytest.raises(UserError, match=r"lora\.targets is 'q_proj', a str; it must be a tuple"):
        check(Experiment(lora=Lora(targets="q_proj")))
    with pytest.raises(UserError, match=r"lora\.targets\[1\] is 3, a int"):
        check(Experiment(lora=Lora(targets=("q_proj", 3))))

    with pytest.raises(UserError, match=r"training\.optimizer\.options\['b2'\] is '0.9', a str"):
        check(with_optimizer(Optimizer(options={"b2": "0.9"})))
    with pytest.raises(UserError, match=r"training\.optimizer\.options is 0.9, a float; it must be a dictionary"):
        check(with_optimizer(Optimizer(options=0.9)))


def with_optimizer(optimizer):
    return Experiment(training=dataclasses.replace(Experiment().training, optimizer=optimizer))


def test_impossible_values():
    for make, said in (
        (lambda: Data(max_length=7), "data.max_length is 7"),
        (lambda: Output(keep_last=0), "output.keep_last is 0; it must be at least 1"),
        (lambda: Output(keep_best=-1), "output.keep_best is -1; it must be at least 0"),
        (lambda: Output(keep_best=0, select="best"), "output.keep_best is 0; it must be at least 1 where"),
        (lambda: Output(bandwidth_mbps=0.0), "output.bandwidth_mbps is 0"),
        (lambda: Experiment(output=Output(select="best")), "validation_every is 0"),
    ):
        with pytest.raises(UserError, match=said.replace(".", r"\.")):
            make()


def test_json_names_classes_and_refuses_what_it_cannot_hold():
    found = to_json(with_optimizer(Optimizer(options={"b2": 0.9})))
    assert found["class"] == "Experiment"
    assert found["aggregation"]["class"] == "FedAvg"
    assert found["training"]["optimizer"]["options"] == {"b2": 0.9}
    assert found["lora"]["targets"] == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match=r"which has no place in config\.json; use plain values"):
        to_json(Experiment(data=Data(source=object())))


def test_what_may_change_on_resuming_decides_no_result():
    found = to_json(Experiment())
    for place in ("execution", "output"):
        found[place] = dict.fromkeys(found[place], 99)
    lines = differences(to_json(Experiment()), found, config.MAY_CHANGE)
    assert [line.split(":")[0] for line in lines] == [
        "output.aggregation_error",
        "output.class",
        "output.keep_best",
        "output.select",
    ]


def test_models_are_named_by_text():
    with pytest.raises(UserError, match=r"model\.name is None, a NoneType; it must be of type str"):
        check(Experiment(model=Model(name=None)))
