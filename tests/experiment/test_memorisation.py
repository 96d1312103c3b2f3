"""Full fine-tuning beside LoRA: the comparison at equal loss against an oracle, and a tiny one from end to end."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from attacked import known_experiment, load_tiny, write_words
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import memorisation, memorisation_report
from fedjax_llm.experiment.memorisation import Memorisation, run_memorisation
from fedjax_llm.experiment.memorisation_report import OFTEN, equal_loss, memorisation_section
from fedjax_llm.lora import Lora
from fedjax_llm.training import whole

pytestmark = pytest.mark.usefixtures("short_reports")

KINDS = ("full fine-tuning", "LoRA")


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    experiment = known_experiment(write_words(tmp_path_factory.mktemp("words") / "files"))
    lora = Lora(rank=16, alpha=32.0, targets=("*_proj",))
    return Memorisation(experiment, None, lora, (3e-3, 1e-2), steps=90, checks=3, validation=4, references=7)


def go(attack, folder):
    seen = io.StringIO()
    assert run_memorisation(attack, folder, Console(file=seen, width=400), load_tiny) == 0
    return json.loads((folder / "memorisation.json").read_text()), seen.getvalue()


@pytest.fixture(scope="module")
def ended(attack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memorisation") / "both"
    return folder, *go(attack, folder)


def often(check):
    return [one for one in check["secrets"] if one["repetitions"] >= OFTEN]


def test_both_learn_and_give_away_what_was_stated_often(ended):
    _, found, _ = ended
    assert tuple(found["trainings"]) == KINDS
    for name, checks in found["trainings"].items():
        assert [one["step"] for one in checks] == [0, 30, 60, 90]
        first, last = checks[0], checks[-1]
        assert not any(one["greedy"] >= one["tokens"] - 1 for one in first["secrets"])
        assert all(one["greedy"] >= one["tokens"] - 1 for one in often(last)), name
        assert all(one["exposure"] == pytest.approx(math.log2(8)) for one in often(last)), name
        assert min(one["nll"] for one in checks) < first["nll"]
        controls = [one for one in last["secrets"] if not one["repetitions"]]
        assert (len(often(last)), len(controls)) == (2, 4)
        assert not any(one["greedy"] >= one["tokens"] - 1 for one in controls)
        assert np.mean([one["exposure"] for one in controls]) < 3
        assert not any(one["coin"] for one in last["secrets"])
    first, other = (checks[0] for checks in found["trainings"].values())
    assert first["nll"] == pytest.approx(other["nll"], rel=1e-5)  # fresh adapters change nothing


def test_the_page_says_what_was_found(ended):
    folder, found, seen = ended
    section = memorisation_section(found)
    assert section.paragraphs[0] in seen
    assert section.paragraphs[0] in (folder / "leakage.md").read_text()
    assert f"validation loss of {equal_loss(found['trainings']):.3f} nats" in section.paragraphs[0]
    assert [row[:2] for row in section.rows] == [(name, str(step)) for name in KINDS for step in (0, 30, 60, 90)]
    assert found["model"] == "tiny"


def test_a_finished_training_is_not_repeated(attack, ended, tmp_path, monkeypatch):
    _, before, _ = ended
    half = before | {"trainings": {KINDS[0]: before["trainings"][KINDS[0]]}}
    (tmp_path / "memorisation.json").write_text(json.dumps(half))
    started, start = [], whole.start
    monkeypatch.setattr(whole, "start", lambda *args: started.append(args[3]) or start(*args))
    found, _ = go(attack, tmp_path)
    assert started == ["adapters"]
    assert found["trainings"][KINDS[0]] == before["trainings"][KINDS[0]]
    again, was = found["trainings"]["LoRA"], before["trainings"]["LoRA"]
    assert [one["nll"] for one in again] == pytest.approx([one["nll"] for one in was])
    monkeypatch.setattr(memorisation, "_bench", lambda *_: pytest.fail("loads although nothing is left"))
    assert go(attack, tmp_path)[0] == found


def test_results_of_other_settings_are_refused(attack, ended):
    folder, found, _ = ended
    with pytest.raises(UserError, match=r"is of other settings:\n  steps: 90 -> 80"):
        go(replace(attack, steps=80), folder)
    assert json.loads((folder / "memorisation.json").read_text()) == found


def secret(repetitions, exposure, greedy):
    return {
        "repetitions": repetitions,
        "coin": False,
        "tokens": 4,
        "greedy": 4 if greedy else 0,
        "exposure": exposure,
    }


def check(nll, exposures, given_back=0):
    """A check with secrets stated often, of which the first are given back."""
    secrets = [secret(OFTEN + i, bits, i < given_back) for i, bits in enumerate(exposures)]
    return {"step": 0, "nll": nll, "secrets": [*secrets, secret(1, 99.0, True), secret(0, 1.0, False)]}


falling = st.lists(st.floats(0.1, 9), min_size=2, max_size=6, unique_by=lambda value: round(value, 3))
bits = st.floats(0, 6)


@given(falling, falling, st.data())
def test_what_lies_between_two_checks_is_interpolated(full, lora, data):
    trainings = {}
    for name, losses in zip(KINDS, (full, lora), strict=True):
        points = [(loss, data.draw(bits), data.draw(bits), data.draw(st.integers(0, 2))) for loss in losses]
        points.sort(reverse=True)
        trainings[name] = [check(loss, exposures, given) for loss, *exposures, given in points]
    level = equal_loss(trainings)
    assert level == max(min(full), min(lora))
    for checks in trainings.values():
        found = memorisation_report._at(checks, level)
        rising = checks[::-1]
        losses = [one["nll"] for one in rising]
        means = [np.mean([one["exposure"] for one in rising_secrets["secrets"][:2]]) for rising_secrets in rising]
        shares = [np.mean([one["greedy"] == 4 for one in one_check["secrets"][:2]]) for one_check in rising]
        assert found["exposure"] == pytest.approx(np.interp(level, losses, means), abs=1e-6)
        assert found["greedy"] == pytest.approx(np.interp(level, losses, shares), abs=1e-6)


def test_the_loss_may_rise_again():
    """Of a training that overfits, the way down counts."""
    overfitted = [check(4.0, [0.0]), check(2.0, [2.0]), check(1.0, [3.0]), check(3.0, [6.0])]
    trainings = {"full fine-tuning": overfitted, "LoRA": [check(4.0, [0.0]), check(1.5, [1.0], 1)]}
    told = memorisation_section({"trainings": trainings, "model": "tiny"}).paragraphs[0]
    assert "At a validation loss of 1.500 nats per answer token" in told
    assert "full fine-tuning has an exposure of 2.50 bits" in told
    assert "gives back 0% of them; LoRA 1.00 bits and 100%." in told


REFUSED = {
    "steps": (0, "steps is 0; it must be at least 1"),
    "checks": (91, "checks is 91, but there are only 90 steps"),
    "references": (0, "references is 0; it must be at least 1"),
    "learning_rates": ((1e-3,), "learning_rates holds two numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_values_are_refused(name, attack):
    value, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        replace(attack, **{name: value})


def test_without_secrets_stated_often_there_is_nothing_to_compare(attack):
    data = attack.experiment.data
    rarely = replace(data.source, repetitions=(1, OFTEN - 1))
    for source in (data.source.source, rarely, PlantedSecrets(data.source.source, per_repetition=0, coins=4)):
        with pytest.raises(UserError, match=f"plants secrets {OFTEN} times or more"):
            replace(attack, experiment=replace(attack.experiment, data=replace(data, source=source)))
