"""What is said about a run's privacy: every epsilon with its unit, adjacency and delta, rounded up, and its limits."""

import json
import math

import pytest
import regimes
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.guarantee import Privacy, epsilons
from fedjax_llm.privacy.mechanism import EVERY_SITE, Budget, Mechanism, Population
from fedjax_llm.privacy.participation import accounts
from fedjax_llm.privacy.statement import NOT_COVERED, at_most, bound, line, not_covered, statement, warning

REGIME = regimes.REGIME._replace(unit="patient", rounds=3, local_steps=2)
POPULATION = Population(("a", "b"), (64, 200), (3, 3), (1, 1), (("a", "b"),))
PRIVACY = Privacy(DpSgd(0.5, 1.5, "layers"), "patient", budget_epsilon=9.0, real_data=False)


def made(unit: str = "patient") -> Mechanism:
    config = PRIVACY.mechanism if unit == "patient" else DpFedAvg(noise_multiplier=2.0)
    return config.make(REGIME._replace(unit=unit), POPULATION, Budget(None, 1e-5))


def test_a_statement_holds_all_that_gives_its_epsilons_a_meaning():
    charged = {"a": [Event("gaussian", 1.5, 0.25, 6)], "b": [Event("gaussian", 1.5, 0.08, 4)]}
    spent = {"a": 2.0, "b": 1.0, "a / b": 2.501}
    told = statement(PRIVACY, made(), POPULATION, charged, spent, not_covered(held_out=True, selects_best=False))
    assert json.loads(json.dumps(told)) == told
    assert told["line"] == (
        "epsilon <= 2.51 at delta 1e-05 for one patient (add or remove all records of one patient), "
        "the worst of 2 sites and 1 set of sites that share patients"
    )
    assert (told["mechanism"], told["unit"], told["epsilon"], told["delta"]) == ("DpSgd", "patient", 2.501, 1e-5)
    assert told["adjacency"] == "add or remove all records of one patient"
    assert (told["clip_norm"], told["scope"], told["accountant"]) == (0.5, "layers", "pld")
    assert (told["budget"], told["target"], told["stopped"], told["warning"]) == (9.0, None, None, None)
    one = {"epsilon": 2.0, "noise_multiplier": 1.5, "sampling_probability": 0.25, "releases": 6, "units": 64}
    assert told["accounts"]["a"] == one
    assert told["accounts"]["a / b"] == {**one, "epsilon": 2.501, "releases": 10, "units": None}
    assert told["not_covered"][0].startswith("held-out figures")
    assert told["assumptions"]


def test_the_account_of_whole_sites_counts_sites():
    charged = {EVERY_SITE: [Event("gaussian", 2.0, 1.0, 3)]}
    told = statement(PRIVACY, made("site"), POPULATION, charged, {EVERY_SITE: 3.0}, (), stopped="the budget is spent")
    assert told["accounts"] == {
        EVERY_SITE: {"epsilon": 3.0, "noise_multiplier": 2.0, "sampling_probability": 1.0, "releases": 3, "units": 2}
    }
    assert told["line"].endswith("for one site (add or remove all data of one site), the same for every site")
    assert told["stopped"] == "the budget is spent"


def test_a_line_names_the_only_account_or_how_many_there_are():
    assert line("record", 1e-6, {"all": 1.0}) == (
        "epsilon <= 1.00 at delta 1e-06 for one record (add or remove one record), at 'all', the only site"
    )
    assert line("record", 1e-6, {"a": 1.0, "b": 2.0}).endswith("the worst of 2 sites")
    assert line("record", 1e-6, {}).startswith("epsilon <= 0.00")


@given(st.floats(0, 1e6))
def test_a_printed_epsilon_is_never_below_the_epsilon(epsilon: float):
    printed = float(bound(epsilon).replace(",", ""))
    assert epsilon <= printed <= epsilon + 0.0100001
    assert at_most(epsilon) == f"epsilon <= {bound(epsilon)}"


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(3.21, "3.21"), (1.1, "1.10"), (7.9751, "7.98"), (0.0, "0.00"), (321_456.7, "321,456.70"), (8, "8.00")],
)
def test_what_has_two_decimals_stays_as_it_is(epsilon: float, text: str):
    assert bound(epsilon) == text


def test_the_largest_of_numbers_is_shown_too():
    assert len(bound(1e308).replace(",", "")) == 309 + 3


@pytest.mark.parametrize("epsilon", [None, math.inf, math.nan])
def test_what_is_no_number_is_called_unbounded(epsilon: float | None):
    assert bound(epsilon) == "unbounded"


def test_an_infinite_epsilon_is_no_guarantee():
    assert at_most(math.inf) == "no finite epsilon"
    assert line("record", 1e-6, {"a": math.inf}).startswith("no finite epsilon at delta 1e-06 for one record")


def test_epsilons_add_up_for_those_at_several_sites():
    event = Event("gaussian", 2.0)
    spent = epsilons(accounts("abc", [("a", "b")]), {"a": [event] * 3, "b": [event]}, 1e-5)
    assert spent["a / b"] == epsilons({"x": "x"}, {"x": [event] * 4}, 1e-5)["x"]
    assert spent["a / b"] > spent["a"] > spent["b"] > spent["c"] == 0


@pytest.mark.parametrize(("held_out", "selects_best"), [(False, False), (True, False), (True, True)])
def test_only_limits_that_apply_are_told(held_out: bool, selects_best: bool):
    told = not_covered(held_out=held_out, selects_best=selects_best)
    assert set(NOT_COVERED) < set(told) or told == NOT_COVERED
    assert any("held-out figures" in sentence for sentence in told) == held_out
    assert any("validation" in sentence for sentence in told) == selects_best


def test_only_real_data_with_noise_that_can_be_drawn_again_is_warned_of():
    assert warning(Privacy(real_data=False)) is None
    assert warning(Privacy()) == warning(Privacy(real_data=True))
    assert warning(Privacy(real_data=True, randomness="secret")) is None
    warned = warning(Privacy(real_data=True))
    assert warned is not None
    assert "'secret'" in warned


def test_the_budget_is_the_target_where_no_other_is_given():
    assert Privacy().budget is None
    assert Privacy(DpSgd(), target_epsilon=8.0).budget == 8.0
    assert Privacy(DpSgd(), target_epsilon=8.0, budget_epsilon=3.0).budget == 3.0


def test_who_draws_the_cohorts():
    assert Privacy(DpFedAvg()).draws_cohorts
    assert not Privacy(DpFedAvg(noise=object())).draws_cohorts
    assert not Privacy(DpSgd()).draws_cohorts
