"""An experiment comes back from its ``config.json`` as it was."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedjax_llm import config
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.config import Data, Experiment, Output, to_json
from fedjax_llm.data.partition import DirichletByLabel
from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import stored
from fedjax_llm.experiment.stored import experiment_of, from_json
from fedjax_llm.federation.plan import Federation
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.runs.keys import Encryption
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.py") if "def get_config" in path.read_text())


def through_a_file(experiment):
    """What is read of what is written."""
    return from_json(json.loads(json.dumps(to_json(experiment))))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_come_back(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = config.load(path)
    assert through_a_file(experiment) == experiment


def test_there_are_shipped_configurations():
    assert {"quickstart", "quickstart_secure", "unreliable"} <= {path.stem for path in SHIPPED}


PRIVATE = Experiment(
    training=LocalTraining(optimizer=Optimizer("sgd", 1.0), local_steps=1),
    federation=Federation(rounds=5, weighting="uniform"),
    privacy=Privacy(DpFedSgd(clip_norm=0.1, noise_multiplier=2.0), delta=1e-5, real_data=False),
)
WRITTEN = {
    "defaults": Experiment(),
    "private": PRIVATE,
    "secure": Experiment(secure=SecAgg()),
    "encrypted": Experiment(output=Output(encryption=Encryption(key_file="keys/key"))),
    "attacked": Experiment(aggregation=Krum(), attack=SignFlip(), malicious=0.25),
    "compressed": Experiment(compression=TopK()),
    "options by name": Experiment(
        training=LocalTraining(optimizer=Optimizer("adamw", 1e-3, {"b2": 0.95, "eps": 1e-6}))
    ),
    "secrets in files": Experiment(
        data=Data(
            PlantedSecrets(SiteFiles(("a.csv", "b.csv"), id_column="id"), repetitions=(1, 8), sites=("a",), seed=3),
            partition=DirichletByLabel(4, alpha=0.3),
        )
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_experiments_come_back_with_all_that_is_in_them(name):
    found = through_a_file(WRITTEN[name])
    assert found == WRITTEN[name]
    assert to_json(found) == to_json(WRITTEN[name])
    assert found != replace(WRITTEN[name], seed=1)


def test_every_class_of_a_configuration_is_found_by_one_name_only():
    """Two classes of a name would be taken for each other."""
    known, found = stored._classes(), {}
    rooms = {f"fedjax_llm.{room}" for room in (*stored._ROOMS, *stored._MORE)}
    for place, module in list(sys.modules.items()):
        if place.rpartition(".")[0] in rooms:
            own = [value for value in vars(module).values() if getattr(value, "__module__", None) == place]
            for value in filter(stored.is_part, own):
                found.setdefault(value.__name__, set()).add(value)
    assert len(found) > 50
    assert {name for name, values in found.items() if len(values) > 1} == set()
    assert set(found) <= set(known)


def test_a_run_is_read_from_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(PRIVATE)))
    assert experiment_of(tmp_path) == PRIVATE


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run \(it has no config\.json\)"):
        experiment_of(tmp_path)
    with pytest.raises(UserError, match="is not the folder of a run"):
        experiment_of(tmp_path / "nowhere")


@dataclass(frozen=True)
class OwnSource:
    """A source that the project does not have."""

    path: str = "x"

    def load(self):
        raise NotImplementedError


def test_a_class_of_somebody_else_is_named_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(Experiment(data=Data(OwnSource())))))
    with pytest.raises(UserError, match=r"config\.json holds a OwnSource, which is no class of this.*by --config"):
        experiment_of(tmp_path)


def broken(change):
    written = to_json(Experiment())
    change(written)
    return written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: all_["lora"].update(wings=2), "place was written by another version: Lora has no wings here"),
        (lambda all_: all_["training"]["optimizer"].update(b=1, a=2), "Optimizer has no a, b here"),
        (lambda all_: all_["lora"].update(rank="eight"), "place does not fit this version's Lora: .*str"),
        (lambda all_: all_["data"].update(source={"class": "SiteFiles"}), "this version's SiteFiles: .*'paths'"),
        (lambda all_: all_.update(seed=-1), "seed is -1"),
        (lambda all_: all_["model"].pop("class"), "model is .*; it must be a Model"),
        (lambda all_: all_.update({"class": "Lora"}), "place was written by another version: Lora has no"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_json(broken(change), "place")


@pytest.mark.parametrize("written", [to_json(Experiment().lora), {"a": 1}, [], 3])
def test_what_is_no_experiment_is_refused(written):
    with pytest.raises(UserError, match="place does not hold an Experiment"):
        from_json(written, "place")


def test_a_field_that_an_older_version_did_not_write_has_its_default():
    written = to_json(Experiment(seed=4))
    del written["lora"]["dora"], written["secure"]
    assert from_json(written) == Experiment(seed=4)
