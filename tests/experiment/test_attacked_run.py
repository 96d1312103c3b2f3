"""Attacks on finished runs: what was learnt by heart comes out, controls do not, and false claims are found out."""

import dataclasses
import io
import json
import shutil
from math import log2

import numpy as np
import pytest
from attacked import ATTACKS, OFTEN, attacked, known_experiment, load_tiny, trained, write_words
from rich.console import Console
from small_run import changed

from fedjax_llm.data.splits import Fractions
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.attacked_run import CONTRADICTED, attack_run, claim_of
from fedjax_llm.experiment.ground import Attacks, ground_of, trunk_of
from fedjax_llm.experiment.measures import text_audit
from fedjax_llm.experiment.prepare import load_dataset, split_sites
from fedjax_llm.runs import encryption, keys
from fedjax_llm.runs.keys import Encryption

PLAIN_ATTACKS = ("loss", "reference", "zlib", "min_k", "min_k_plus")


pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words") / "files")


@pytest.fixture(scope="module")
def experiment(words):
    return known_experiment(words)


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    return trained(experiment, tmp_path_factory.mktemp("runs") / "known")


@pytest.fixture(scope="module")
def found(run):
    return attacked(run)


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own, to spoil."""
    return shutil.copytree(run, tmp_path / "copy")


def secrets(figures, repetitions, coin=False):
    return [one for one in figures["secrets"] if (one["repetitions"], one["coin"]) == (repetitions, coin)]


def claiming(folder, epsilon):
    """The run says that it is private."""
    path = folder / "summary.json"
    claim = {"epsilon": epsilon, "delta": 1e-3, "unit": "record"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"privacy": claim}))


def test_often_stated_secrets_are_given_away_and_controls_are_not(found):
    _, figures, _ = found
    often, controls = secrets(figures, OFTEN), secrets(figures, 0)
    assert (len(often), len(controls), len(secrets(figures, 1))) == (2, 4, 2)
    for one in often:
        assert one["greedy"] >= one["tokens"] - 1
        assert (one["beam"], one["rank"], one["references"]) == (1, 1, ATTACKS.references)
        assert one["exposure"] == pytest.approx(log2(ATTACKS.references + 1))
        assert one["tries"] <= 100
        assert one["value"].startswith("P")
    for one in controls:
        assert one["greedy"] < one["tokens"] - 1
        assert one["foreign_greedy"] < one["tokens"] - 1
        assert one["tries"] > 10_000
    assert np.mean([one["exposure"] for one in controls]) < 4
    assert {one["exposure"] for one in figures["secrets"] if one["coin"]} == {None}


def test_members_are_told_from_others(found, experiment):
    _, figures, _ = found
    assert tuple(figures["membership"]) == PLAIN_ATTACKS
    for name in ("loss", "reference", "min_k"):
        curve = figures["membership"][name]
        assert curve["auc"] > 0.9, name
        assert curve["auc_low"] <= curve["auc"] <= curve["auc_high"]
        assert 2 <= curve["members"] <= ATTACKS.candidates
        assert 2 <= curve["non_members"] <= ATTACKS.candidates


def test_everything_is_written_and_shown(run, found):
    status, figures, seen = found
    assert status == 0
    assert figures["run"] == "known"
    assert (figures["site"], figures["claim"], figures["adapted_modules"]) == (None, None, 3)
    assert figures["model"] == {"name": "tiny", "fingerprint": "0" * 64}
    assert figures["attacks"] == dataclasses.asdict(ATTACKS)
    assert {"packages", "command"} <= set(figures["environment"])
    for name in ("leakage.html", "leakage.md"):
        text = (run / name).read_text()
        assert "What known gives away" in text
        assert "Greedy decoding gives back" in text
        assert "no differential privacy" in text
    for title in ("Planted secrets", "Membership inference", "Audit"):
        assert title in seen
    assert f"{OFTEN}x" in seen
    assert "AUDIT FAILED" not in seen


def test_what_lies_below_the_adapters_changes_nothing_but_time(experiment, run, found, copy):
    assert trunk_of(ground := ground_of(experiment, ATTACKS, load_tiny("", "")), ATTACKS, 1) is not None
    without = dataclasses.replace(ATTACKS, trunk_megabytes=0)
    assert trunk_of(ground, without, 1) is trunk_of(ground, ATTACKS, 0) is None
    _, plain, _ = attacked(copy, without)
    _, kept, _ = found
    for one, other in zip(plain["secrets"], kept["secrets"], strict=True):
        for name in ("greedy", "foreign_greedy", "beam", "foreign_beam", "rank"):
            assert one.get(name) == other.get(name)
        assert one["log_probability"] == pytest.approx(other["log_probability"], abs=1e-3)
    for name, curve in plain["membership"].items():
        assert curve["auc"] == pytest.approx(kept["membership"][name]["auc"], abs=0.01)


def test_shadows_bring_attacks_of_their_own_and_change_no_other(copy, found):
    attacks = dataclasses.replace(ATTACKS, shadows=8, shadow_epochs=30, beams=0, references=0)
    _, figures, _ = attacked(copy, attacks)
    assert tuple(figures["membership"]) == (*PLAIN_ATTACKS, "lira", "lira_offline", "rmia")
    for name in ("lira", "lira_offline", "rmia"):
        assert figures["membership"][name]["auc"] > 0.75, name
    for name in PLAIN_ATTACKS:
        assert figures["membership"][name]["auc"] == pytest.approx(found[1]["membership"][name]["auc"], abs=0.01)
    assert {one["exposure"] for one in figures["secrets"]} == {None}
    assert "| - |" in (copy / "leakage.md").read_text()  # what was not measured is not shown as nought
    assert all("beam" not in one for one in figures["secrets"])


def test_a_claim_that_is_contradicted_is_said_loudly(copy):
    quick = Attacks(candidates=2, references=0, beams=0)
    claiming(copy, 0.01)
    status, figures, seen = attacked(copy, quick)
    assert status == CONTRADICTED == 3
    assert figures["claim"] == {"epsilon": 0.01, "delta": 1e-3, "unit": "record"}
    shown = figures["audit"]
    assert shown["contradicted"] is True
    assert (shown["delta"], shown["claimed"], shown["canaries"], shown["confidence"]) == (1e-3, 0.01, 24, 0.95)
    assert shown["auc"]["auc"] > 0.9
    assert f"AUDIT FAILED: the attacks show epsilon >= {shown['lower_bound']:.2f} (confidence 95%)" in seen
    assert "do not rely on it" in seen
    assert "CONTRADICTED" in (copy / "leakage.html").read_text()


def test_a_weak_claim_stands(copy):
    claiming(copy, 50.0)
    status, figures, seen = attacked(copy, Attacks(candidates=2, references=0, beams=0))
    assert (status, figures["audit"]["contradicted"]) == (0, False)
    assert "AUDIT FAILED" not in seen
    assert "consistent" in seen


def coins(stated, rises, **fields):
    """Figures of secrets that coins planted, and what the base model gave them."""
    base = {number: -50.0 - 7 * (number % 11) for number in range(len(rises))}
    told = [
        {
            "number": number,
            "kind": "phone number",
            "coin": True,
            "repetitions": n,
            "log_probability": base[number] + rise,
        }
        | fields
        for number, (n, rise) in enumerate(zip(stated, rises, strict=True))
    ]
    return told, base


def test_an_audit_needs_canaries_on_both_sides():
    assert text_audit(*coins([1] * 9, [1.0] * 9), 0.05, None) is None
    assert text_audit(*coins([0] * 9, [1.0] * 9), 0.05, None) is None
    assert text_audit(*coins([0, 1] * 9, [1.0] * 18, coin=False), 0.05, None) is None


def test_an_audit_guesses_by_the_rise_over_the_base_model():
    """The base model's own figures differ more than training adds."""
    stated = [0, 1] * 40
    right = text_audit(*coins(stated, [2.0 * n + i * 1e-3 for i, n in enumerate(stated)]), 0.05, None)
    assert (right["claimed"], right["contradicted"], right["delta"]) == (None, False, 1e-5)
    assert (right["auc"]["auc"], right["confidence"], right["canaries"]) == (1.0, 0.95, 80)
    assert right["lower_bound"] > 1.0
    claim = {"epsilon": right["lower_bound"], "delta": 1e-5}
    assert text_audit(*coins(stated, stated), 0.05, claim)["contradicted"] is False
    less = claim | {"epsilon": right["lower_bound"] - 0.01}
    assert text_audit(*coins(stated, stated), 0.05, less)["contradicted"] is True
    wrong = text_audit(*coins(stated, [-2.0 * n for n in stated]), 0.05, None)
    assert (wrong["lower_bound"], wrong["auc"]["auc"]) == (0.0, 0.0)


