"""Words about epsilon: never less than it is, never without unit and delta."""

import subprocess
import sys

import pytest
from private_runs import privacy, spent

from fedjax_llm.runs import statement


def test_words_about_epsilon_need_none_of_the_libraries_that_account_for_it():
    heavy = "{'dp_accounting', 'jax_privacy', 'scipy'}"
    program = f"import sys, fedjax_llm.runs.statement; sys.exit(str({heavy} & sys.modules.keys() or ''))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == ""


def test_what_is_spent_names_unit_adjacency_and_delta():
    line = spent({"eye": 3.2, "skin": 1.0}, "patient", 1e-6)
    assert statement.spent(line, 8.0) == "epsilon 3.20 of 8 (+/-1 patient, delta 1e-06)"
    assert statement.spent(line) == "epsilon 3.20 (+/-1 patient, delta 1e-06)"
    assert statement.spent(None, 8.0) == "epsilon -"


def test_the_worst_accounts_come_first_and_the_unbounded_before_all():
    accounts = privacy({"a": 1.0, "b": 3.0, "c": 1.0, "d": None, "e": 2.0})["accounts"]
    assert [name for name, _ in statement.worst(accounts, 4)] == ["d", "b", "e", "a"]
    assert "1 more" in statement.left_out(accounts, 4)
    assert statement.left_out(accounts, 5) == ""


def test_what_is_not_known_of_an_account_is_a_dash():
    figures = {"epsilon": 1.0, "noise_multiplier": 2.0, "sampling_probability": None, "releases": 3, "units": None}
    assert statement.cells(figures) == ["1.00", "2", "-", "3", "-"]


@pytest.mark.parametrize(
    ("epsilon", "part"),
    [
        (1.0, "by a factor of at most 2.72 (e^epsilon)"),
        (25.0, "too large to mean anything"),
        (None, "promises nothing"),
    ],
)
def test_the_meaning_is_told_as_it_is(epsilon, part):
    text = statement.meaning(privacy({"eye": epsilon}, "patient"))
    assert part in text
    assert "adding or removing all records of one patient" in text
    assert "delta 1e-05" in text


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        ({"rounds": 1}, "1 round"),
        ({"rounds": 20, "rounds_done": 20, "privacy": None}, "20 rounds"),
        ({"rounds": 20, "rounds_done": 9, "privacy": None}, "9 of 20 rounds"),
        ({"rounds": 20, "rounds_done": 0, "privacy": privacy({"a": 0.0}, stopped="it would cost too much")},
         "0 of 20 rounds (stopped by the privacy budget)"),
    ],
)  # fmt: skip
def test_rounds_done_are_told_beside_those_planned(summary, text):
    assert statement.rounds_done(summary) == text


def test_the_series_of_epsilon_leaves_out_what_has_none():
    epsilons = [None, spent({"a": 1.0, "b": 0.5}), spent({"a": None, "b": 0.5}), spent({"a": 2.0, "b": 2.0})]
    lines = [{"round": number, "epsilon": epsilon} for number, epsilon in enumerate(epsilons, 1)]
    assert statement.series(lines) == ([(2, 1.0), (4, 2.0)], [(2, 0.5), (4, 2.0)])
