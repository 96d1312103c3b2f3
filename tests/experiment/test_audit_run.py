"""Audits of whole experiments: right ones pass, sabotaged ones fail loudly."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_private import private
from small_run import changed, write_small

from fedjax_llm import config
from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import audit_report
from fedjax_llm.experiment.audit_run import CONTRADICTED, Audit, run_audit
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.runs import directory
from fedjax_llm.training.optimizers import Optimizer

pytestmark = pytest.mark.usefixtures("short_reports")

CANARIES = 200
COMMON = {"lora": Lora(rank=8, alpha=8.0), "federation__rounds": 1, "federation__cohort": None}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The miniature, without a mechanism."""
    return config.load(write_small(tmp_path_factory.mktemp("small")))


def audits_of(small: Experiment) -> dict[str, Audit]:
    """One round in which everybody takes part, with noise for a claim near 1, which few canaries can contradict."""
    records = Privacy(DpFedSgd(noise_multiplier=4.0, sampling_probability=1.0), delta=1e-5, real_data=False)
    sites = Privacy(DpFedAvg(clip_norm=0.1, noise_multiplier=4.0), unit="site", delta=1e-5, real_data=False)
    gradient = config_of(small, "DpFedSgd", records)
    client = config_of(
        small, "DpFedAvg", sites, training__optimizer=Optimizer("sgd", 0.1), training__batch_size=1,
        training__local_steps=1,
    )  # fmt: skip
    return {
        "gradient": Audit(gradient, "gradient", CANARIES),
        "client": Audit(client, "client", CANARIES),
    }


def config_of(small: Experiment, name: str, privacy: Privacy, **fields: Any) -> Experiment:
    """The miniature with a mechanism."""
    return changed(private(small, name), **COMMON, **fields, privacy=privacy)


def go(audit: Audit, folder: Path) -> tuple[int, dict[str, Any], str]:
    """The exit status, ``audit.json``, and what the user saw."""
    seen = io.StringIO()
    status = run_audit(audit, folder, Console(file=seen, width=200))
    return status, json.loads((folder / "audit.json").read_text()), seen.getvalue()


@pytest.mark.parametrize("kind", ["gradient", "client"])
def test_a_right_run_passes_and_one_without_noise_fails_loudly(kind, small, tmp_path):
    audit = audits_of(small)[kind]
    status, right, seen = go(audit, tmp_path / "right")
    assert (status, right["contradicted"]) == (0, False)
    assert "THE CLAIM IS WRONG" not in seen
    certified = [bound for bound in right["bounds"] if bound["confidence"] is not None]
    assert certified
    assert all(bound["epsilon"] <= right["claim"] for bound in certified)
    # z = 4, once: epsilon at 1e-5 is 0.93 by the analytic Gaussian mechanism.
    assert right["claim"] == pytest.approx(0.93, abs=0.02)
    assert right["most_shown"] > right["claim"]
    assert len(right["scores"]["in"]) + len(right["scores"]["out"]) == CANARIES

    broken = Audit(audit.experiment, audit.kind, CANARIES, noise_factor=1 / CANARIES)  # noise for the mean, on the sum
    status, wrong, seen = go(broken, tmp_path / "wrong")
    assert (status, wrong["contradicted"]) == (CONTRADICTED, True)
    assert wrong["claim"] == right["claim"]
    assert max(bound["epsilon"] for bound in wrong["bounds"] if bound["confidence"]) > 1.3 * wrong["claim"]
    assert "THE CLAIM IS WRONG" in seen
    assert "SABOTAGED" in seen
    assert np.mean(wrong["scores"]["in"]) > np.mean(wrong["scores"]["out"])
    for folder in (tmp_path / "right", tmp_path / "wrong"):
        assert "accountant's upper bound" in (folder / "audit.md").read_text()
        assert "</svg>" in (folder / "audit.svg").read_text()


def test_audits_without_a_claim_or_of_the_wrong_unit_are_refused(small):
    audits = audits_of(small)
    with pytest.raises(UserError, match="no claim to audit"):
        Audit(small)
    with pytest.raises(UserError, match="Set kind to 'client'"):
        Audit(audits["client"].experiment, "gradient")
    with pytest.raises(UserError, match="Set kind to 'gradient'"):
        Audit(audits["gradient"].experiment, "client")
    for field, value in (
        ("canaries", 1),
        ("significance", 0.0),
        ("noise_factor", -1.0),
        ("noise_factor", float("inf")),
    ):
        with pytest.raises(UserError, match=field):
            Audit(audits["gradient"].experiment, **{field: value})


def outcome(claim: float, shown: float, estimate: float, most: float) -> dict[str, Any]:
    """The content of an ``audit.json``."""
    bounds = [
        {"method": "one run", "epsilon": shown, "confidence": 0.95, "assumes": "coins"},
        {"method": "canary directions", "epsilon": estimate, "confidence": None, "assumes": "an estimate"},
    ]
    return {
        "mechanism": "DpFedSgd", "unit": "record", "rounds": 3, "trained_values": 4321, "canaries": 4,
        "kind": "gradient", "noise_factor": 1.0, "delta": 1e-5, "claim": claim, "most_shown": most, "bounds": bounds,
        "scores": {"in": [1.0, 2.0], "out": [0.0, 0.5]},
    }  # fmt: skip


def test_the_table_has_every_figure_and_says_when_an_audit_is_too_weak():
    table = audit_report.table(outcome(8.0, 1.25, 6.5, 4.5))
    assert "| the accountant's upper bound | 8.000 | proof |" in table
    assert "| lower bound: one run | 1.250 | 95% | coins |" in table
    assert "| estimate: canary directions | 6.500 | none | an estimate |" in table
    assert "2 in and 2 out" in table
    assert "cannot contradict" in table
    assert "SABOTAGED" not in table
    assert "cannot contradict" not in audit_report.table(outcome(2.0, 1.25, 6.5, 4.5))


def test_the_alarm_tells_the_bound_and_never_the_estimate():
    alarm = audit_report.alarm(outcome(2.0, 3.25, 60.5, 4.5))
    assert "epsilon >= 3.25" in alarm
    assert "epsilon <= 2.00" in alarm
    assert "60.5" not in alarm


def test_the_picture_is_the_same_each_time_and_names_the_figures():
    picture = audit_report.picture(outcome(2.0, 1.25, 6.5, 4.5))
    assert picture == audit_report.picture(outcome(2.0, 1.25, 6.5, 4.5))
    for text in ("claimed: at most 2.00", "at least 1.25", "6.50, an estimate", "2 canaries in"):
        assert text in picture


def test_a_finished_audit_is_told_again_and_another_is_refused(small, tmp_path):
    audit, folder = audits_of(small)["gradient"], tmp_path / "audit"
    directory.create(folder, config.to_json(audit))
    found = outcome(1.0, 1.25, 6.5, 4.5) | {"contradicted": True}
    directory.write_json(folder / "audit.json", found)
    status, again, seen = go(audit, folder)
    assert (status, again) == (CONTRADICTED, found)
    assert "THE CLAIM IS WRONG" in seen
    with pytest.raises(UserError, match="other settings"):
        go(Audit(audit.experiment, "gradient", CANARIES + 1), folder)