def test_members_were_trained_on_and_others_were_not(experiment):
    ground = ground_of(experiment, ATTACKS, load_tiny("", ""))
    sites = split_sites(experiment, load_dataset(experiment))
    train, held, rest = (
        {one.id for site in sites for part in parts for one in getattr(site, part)}
        for parts in (("train",), ("test",), ("validation", "test"))
    )
    members, others, population = (
        {one.id for one in own} for own in (ground.members, ground.non_members, ground.population)
    )
    assert members <= train
    assert others <= held
    assert population <= rest - others
    assert not any(name.startswith("secret") for name in members | others | population)
    assert 2 <= len(members) <= ATTACKS.candidates
    assert ground.candidates == (*ground.members, *ground.non_members)
    fewer = ground_of(experiment, dataclasses.replace(ATTACKS, candidates=3), load_tiny("", ""))
    assert (len(fewer.members), len(fewer.non_members)) == (3, 3)
    assert {one.id for one in fewer.members} < members
    assert len(ground.rows) == 8


def test_without_records_held_out_there_is_no_ground(experiment):
    whole = changed(experiment, data__fractions=Fractions(0.1, 0.0))
    with pytest.raises(UserError, match="holds no record out for the test"):
        ground_of(whole, ATTACKS, load_tiny("", ""))


