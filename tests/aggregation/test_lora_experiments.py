"""Whole experiments with the algorithms made for adapters: what they leave behind, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_run import changed, go, write_small

from fedjax_llm import config, lora, peft
from fedjax_llm.aggregation.fedper import FedPer
from fedjax_llm.aggregation.fedsa import FedSaLora
from fedjax_llm.aggregation.rolora import RoLora
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.prepare import prepare
from fedjax_llm.runs.progress import RunProgress

pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    experiment = config.load(write_small(tmp_path_factory.mktemp("small") / "files"))
    return changed(experiment, federation__rounds=1, evaluation__generations=0)


def prepared(experiment):
    return prepare(experiment, RunProgress(1, Console(file=io.StringIO())))


def test_a_trained_core_is_written_as_two_factors_and_taken_up_again(small, tmp_path):
    experiment = changed(small, lora__train="core", training__optimizer__learning_rate=0.1)
    status, said = go(experiment, tmp_path / "run")
    assert status == 0, said
    kind, written = peft.read_adapter(Path(tmp_path / "run" / "adapter"))
    assert kind.rank == 2
    again = prepared(changed(experiment, start_from=str(tmp_path / "run" / "adapter")))
    assert {name for factors in again.adapters.values() for name in factors} == {"c"}
    resumed = lora.products(lora.join(again.adapters, again.frozen))
    for path, product in lora.products(written).items():
        np.testing.assert_allclose(resumed[path], product, atol=1e-6)
        assert np.abs(product).max() > 1e-3


@pytest.mark.parametrize(
    ("aggregation", "fields", "message"),
    [
        (FedPer(base_layers=2), {}, "FedPer would leave no trained factor of the adapters at the sites"),
        (FedPer(base_layers=1), {"lora__layers": (1,)}, "FedPer would leave all trained factors"),
        (FedSaLora(), {"lora__train": "b"}, "FedSaLora would leave all trained factors .* the setting local"),
        (FedSaLora(), {"lora__train": "core"}, "FedSaLora would leave no trained factor .* FedAvg"),
        (RoLora(), {"lora__train": "b"}, "RoLora works on products of both factors"),
    ],
    ids=str,
)
def test_algorithms_that_do_not_fit_the_adapters_are_refused(small, aggregation, fields, message):
    with pytest.raises(UserError, match=message):
        prepared(changed(small, aggregation=aggregation, **fields))


def test_personal_layers_are_kept_by_every_site(small):
    plan = prepared(changed(small, aggregation=FedPer())).plan
    own, shared = lora.partition(prepared(small).adapters, plan.aggregation.personal)
    assert {path.split(".")[1] for path in own} == {"1"}
    assert {path.split(".")[1] for path in shared} == {"0"}
