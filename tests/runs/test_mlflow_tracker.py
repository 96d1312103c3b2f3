"""MLflow with a database of its own: what it gives back is what it was told."""

import importlib.util

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs.mlflow_tracker import MLflow
from fedjax_llm.runs.tensorboard import scalars
from fedjax_llm.runs.tracking import Trackers, aggregate

CONFIG = {"class": "Experiment", "lora": {"rank": 4, "targets": ["q", "v"]}, "parts": [{"a": 1}], "text": "x" * 9000}
LINE = {
    "round": 1, "loss": 2.5, "cohort": ["ward: nine"], "sites": {"ward: nine": {"loss": 2.25}},
    "epsilon": {"unit": "record", "delta": 1e-5, "max": 3.0, "accounts": {"ward: nine": 3.0}},
}  # fmt: skip
SUMMARY = {"final": {"nll": 2.5, "sites": {"ward: nine": {"nll": 2.0}}}, "privacy": {"line": "epsilon <= 3.00"}}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is an extra")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A database; making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def track(store, folder, rounds, summary, **options):
    said = []
    folder.mkdir(exist_ok=True)
    with Trackers((MLflow(store, **options),), CONFIG, folder, said.append) as trackers:
        for number in rounds:
            trackers.round(LINE | {"round": number})
        if summary:
            trackers.finish(summary)
    assert said == []


def runs(store, name):
    from mlflow import MlflowClient

    client = MlflowClient(store)
    group = client.get_experiment_by_name("fedjax_llm").experiment_id
    return client, [one for one in client.search_runs([group]) if one.info.run_name == name]


def test_scalars_configuration_and_summary_are_there(store, tmp_path):
    track(store, tmp_path / "whole", [1, 2], SUMMARY)
    client, (run,) = runs(store, "whole")
    told = dict(scalars(aggregate(LINE)))
    assert run.data.metrics == told | {"summary/final/nll": 2.5}
    for name, value in told.items():
        points = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in points] == [(1, value), (2, value)]
    assert run.data.params | {"lora.rank": "4", "lora.targets": "['q', 'v']", "parts.0.a": "1"} == run.data.params
    assert run.data.params["text"] == "x" * 6000
    assert run.data.tags["summary/privacy/line"] == "epsilon <= 3.00"
    assert run.info.status == "FINISHED"
    assert "ward" not in repr(run.to_dictionary())


def test_sites_are_kept_where_that_is_asked_for_under_names_that_can_be(store, tmp_path):
    track(store, tmp_path / "sites", [1], SUMMARY, sites=True)
    _, (run,) = runs(store, "sites")
    assert run.data.metrics["sites/ward_ nine/loss"] == 2.25
    assert run.data.metrics["summary/final/sites/ward_ nine/nll"] == 2.0


def test_a_resume_goes_on_with_the_same_run(store, tmp_path):
    track(store, tmp_path / "halves", [1], None)
    _, (run,) = runs(store, "halves")
    assert run.info.status == "KILLED"
    track(store, tmp_path / "halves", [2], SUMMARY)
    client, (run,) = runs(store, "halves")
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]


def test_a_folder_is_refused_before_the_run(monkeypatch):
    with pytest.raises(UserError, match=r"is a folder.*name a database, such as sqlite:///runs/mlflow\.db"):
        MLflow("runs/mlflow").check()
    with pytest.raises(UserError, match="is a folder"):
        MLflow("file:runs/mlflow").check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(UserError, match="'mlruns'"):
        MLflow().check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    MLflow().check()


def test_a_missing_package_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedjax_llm\[mlflow\]'"):
        MLflow().check()
