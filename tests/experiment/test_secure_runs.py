"""Whole runs under secure aggregation: what is shown, kept and released, and what happens when too few are left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_private import entries
from small_run import changed, go, outcome, write_small

from fedjax_llm.config import Experiment, load
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import training_loop
from fedjax_llm.federation.availability import Availability
from fedjax_llm.peft import read_adapter
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.skellam import Skellam
from fedjax_llm.runs import metrics
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.training.optimizers import Optimizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The miniature with all three sites in every round."""
    return changed(load(write_small(tmp_path_factory.mktemp("small"))), federation__cohort=None)


@pytest.fixture(scope="module")
def safe(small: Experiment) -> Experiment:
    """The same under secure aggregation."""
    return changed(small, secure=SecAgg())


@pytest.fixture(scope="module")
def ended(safe: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and what was shown."""
    folder = tmp_path_factory.mktemp("runs") / "safe"
    status, shown = go(safe, folder)
    assert status == 0
    return folder, shown


def noisy(experiment: Experiment, **fields: Any) -> Experiment:
    """With shares of the noise at the sites."""
    mechanism = DpFedSgd(noise_multiplier=2.0, distributed=Skellam())
    own: dict[str, Any] = {
        "training__optimizer": Optimizer("sgd", 1.0),
        "training__local_steps": 1,
        "federation__weighting": "uniform",
        "privacy": Privacy(mechanism, delta=1e-3, real_data=False),
    }
    return changed(experiment, **fields, **own)


def adapters(folder: Path) -> dict[str, np.ndarray]:
    """The exported adapter's arrays."""
    _, found = read_adapter(folder / "adapter")
    return {f"{path} {name}": np.asarray(leaf) for path, factors in found.items() for name, leaf in factors.items()}


def test_the_result_is_that_of_the_run_without_it_within_the_grid(small: Experiment, ended: Any, tmp_path: Path):
    go(small, tmp_path / "plain")
    plain, masked = adapters(tmp_path / "plain"), adapters(ended[0])
    assert plain.keys() == masked.keys()
    assert max(np.abs(plain[name] - masked[name]).max() for name in plain) < 1e-5


def test_the_display_says_who_sees_what(ended: Any):
    _, shown = ended
    assert "SecAgg: masks between every pair of sites; 3 of 3 shares open a secret" in shown
    assert "Who sees what" in shown
    assert "masked updates" in shown
    assert shown.count("server saw one sum of 3") == 3


def test_report_and_summary_say_who_saw_what(ended: Any):
    folder, _ = ended
    secure = json.loads((folder / "summary.json").read_text())["secure"]
    assert (secure["sums"], secure["abandoned"], secure["dropped"], secure["cut"]) == (3, 0, 0, 0)
    page = (folder / "report.html").read_text()
    assert "Who saw what" in page
    for party, what in secure["saw"]:
        assert f"<dt>{party}</dt><dd>{what}</dd>".replace("'", "&#39;") in page


def test_without_it_the_report_says_that_the_server_sees_every_update(small: Experiment, tmp_path: Path):
    go(small, tmp_path / "plain")
    assert "There is no secure aggregation in this run" in (tmp_path / "plain/report.html").read_text()
    secure = json.loads((tmp_path / "plain/summary.json").read_text())["secure"]
    assert dict(secure["saw"])["server"].startswith("every site's update of ")


def test_no_file_of_the_run_holds_a_sites_own_figures(ended: Any):
    for line in metrics.read(ended[0] / "metrics.jsonl"):
        assert line["loss"] > 0  # the cohort's
        assert {key for site in line["sites"].values() for key in site} == {"download_bytes", "upload_bytes"}
        assert line["secure"] == {"clients": 3, "survivors": 3, "dropped": [], "cut": 0, "abandoned": None}


def test_sites_own_figures_can_be_left_out_without_it_too(small: Experiment, tmp_path: Path):
    go(changed(small, output__client_metrics=False, federation__rounds=1), tmp_path / "run")
    (line,) = metrics.read(tmp_path / "run/metrics.jsonl")
    assert line["loss"] > 0
    assert {key for site in line["sites"].values() for key in site} == {"download_bytes", "upload_bytes"}


def test_a_run_that_is_done_again_gives_the_same_bits(safe: Experiment, ended: Any, tmp_path: Path):
    go(safe, tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(ended[0])


def test_a_round_too_few_are_left_of_is_told_and_stays_charged(small: Experiment, tmp_path: Path):
    experiment = noisy(small, secure=SecAgg(), federation__availability=Availability(dropout=0.4), federation__rounds=4)
    status, shown = go(experiment, tmp_path / "run")
    assert status == 0
    lines = metrics.read(tmp_path / "run/metrics.jsonl")
    abandoned = [line for line in lines if line["secure"]["abandoned"]]
    assert 0 < len(abandoned) <= 4
    assert shown.count("abandoned, nothing was released") == len(abandoned)
    assert shown.count("what it would have released stays charged") == len(abandoned)
    assert all(line["update_norm"] == 0 for line in abandoned)
    assert [number for number, _ in entries(tmp_path / "run")] == [1, 2, 3, 4]
    found = json.loads((tmp_path / "run/summary.json").read_text())["secure"]
    assert found["abandoned"] == len(abandoned)


def test_a_run_that_is_stopped_and_resumed_gives_the_same_bits(
    small: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With other signing keys, sessions and masks: none of them is in a result."""
    experiment = noisy(small, secure=SecAgg(threshold=3))
    go(experiment, tmp_path / "whole")
    with monkeypatch.context() as patched:
        rounds = iter([training_loop.run_round])  # one round, then Ctrl-C

        def once(*args: Any) -> Any:
            chosen = next(rounds, None)
            if chosen is None:
                raise KeyboardInterrupt
            return chosen(*args)

        patched.setattr(training_loop, "run_round", once)
        assert go(experiment, tmp_path / "stopped")[0] == 130
    assert len(metrics.read(tmp_path / "stopped/metrics.jsonl")) == 1
    assert go(experiment, tmp_path / "stopped", resume=True)[0] == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("colluders", [0, 1])
def test_shares_of_the_noise_run_end_to_end(small: Experiment, colluders: int, tmp_path: Path):
    experiment = noisy(small, secure=SecAgg(threshold=3, colluders=colluders))
    assert go(experiment, tmp_path / "run")[0] == 0
    stated = json.loads((tmp_path / "run/summary.json").read_text())
    assert "server" in stated["privacy"]["adversary"]
    assert "every site's share of the noise" in dict(stated["secure"]["saw"])["server"]
    assert stated["privacy"]["epsilon"] > 0
    go(experiment, tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")


def test_two_sites_are_refused_before_the_model_is_loaded(small: Experiment, tmp_path: Path):
    experiment = changed(small, secure=SecAgg(), federation__cohort=2)
    with pytest.raises(UserError, match="hides nothing"):
        go(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()
