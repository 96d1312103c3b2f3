"""Epsilon from the ledger alone: against closed forms, beside true and false claims, and for broken runs."""

import io
import json
import math
from dataclasses import replace
from statistics import NormalDist

import pytest
from rich.console import Console

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import ledger
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import EVERY_SITE
from fedjax_llm.privacy.participation import accounts
from fedjax_llm.runs.recount import Recount, in_words, recount, render

HEADER = ledger.Header(
    unit="patient",
    adjacency="add or remove all records of one patient",
    mechanism="DpSgd",
    delta=1e-5,
    accountant="pld",
    randomness="reproducible",
    accounts={"north": 120, "south": 45, "west": 80},
    shared=(("north", "south"),),
    config=ledger.config_hash({"seed": 1}),
)
NORTH, SOUTH = Event("gaussian", 8.0), Event("gaussian", 6.0, count=2)


def gaussian_epsilon(noise_multipliers, delta):
    """The exact epsilon of unsampled Gaussian releases (Balle & Wang 2018, theorem 8), by bisection."""
    mu = math.sqrt(sum(1 / z**2 for z in noise_multipliers))
    cdf = NormalDist().cdf
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        spent = cdf(mu / 2 - middle / mu) - math.exp(min(middle, 700)) * cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def make_run(folder, rounds=4, header=HEADER, events=None):
    """The folder of an unfinished run with a ledger."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"seed": 1, "privacy": {"mechanism": {"class": "DpSgd"}}}')
    book = ledger.create(folder / ledger.LEDGER, header)
    for number in range(1, rounds + 1):
        released = {"north": NORTH} if number % 2 else {"north": NORTH, "south": SOUTH}
        ledger.append(book, number, "a", events or released, repeatable=True)
    return folder


SHARED = list(accounts(("north", "south"), HEADER.shared))[-1]
NORTH_4, SOUTH_4 = [8.0] * 4, [6.0] * 4
BOTH = gaussian_epsilon(NORTH_4 + SOUTH_4, 1e-5)


def claim(folder, maximum, delta=1e-5, unit="patient", **parts):
    """A summary that states epsilons."""
    accounts = {name: {"epsilon": value} for name, value in parts.items()}
    stated = {"unit": unit, "delta": delta, "epsilon": maximum, "accounts": accounts}
    (folder / "summary.json").write_text(json.dumps({"privacy": stated}))


def text(found: Recount) -> str:
    """What a user reads."""
    seen = io.StringIO()
    render(Console(file=seen, width=200), found)
    return seen.getvalue()


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_epsilon_is_that_of_the_closed_form(run):
    found = recount(run)
    expected = {
        "north": gaussian_epsilon(NORTH_4, 1e-5),
        "south": gaussian_epsilon(SOUTH_4, 1e-5),
        SHARED: BOTH,
    }
    assert found.epsilon == pytest.approx(expected, rel=1e-6)
    assert found.maximum == pytest.approx(BOTH, rel=1e-6), "a patient of both sites bears what both release"
    assert (found.rounds, found.again, found.claims, found.sound) == (4, 0, (), True)


def test_the_question_may_be_for_other_deltas(run):
    found = recount(run, 1e-3, deltas=(1e-7,))
    assert [delta for delta, _ in found.table] == [1e-3, 1e-5, 1e-7]
    for delta, epsilon in found.table:
        assert epsilon == pytest.approx(gaussian_epsilon(NORTH_4 + SOUTH_4, delta), rel=1e-6)
    assert found.maximum == found.table[0][1]
    for wrong in (0.0, 1.0, -1e-5, 2.0):
        with pytest.raises(UserError, match="it must be above 0 and below 1"):
            recount(run, wrong)


def test_rounds_that_were_released_anew_count(run):
    book = ledger.reopen(run / ledger.LEDGER, HEADER, None)
    assert ledger.append(book, 4, "b", {"north": NORTH}, repeatable=True) == 1
    found = recount(run)
    assert (found.rounds, found.again) == (4, 1)
    assert found.epsilon["north"] == pytest.approx(gaussian_epsilon([8.0] * 5, 1e-5), rel=1e-6)
    assert "rounds 5 charged, 1 of them again with fresh noise" in text(found)


def test_a_true_claim_agrees(run):
    found = recount(run)
    claim(run, found.maximum, **found.epsilon)
    found = recount(run)
    assert found.sound
    assert "The claim of summary.json" in text(found)
    assert "agrees with the ledger" in text(found)


def test_a_claim_of_too_little_is_told(run):
    claim(run, BOTH * 0.999, north=1e-3)
    found = recount(run)
    assert not found.sound
    assert set(found.claims[0].understated()) == {"maximum", "north"}
    assert "The claim of summary.json is too small: epsilon 0.001 for north" in text(found)


@pytest.mark.parametrize("maximum", [BOTH * 1.5, None])
def test_a_claim_of_too_much_is_safe(run, maximum):
    claim(run, maximum)
    assert recount(run).sound
    assert "so within" in text(recount(run))


def test_a_claim_is_compared_at_its_own_delta(run):
    claim(run, gaussian_epsilon(NORTH_4 + SOUTH_4, 1e-2) * 1.001, delta=1e-2)
    assert recount(run).sound
    claim(run, gaussian_epsilon(NORTH_4 + SOUTH_4, 1e-2) * 1.001, delta=1e-4)
    assert not recount(run).sound


def test_a_claim_for_another_unit_is_false(run):
    claim(run, 1000.0, unit="record")
    assert not recount(run).sound
    assert "is for one record, but the ledger is for one patient" in text(recount(run))


def test_an_unfinished_run_is_held_to_its_last_line_of_metrics(run):
    def line(number, maximum):
        stated = {"unit": "patient", "delta": 1e-5, "max": maximum, "accounts": {"north": maximum, "west": 0.0}}
        return json.dumps({"round": number, "epsilon": stated}) + "\n"

    three = gaussian_epsilon([8.0] * 3 + [6.0] * 2, 1e-5)
    (run / "metrics.jsonl").write_text(line(2, 0.0) + line(3, three * 1.00001))
    found = recount(run)
    assert found.sound, "round 4 was charged, and not yet claimed"
    assert found.claims[0].place == "metrics.jsonl, round 3"
    (run / "metrics.jsonl").write_text(line(3, three * 0.999))
    assert not recount(run).sound


def test_every_site_is_one_account(tmp_path):
    header = replace(HEADER, unit="site", mechanism="DpFedAvg", accounts={"a": 1, "b": 1}, shared=())
    found = recount(make_run(tmp_path / "run", header=header, events={EVERY_SITE: Event("gaussian", 2.0)}))
    assert found.epsilon == pytest.approx({EVERY_SITE: gaussian_epsilon([2.0] * 4, 1e-5)}, rel=1e-6)


def test_a_run_that_has_released_nothing_has_spent_nothing(tmp_path):
    found = recount(make_run(tmp_path / "run", rounds=0, header=replace(HEADER, shared=())))
    assert (found.maximum, found.rounds, found.sound) == (0.0, 0, True)
    assert "has claimed no epsilon yet" in text(found)


def test_what_is_shown_names_unit_adjacency_and_delta(run):
    shown = text(recount(run, config=HEADER.config))
    assert "at delta 1e-05 for one patient (add or remove all records of one patient)" in shown
    assert "mechanism DpSgd" in shown
    assert "4 Gaussian releases, noise multiplier 8, without sampling" in shown
    assert "the epsilon holds only against those who do not know it" in shown
    assert "not the configuration" not in shown


def test_a_torn_line_and_another_configuration_are_noticed(run):
    with open(run / ledger.LEDGER, "ab") as file:
        file.write(b'{"attempt":0')
    shown = text(recount(run, config="another"))
    assert "half-written line (12 bytes)" in shown
    assert "config.json is not the configuration that the ledger was begun with" in shown
    assert (run / ledger.LEDGER).read_bytes().endswith(b'{"attempt":0'), "reading changes nothing"


def test_runs_without_a_ledger(run, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        recount(tmp_path)
    (run / ledger.LEDGER).unlink()
    with pytest.raises(UserError, match=r"ledger\.jsonl is missing"):
        recount(run)
    (run / "config.json").write_text('{"privacy": {"mechanism": null}}')
    with pytest.raises(UserError, match="without differential privacy"):
        recount(run)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            Event("gaussian", 1.5, 0.05, 400),
            "400 Gaussian releases, noise multiplier 1.5, of Poisson samples (q = 0.05)",
        ),
        (Event("gaussian", 2.0), "1 Gaussian release, noise multiplier 2, without sampling"),
        (Event("banded", 1.0, 0.2, 8, 4), "of cyclic Poisson samples (q = 0.2)"),
        (Event("banded", 1.0, 0.2, 8, 4), "8 steps, noise multiplier 1, correlated over 4 bands"),
        (
            Event("matrix", 3.0, 1.0, 8),
            "8 steps, noise multiplier 3, correlated over the whole run: one Gaussian release",
        ),
    ],
)
def test_events_in_words(event, words):
    assert words in in_words(event)
