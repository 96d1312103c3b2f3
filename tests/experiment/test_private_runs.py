"""Whole private runs: what is charged, when, and what is said of it; killed, resumed, and out of budget."""

import html
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from killing import at_call, in_a_process
from small_private import DELTA, FIELDS, entries, private, summary
from small_run import changed, go, outcome, write_small

from experiments.privacy import main as look
from fedjax_llm import config
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import training_loop
from fedjax_llm.experiment.finish import without_timing
from fedjax_llm.federation import cohorts, local_work, release, rounds
from fedjax_llm.privacy import ledger, noise
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.runs import metrics
from fedjax_llm.runs.checkpoints import Checkpoints, finished_steps
from fedjax_llm.runs.metrics import MetricsLog
from fedjax_llm.runs.recount import recount

UNITS = {"DpSgd": "record", "DpFedSgd": "record", "DpFedAvg": "site", "LocalDp": "site"}
NOISE = {"DpSgd": "site noise", "DpFedSgd": "sum noise", "DpFedAvg": "sum noise", "LocalDp": "site noise"}
ALL = [(1, 0), (2, 0), (3, 0)]
WARNING = "real data with reproducible randomness: whoever knows the seed can subtract the noise"


class Run(NamedTuple):
    """A finished run, what the user saw, and the secret draws: (round, attempt, purpose, the ledger at that moment)."""

    folder: Path
    seen: str
    draws: list[tuple[int, int, str, list[tuple[int, int]]]]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return config.load(write_small(tmp_path_factory.mktemp("small") / "files"))


@pytest.fixture
def repeats():
    """For a device that gives the same bits again; on others every round that is run again is charged again."""
    if jax.default_backend() != "cpu":
        pytest.skip("only a CPU repeats a round bit for bit")


def watch(patch, folder, draws):
    """Notes every secret draw of a run with what its ledger on the disk holds then. A forecast's key is no secret."""
    forecast = jax.random.key_data(noise.run_key("reproducible", 0, "forecast"))
    for module in (rounds, cohorts, local_work, release):
        original = module.secret_round_key

        def drawn(key, number, attempt, purpose, original=original):
            if not np.array_equal(jax.random.key_data(key), forecast):
                draws.append((number, attempt, purpose, entries(folder)))
            return original(key, number, attempt, purpose)

        patch.setattr(module, "secret_round_key", drawn)


@pytest.fixture(scope="module")
def runs(experiment, tmp_path_factory):
    """Every mechanism's run, never interrupted."""
    done = {}
    for name in FIELDS:
        folder, draws = tmp_path_factory.mktemp(name) / "run", []
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, folder, draws)
            status, seen = go(private(experiment, name, privacy__real_data=name == "LocalDp"), folder)
        assert status == 0
        done[name] = Run(folder, seen, draws)
    return done


def spent(folder):
    """The largest epsilon after each round, as metrics.jsonl has it."""
    return [line["epsilon"]["max"] for line in metrics.read(folder / "metrics.jsonl")]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", FIELDS)
def test_a_round_is_charged_on_the_disk_before_anything_secret_is_drawn(runs, name):
    # Who will be in the round is drawn before, for the charge; nobody sees that yet.
    draws = [draw for draw in runs[name].draws if draw[2] != "cohort"]
    assert {(number, attempt) for number, attempt, purpose, _ in draws if purpose == NOISE[name]} == set(ALL)
    for number, attempt, _, charged in draws:
        assert charged == ALL[:number]
        assert charged[-1] == (number, attempt)


@pytest.mark.parametrize("name", FIELDS)
def test_epsilon_grows_to_what_was_promised_and_the_ledger_says_so_too(runs, name, capsys):
    folder, seen, _ = runs[name]
    stated, curve = summary(folder)["privacy"], spent(folder)
    assert 0 < curve[0] < curve[1] < curve[2] == stated["epsilon"]
    lines = metrics.read(folder / "metrics.jsonl")
    assert lines[-1]["epsilon"]["accounts"] == {name: each["epsilon"] for name, each in stated["accounts"].items()}
    # The table before the first round is that after the last one: cohorts were foreseen, to the release.
    before, *_, after = re.findall(r"^Privacy \(.*?^maximum +[\d.]+", seen, re.M | re.S)
    assert before == after
    found = recount(
        folder, config=ledger.config_hash(json.loads((folder / "config.json").read_text()), config.MAY_CHANGE)
    )
    assert found.sound
    assert found.maximum == pytest.approx(stated["epsilon"], rel=1e-9)
    assert look([str(folder)]) == 0
    assert f"at delta {DELTA:g} for one {UNITS[name]}" in capsys.readouterr().out.replace("\n", " ")


def statements(text):
    """All that gives epsilon a value, as a line or an element of a page."""
    return [part for part in text if re.search(r"epsilon\W{0,6}\d", part, re.I)]