REFUSED = {
    "candidates": (1, "at least 2"),
    "references": (-1, "at least 0"),
    "beams": (-1, "at least 0"),
    "shadows": (2, "even, and at least 4"),
    "shadow_epochs": (0, "at least 1"),
    "significance": (0.5, "above 0 and below 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_attacks_are_refused(name):
    value, message = REFUSED[name]
    with pytest.raises(UserError, match=f"attacks.{name} is {value}; it must be {message}"):
        Attacks(**{name: value})


def test_odd_shadows_are_refused():
    with pytest.raises(UserError, match="it must be even"):
        Attacks(shadows=5)


def refused(folder, message, **options):
    """Before a model is loaded."""

    def load(name, dtype, quantise):
        pytest.fail("loads a model")

    with pytest.raises(UserError, match=message):
        attack_run(folder, ATTACKS, Console(file=io.StringIO()), load_model=load, **options)


def test_what_is_no_run_or_has_not_ended_is_refused(experiment, copy, tmp_path):
    refused(tmp_path / "nowhere", "is not the folder of a run")
    refused(tmp_path / "nowhere", "is not the folder of a run", experiment=experiment)
    refused(copy, "has one adapter for all sites; leave out --site", site="coast")
    summary = (copy / "summary.json").read_text()
    (copy / "summary.json").unlink()
    refused(copy, "the run has not ended; go on with it by --resume")
    (copy / "summary.json").write_text(summary)
    shutil.rmtree(copy / "adapter")
    refused(copy, "has no adapter to attack: it is written when a run ends")


def test_another_experiment_is_refused_and_the_same_one_is_not(experiment, copy):
    other = changed(experiment, training__batch_size=3)
    refused(copy, r"was started with other settings:\n  training.batch_size: 16 -> 3", experiment=other)
    same = changed(experiment, execution__clients_per_chunk=2)  # which changes no result
    status, figures, _ = attacked(copy, Attacks(candidates=2, references=0, beams=0), experiment=same)
    assert status == 0
    assert len(figures["secrets"]) == 32


def test_a_base_run_has_nothing_to_attack(experiment, tmp_path):
    run = trained(changed(experiment, setting="base"), tmp_path / "base")
    refused(run, "has no adapter to attack")


def test_of_local_runs_one_site_is_attacked(experiment, tmp_path):
    fields = {"setting": "local", "federation__rounds": 1, "training__local_steps": 1}
    run = trained(changed(experiment, **fields), tmp_path / "local")
    refused(run, "every site has adapters of its own; name one by --site: coast, hill")
    refused(run, "has no site 'hil'; did you mean 'hill'", site="hil")
    _, figures, _ = attacked(run, Attacks(candidates=2, references=0, beams=0), site="hill")
    assert figures["site"] == "hill"
    assert "adapters of the site" in (run / "leakage.html").read_text()


def test_an_encrypted_run_is_attacked_with_its_key_and_its_figures_are_sealed(experiment, tmp_path):
    (tmp_path / "keys").mkdir()
    keys.make_key(tmp_path / "keys" / "key")
    fields = {"federation__rounds": 1, "training__local_steps": 1}
    sealed = changed(experiment, **fields, output__encryption=Encryption(key_file=str(tmp_path / "keys" / "key")))
    run = trained(sealed, tmp_path / "runs" / "sealed")
    quick = Attacks(candidates=2, references=0, beams=0)
    assert attack_run(run, quick, Console(file=io.StringIO()), load_model=load_tiny) == 0
    figures = json.loads(encryption.read(run / "leakage.json"))
    assert len(figures["secrets"]) == 32
    assert claim_of(run) is None
    value = figures["secrets"][0]["value"].encode()
    for name in ("leakage.json", "leakage.html", "leakage.md"):
        data = (run / name).read_bytes()
        assert value not in data
        assert b"secret" not in data
    (tmp_path / "keys" / "key").rename(tmp_path / "keys" / "moved")
    with pytest.raises(UserError, match="key"):
        attack_run(run, quick, Console(file=io.StringIO()), load_model=load_tiny)
    with keys.using(tmp_path / "keys" / "moved"):
        assert attack_run(run, quick, Console(file=io.StringIO()), load_model=load_tiny) == 0
