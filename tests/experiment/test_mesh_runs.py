"""A whole run on eight virtual devices is that of one device, and either goes on with what the other left."""

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import at_call
from safetensors.numpy import load_file
from small_run import changed, go, outcome, write_small

from fedjax_llm import config
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError
from fedjax_llm.mesh import MeshShape
from fedjax_llm.privacy.ddgauss import DDGauss
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import MechanismConfig
from fedjax_llm.privacy.skellam import Skellam
from fedjax_llm.runs.checkpoints import Checkpoints, finished_steps
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.training.optimizers import Optimizer

pytestmark = pytest.mark.usefixtures("short_reports")

CUBE = MeshShape(2, 2, 2)
FIELDS = {
    "aggregation": FedAdam(1e-2, tau=1e-2),
    "training__keep_optimizer": "yes",
    "evaluation__validation_every": 2,
    "output__keep_last": 2,
}
LAYOUT = ("padded_tokens", "padding")
"""What depends on the layout, which a mesh is a part of."""


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Experiment:
    return changed(config.load(write_small(tmp_path_factory.mktemp("small") / "files")), **FIELDS)


@pytest.fixture(scope="module")
def spread(one_device) -> Experiment:
    return changed(one_device, execution__mesh=CUBE)


def finished(experiment: Experiment, folder: Path, **options: Any) -> Path:
    assert go(experiment, folder, **options)[0] == 0
    return folder


@pytest.fixture(scope="module")
def unbroken(one_device, tmp_path_factory) -> Path:
    """The run on one device."""
    return finished(one_device, tmp_path_factory.mktemp("one") / "run")


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two outcomes differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(one.keys() ^ other.keys())}"]
        return [
            found for key in one if key not in LAYOUT for found in differences(one[key], other[key], f"{path}/{key}")
        ]
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{path}/{i}")]
    if isinstance(one, float) and isinstance(other, float):
        return [] if math.isclose(one, other, rel_tol=1e-4, abs_tol=2e-5) else [f"{path}: {one} and {other}"]
    return [] if one == other else [f"{path}: {one} and {other}"]


def assert_alike(one: Path, other: Path) -> None:
    """Metrics, evaluation, summary and adapters of two runs."""
    left, right = outcome(one), outcome(other)
    for part in ("metrics", "evaluation", "summary"):
        assert not differences(left[part], right[part], part)
    assert left["adapters"].keys() == right["adapters"].keys()
    tensors = [name for name in left["adapters"] if name.endswith(".safetensors")]
    assert tensors
    for name in tensors:
        mine, others = load_file(one / name), load_file(other / name)
        assert mine.keys() == others.keys()
        for key, value in mine.items():
            np.testing.assert_allclose(value, others[key], atol=1e-5)
    assert any(np.abs(value).max() > 1e-3 for name in tensors for value in load_file(one / name).values())


def test_a_whole_run_is_that_of_one_device(spread, unbroken, tmp_path):
    folder = finished(spread, tmp_path / "run")
    assert_alike(unbroken, folder)
    mesh = json.loads((folder / "config.json").read_text())["execution"]["mesh"]
    assert [mesh[axis] for axis in ("clients", "fsdp", "tensor")] == [2, 2, 2]


@pytest.mark.parametrize("first", ["spread", "one_device"])
def test_a_run_goes_on_where_the_devices_are_others(first, request, unbroken, tmp_path, monkeypatch):
    begun = request.getfixturevalue(first)
    other = request.getfixturevalue({"spread": "one_device", "one_device": "spread"}[first])
    with monkeypatch.context() as patch:
        at_call(patch.setattr, Checkpoints, "save", partial(signal.raise_signal, signal.SIGINT), "", 2, True)
        assert go(begun, tmp_path / "run")[0] == 130
    assert finished_steps(tmp_path / "run" / "checkpoints") == [1, 2]
    assert_alike(unbroken, finished(other, tmp_path / "run", resume=True))


SHARED = {"secure": SecAgg(), "federation__cohort": None, "federation__weighting": "uniform"}
"""What shares of the noise need: every site's, in a secure sum."""
ONE_STEP = {"training__optimizer": Optimizer("sgd", 1.0), "training__local_steps": 1}
PRIVATE: dict[str, tuple[MechanismConfig, str, dict[str, Any]]] = {
    "at the sites": (DpSgd(0.5, 1.0), "record", {}),
    "Skellam shares": (DpFedSgd(0.5, 1.0, distributed=Skellam()), "record", SHARED | ONE_STEP),
    "discrete Gaussian shares": (DpFedAvg(0.5, 1.0, distributed=DDGauss()), "site", SHARED),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_run_has_the_same_noise(one_device, spread, tmp_path, name):
    mechanism, unit, more = PRIVATE[name]
    fields = more | {
        "privacy": Privacy(mechanism, unit, delta=1e-3, randomness="reproducible", real_data=False),
        "training__keep_optimizer": "no",
        "evaluation__generations": 0,
        "federation__rounds": 2,
    }
    one, other = (
        finished(changed(experiment, **fields), tmp_path / place)
        for place, experiment in (("one", one_device), ("spread", spread))
    )
    assert_alike(one, other)


def test_too_many_devices_and_weights_that_cannot_be_cut_are_refused(one_device, tmp_path):
    with pytest.raises(UserError, match=r"execution.mesh wants 64 x 2 x 1 = 128 devices, but there are"):
        go(changed(one_device, execution__mesh=MeshShape(64, 2)), tmp_path / "many")
    with pytest.raises(UserError, match=r"execution.mesh.tensor is 3, which does not divide"):
        go(changed(one_device, execution__mesh=MeshShape(1, 1, 3)), tmp_path / "uneven")