def elements(page):
    """The texts of a page's innermost elements, without its settings, which are a file of their own."""
    page = re.sub(r"<(style|script|pre)\b.*?</\1>", "", page, flags=re.S)
    return [html.unescape(text) for text in re.findall(r">([^<>]+)<", page)] + re.findall(r'aria-label="([^"]+)"', page)


@pytest.mark.parametrize("name", FIELDS)
def test_no_epsilon_without_unit_adjacency_and_delta(runs, name):
    folder, seen, _ = runs[name]
    page, unit = (folder / "report.html").read_text(), UNITS[name]
    adjacency = {"record": "add or remove one record", "site": "add or remove all data of one site"}[unit]
    line = summary(folder)["privacy"]["line"]
    found = {"console": statements(seen.splitlines()), "report": statements(elements(page)), "summary": [line]}
    assert len(found["console"]) >= 5  # the promise, three rounds, the result
    assert len(found["report"]) >= 2
    for texts in found.values():
        for text in texts:
            assert re.search(r"delta 0\.001", text), text
            assert adjacency in text or f"+/-1 {unit}" in text, text
    for line in metrics.read(folder / "metrics.jsonl"):
        assert (line["epsilon"]["unit"], line["epsilon"]["delta"]) == (unit, DELTA)
    heads = [text for text in seen.splitlines() if text.startswith("Privacy (")]
    assert [adjacency in text and "delta 0.001" in text for text in heads] == [True] * 2


@pytest.mark.parametrize("name", FIELDS)
def test_limits_and_warnings_go_with_the_guarantee(runs, name):
    folder, seen, _ = runs[name]
    stated, page = summary(folder)["privacy"], html.unescape((folder / "report.html").read_text())
    assert any("held-out figures" in limit for limit in stated["not_covered"])
    flat = " ".join(seen.split())
    for text in (*stated["not_covered"], stated["adversary"]):
        assert text in flat
        assert text in page
    assert stated["randomness"] == "reproducible"
    warned = [WARNING in text for text in (flat, page, str(stated["warning"]))]
    assert warned == [name == "LocalDp"] * 3  # the run on real data


INSTANTS = {  # where, in which round, a run is cut off; which checkpoints are then finished
    "the first is charged, not run": (training_loop, "run_round", 1, False, []),
    "charged, not run": (training_loop, "run_round", 2, False, [1]),
    "run, not in the metrics": (training_loop, "run_round", 2, True, [1]),
    "in the metrics, no checkpoint": (MetricsLog, "append", 2, True, [1]),
    "checkpoint saved": (Checkpoints, "save", 2, True, [1, 2]),
    "checkpoint saved, the next charged": (training_loop, "run_round", 3, False, [1, 2]),
}


def interrupted(experiment, folder, instant):
    """A run that is stopped at an instant."""
    place, name, call, after, steps = INSTANTS[instant]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch.setattr, place, name, partial(signal.raise_signal, signal.SIGINT), "", call, after)
        assert go(experiment, folder)[0] == 130
    assert finished_steps(folder / "checkpoints") == steps
    return folder


def resumed(experiment, folder):
    status, seen = go(experiment, folder, resume=True)
    assert status == 0
    assert recount(folder).sound
    return seen


@pytest.mark.parametrize("instant", INSTANTS)
@pytest.mark.usefixtures("repeats")
def test_a_repeated_round_has_the_same_noise_and_costs_nothing(experiment, runs, tmp_path, instant):
    unbroken = runs["DpSgd"].folder
    folder = interrupted(private(experiment), tmp_path / "run", instant)
    assert entries(folder) == ALL[: INSTANTS[instant][2]]
    resumed(private(experiment), folder)
    assert outcome(folder) == outcome(unbroken)
    assert (folder / ledger.LEDGER).read_bytes() == (unbroken / ledger.LEDGER).read_bytes()


@pytest.mark.usefixtures("repeats")
def test_killed_between_the_charge_and_the_noise(experiment, runs, tmp_path):
    """As above, but the process is gone at once, and another one goes on."""
    unbroken, folder = runs["DpFedAvg"].folder, tmp_path / "run"
    where = ("fedjax_llm.federation.release", "noised_sum", "", 2)
    assert in_a_process(private(experiment, "DpFedAvg"), folder, *where) == -signal.SIGKILL
    assert entries(folder)[:2] == ALL[:2]
    with (folder / ledger.LEDGER).open("a") as file:  # and in the middle of a line
        file.write('{"attempt":0,"comp')
    resumed(private(experiment, "DpFedAvg"), folder)
    assert outcome(folder) == outcome(unbroken)
    assert (folder / ledger.LEDGER).read_bytes() == (unbroken / ledger.LEDGER).read_bytes()


@pytest.mark.usefixtures("repeats")
def test_lost_checkpoints_cost_nothing_where_all_is_repeated(experiment, runs, tmp_path):
    shutil.copytree(runs["DpSgd"].folder, tmp_path / "run")
    for step in finished_steps(tmp_path / "run" / "checkpoints"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    resumed(private(experiment), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(runs["DpSgd"].folder)
    assert entries(tmp_path / "run") == ALL


def test_another_layout_is_another_release(experiment, runs, tmp_path, monkeypatch):
    folder, draws = interrupted(private(experiment), tmp_path / "run", "run, not in the metrics"), []
    watch(monkeypatch, folder, draws)
    resumed(private(experiment, execution__clients_per_chunk=3), folder)
    assert entries(folder) == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert {draw[:2] for draw in draws} == {(2, 1), (3, 0)}
    ours, unbroken = spent(folder), spent(runs["DpSgd"].folder)
    assert ours[0] == unbroken[0]
    assert ours[0] < ours[1] < ours[2] == summary(folder)["privacy"]["epsilon"]
    assert all(our > other for our, other in zip(ours[1:], unbroken[1:], strict=True))
    assert adapter(folder) != adapter(runs["DpSgd"].folder)


def test_secret_noise_is_new_in_every_process_and_charged_again(experiment, runs, tmp_path):
    secret = private(experiment, privacy__randomness="secret", privacy__real_data=True)
    folder = interrupted(secret, tmp_path / "run", "run, not in the metrics")
    resumed(secret, folder)
    assert entries(folder) == [(1, 0), (2, 0), (2, 1), (3, 0)]
    unbroken = summary(runs["DpSgd"].folder)["privacy"]
    stated = summary(folder)["privacy"]
    assert stated["epsilon"] == spent(folder)[-1] > unbroken["epsilon"]
    assert (stated["randomness"], stated["warning"]) == ("secret", None)
    assert go(secret, tmp_path / "other")[0] == 0
    assert summary(tmp_path / "other")["privacy"]["epsilon"] == unbroken["epsilon"]
    first = [metrics.read(tmp_path / name / "metrics.jsonl")[0]["update_norm"] for name in ("run", "other")]
    assert first[0] != first[1]
    assert len({adapter(tmp_path / "run"), adapter(tmp_path / "other"), adapter(runs["DpSgd"].folder)}) == 3


@pytest.mark.usefixtures("repeats")
def test_correlated_noise_is_never_released_twice(experiment, tmp_path):
    banded = BandedToeplitz(2, amplified=True)
    correlated = private(experiment, privacy__mechanism__noise=banded)
    assert go(correlated, tmp_path / "unbroken")[0] == 0
    folder = interrupted(correlated, tmp_path / "run", "run, not in the metrics")
    before = (folder / ledger.LEDGER).read_bytes()
    with pytest.raises(UserError, match="round 2 was released before with correlated noise"):
        go(changed(correlated, execution__clients_per_chunk=3), folder, resume=True)
    assert (folder / ledger.LEDGER).read_bytes() == before
    resumed(correlated, folder)
    assert outcome(folder) == outcome(tmp_path / "unbroken")


DAMAGE = {
    "its last line is gone": (lambda lines: lines[:-1], "lacks entries that it had when the checkpoint was saved"),
    "a line is gone": (lambda lines: [*lines[:1], *lines[2:]], r"line 2: entry 0 was expected"),
    "less is charged": (
        lambda lines: [line.replace(b'"count":2', b'"count":1') for line in lines],
        "damaged or edited",
    ),
    "it is empty": (lambda lines: [], "line 1: there is no header"),
    "it is missing": (None, "ledger.jsonl is missing"),
}


@pytest.fixture(scope="module")
def halfway(experiment, tmp_path_factory):
    return interrupted(private(experiment), tmp_path_factory.mktemp("halfway") / "run", "checkpoint saved")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_ledger_that_says_too_little_ends_the_run(experiment, halfway, tmp_path, damage):
    edit, message = DAMAGE[damage]
    folder = shutil.copytree(halfway, tmp_path / "run")
    path = folder / ledger.LEDGER
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink() if edit is None else path.write_bytes(b"".join(edit(lines)))
    with pytest.raises(UserError, match=message):
        go(private(experiment), folder, resume=True)
    assert finished_steps(folder / "checkpoints") == [1, 2]
    assert not (folder / "summary.json").exists()


def test_the_budget_ends_a_run(experiment, runs, tmp_path):
    unbroken = runs["DpSgd"].folder
    first, second, _ = spent(unbroken)
    limited = private(experiment, privacy__budget_epsilon=(first + second) / 2)
    status, seen = go(limited, tmp_path / "run")
    assert status == 0
    found, flat = summary(tmp_path / "run"), " ".join(seen.split())
    assert (found["rounds"], found["rounds_done"], found["privacy"]["epsilon"]) == (3, 1, first)
    assert entries(tmp_path / "run") == ALL[:1]
    sites, others = (metrics.read(folder / "metrics.jsonl")[0]["sites"] for folder in (tmp_path / "run", unbroken))
    assert sites != others  # another configuration: neither samples nor noise of that run
    assert "the run will end before that" in flat
    assert f"The privacy budget ends the run: {found['privacy']['stopped']}." in flat
    assert re.match(
        r"round 2 would bring it to epsilon <= .* at delta 0.001 .*: it does not run", found["privacy"]["stopped"]
    )
    page = html.unescape((tmp_path / "run/report.html").read_text())
    assert "1 of 3 rounds (stopped by the privacy budget)" in page
    assert found["privacy"]["stopped"] in page
    for text in statements(seen.splitlines()) + statements(elements(page)):
        assert re.search(r"delta 0\.001", text), text
        assert "add or remove one record" in text or "+/-1 record" in text, text
    before = outcome(tmp_path / "run")
    assert "The privacy budget ends the run" in resumed(limited, tmp_path / "run")
    assert outcome(tmp_path / "run") == before


def test_a_budget_below_one_round(experiment, tmp_path):
    """Nothing is trained, nothing is spent, and the result is the base model."""
    fields = {"evaluation__validation_every": 1, "output__select": "best", "privacy__budget_epsilon": 0.1}
    limited = private(experiment, **fields)
    assert go(limited, tmp_path / "run")[0] == 0
    found, evaluation = summary(tmp_path / "run"), json.loads((tmp_path / "run/evaluation.json").read_text())
    assert (found["rounds_done"], found["tokens_trained"], found["privacy"]["epsilon"]) == (0, 0, 0.0)
    assert evaluation["final"] == evaluation["base"]
    assert found["final"] == found["base"]
    assert all(answer["base"] == answer["final"] for answer in evaluation["generations"])
    assert "0 of 3 rounds (stopped by the privacy budget)" in (tmp_path / "run/report.html").read_text()
    assert "The privacy budget ends the run: round 1" in resumed(limited, tmp_path / "run")
    again = summary(tmp_path / "run")
    assert (without_timing(again), entries(tmp_path / "run")) == (without_timing(found), [])


def test_noise_for_a_target_lasts_for_all_rounds(experiment, tmp_path):
    private_run = changed(experiment, privacy=Privacy(LocalDp(0.1), unit="site", target_epsilon=3.0, delta=DELTA))
    assert go(private_run, tmp_path / "run")[0] == 0
    found = summary(tmp_path / "run")
    assert (found["rounds_done"], found["privacy"]["stopped"], found["privacy"]["budget"]) == (3, None, 3.0)
    assert 2.98 < found["privacy"]["epsilon"] <= 3.0
    # Each site has noise for the rounds that it is in: one that is in fewer needs less for the same epsilon.
    noise = {name: each["noise_multiplier"] for name, each in found["privacy"]["accounts"].items()}
    times = Counter(name for line in metrics.read(tmp_path / "run/metrics.jsonl") for name in line["cohort"])
    assert sorted(noise, key=noise.__getitem__) == sorted(noise, key=lambda name: (times[name], noise[name]))
    assert len(set(noise.values())) == len(set(times.values())) > 1


def test_without_training_there_is_nothing_to_protect(experiment, tmp_path):
    """The base model is evaluated even under a privacy that no training could have."""
    impossible = private(experiment, setting="base", privacy__delta=0.5, privacy__unit="site")
    status, seen = go(impossible, tmp_path / "run")
    assert status == 0
    assert summary(tmp_path / "run")["privacy"] is None
    assert not (tmp_path / "run" / ledger.LEDGER).exists()
    assert statements(seen.splitlines()) == []
    assert "Calibrating" not in seen


def test_a_run_without_a_mechanism_claims_nothing(experiment, tmp_path):
    assert go(changed(experiment, federation__rounds=1), tmp_path / "run")[0] == 0
    assert summary(tmp_path / "run")["privacy"] is None
    assert not (tmp_path / "run" / ledger.LEDGER).exists()
    assert metrics.read(tmp_path / "run/metrics.jsonl")[0]["epsilon"] is None


SLOW = """
import sys
from fedjax_llm import config
from fedjax_llm.experiment import run
from fedjax_llm.experiment.training_loop import run_rounds
config.check(config.load({config!r}))
print([name for name in ("dp_accounting", "jax_privacy", "scipy") if name in sys.modules])
"""


def test_a_run_without_privacy_starts_without_its_libraries(experiment, tmp_path):
    path = write_small(tmp_path / "files")
    command = [sys.executable, "-c", SLOW.format(config=str(path))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
