"""A site's own budget: never above its limit whatever a server asks, and never less than what was released."""

import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.deployment.site_budget import BudgetSpent, SiteBudget
from fedjax_llm.errors import UserError
from fedjax_llm.privacy import ledger, site_ledger
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import EVERY_SITE, Mechanism
from fedjax_llm.privacy.site_ledger import Terms, terms_of

PLAIN = Event("gaussian", 8.0)
TERMS = Terms("DpFedSgd", "record", "sum", 1.0, "flat", False, PLAIN, "secret")
DELTA = 1e-5


def gaussian_epsilon(noise_multipliers, delta=DELTA):
    """The exact epsilon of unsampled Gaussian releases (Balle & Wang 2018, theorem 8), by bisection."""
    mu = math.sqrt(sum(1 / z**2 for z in noise_multipliers))
    cdf = NormalDist().cdf
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        spent = cdf(mu / 2 - middle / mu) - math.exp(min(middle, 700)) * cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


@pytest.fixture
def path(tmp_path):
    return tmp_path / "site" / "budget.jsonl"


def budget_at(path, epsilon=2.0, **more):
    return SiteBudget(path, epsilon, DELTA, "north", **more)


def rounds_until_refused(budget, event, run="a"):
    for number in range(1, 1000):
        try:
            assert budget.charge(number, 0, event, run=run, computation=f"{run} {number}")
        except BudgetSpent:
            return number - 1
    raise AssertionError("never refused")


def test_rounds_are_charged_up_to_the_limit_and_no_further(path):
    budget = budget_at(path)
    done = rounds_until_refused(budget, PLAIN)
    assert gaussian_epsilon([8.0] * done) <= 2.0 < gaussian_epsilon([8.0] * (done + 1))
    standing = budget.standing()
    assert standing.spent == pytest.approx(gaussian_epsilon([8.0] * done), rel=1e-6)
    assert (standing.limit, standing.runs, standing.releases) == (2.0, 1, done)


def test_a_refused_round_is_not_charged_and_the_message_says_why(path):
    budget = budget_at(path, epsilon=0.1)
    with pytest.raises(BudgetSpent, match=r"round 7 of run 'a' would bring site 'north' to .*budget of 0\.1 for all"):
        budget.charge(7, 0, Event("gaussian", 1.0), run="a")
    assert budget.standing().spent == 0.0


def test_runs_add_up_as_the_accountant_composes_them(path):
    budget = budget_at(path, epsilon=100.0)
    sampled = Event("gaussian", 1.1, 0.1, count=3)
    for number in range(1, 11):
        budget.charge(number, 0, sampled, run="a")
        budget.charge(number, 0, PLAIN, run="b")
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.1)), 30)
    accountant.compose(dp_accounting.GaussianDpEvent(8.0), 10)
    assert budget.standing().spent == pytest.approx(accountant.get_epsilon(DELTA), rel=0.01)
    assert budget.standing().runs == 2


def test_a_second_run_has_what_the_first_has_left(path):
    budget = budget_at(path)
    alone = rounds_until_refused(budget_at(path.parent / "other" / "budget.jsonl"), PLAIN)
    for number in range(1, 4):
        budget.charge(number, 0, PLAIN, run="a")
    assert rounds_until_refused(budget, PLAIN, run="b") == alone - 3


@pytest.mark.parametrize("kind", ["matrix", "banded"])
def test_equal_correlated_noise_of_two_runs_is_two_releases(path, kind):
    budget = budget_at(path, epsilon=100.0)
    event = Event(kind, 4.0, bands=4 if kind == "banded" else 1)
    for run in ("a", "b"):
        for number in (1, 2, 3):
            budget.charge(number, 0, event, run=run)
    assert budget.standing().spent == pytest.approx(gaussian_epsilon([4.0, 4.0]), rel=1e-6)


def test_correlated_noise_allows_no_second_attempt(path):
    budget = budget_at(path, epsilon=100.0)
    budget.charge(1, 0, Event("matrix", 4.0), run="a", computation="x")
    assert not budget.charge(1, 0, Event("matrix", 4.0), run="a", computation="x")
    with pytest.raises(UserError, match="correlated over the run"):
        budget.charge(1, 1, Event("matrix", 4.0), run="a", computation="y")


def test_integer_noise_is_accounted_for(path):
    budget = budget_at(path, epsilon=100.0)
    event = Event("skellam", 4.0, summands=3, sensitivity=500.0, values=64)
    budget.charge(1, 0, event, run="a")
    budget.charge(1, 0, PLAIN, run="b")
    # Skellam noise is a little worse than a Gaussian, and Renyi divergences give a larger figure than closed forms.
    assert gaussian_epsilon([4.0, 8.0]) < budget.standing().spent < 1.5 * gaussian_epsilon([4.0, 8.0])


def test_the_very_same_bits_cost_nothing(path):
    assert budget_at(path).charge(1, 0, PLAIN, run="a", computation="bits")
    before = path.read_bytes()
    assert not budget_at(path).charge(1, 0, PLAIN, run="a", computation="bits")
    assert path.read_bytes() == before


@pytest.mark.parametrize("computation", ["other bits", ""])
def test_a_replayed_attempt_is_refused(path, computation):
    budget = budget_at(path)
    budget.charge(3, 1, PLAIN, run="a", computation="bits" if computation else "")
    with pytest.raises(UserError, match=r"round 3 of run 'a', attempt 1, was charged at site 'north' before"):
        budget.charge(3, 1, PLAIN, run="a", computation=computation)
    assert budget.standing().releases == 1
    assert budget.charge(3, 2, PLAIN, run="a", computation=computation)
    assert budget.standing().releases == 2


@pytest.mark.parametrize(("number", "attempt"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_rounds_are_refused(path, number, attempt):
    with pytest.raises(UserError, match="rounds count from 1, attempts from 0"):
        budget_at(path).charge(number, attempt, PLAIN, run="a")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (None, "has no differential privacy"),
        (replace(TERMS, unit="patient"), "protects one patient, .* for one record"),
        (replace(TERMS, event=Event("gaussian", 0.0)), "adds no noise"),
        (replace(TERMS, event=Event("gaussian", math.nan)), "noise multiplier is nan"),
    ],
)
def test_a_run_that_does_not_protect_is_not_joined(path, terms, message):
    with pytest.raises(UserError, match=message):
        budget_at(path).agree("a", terms)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_norm": 10.0}, r"clip_norm 1\.0 -> 10\.0"),
        ({"scope": "layers"}, "scope flat -> layers"),
        ({"adaptive": True}, "adaptive False -> True"),
        ({"noised": "steps"}, "noised sum -> steps"),
        ({"randomness": "reproducible"}, "randomness secret -> reproducible"),
        ({"event": Event("gaussian", 7.9)}, r"noise_multiplier': 8\.0.* -> .*7\.9"),
    ],
)
def test_terms_hold_for_the_whole_run(path, change, message):
    budget_at(path).agree("a", TERMS)
    budget_at(path).agree("a", TERMS)
    with pytest.raises(UserError, match=message):
        budget_at(path).agree("a", replace(TERMS, **change))
    budget_at(path).agree("b", replace(TERMS, **change))


def test_a_round_with_other_noise_than_agreed_is_refused(path):
    budget = budget_at(path, epsilon=100.0)
    budget.agree("a", TERMS)
    with pytest.raises(UserError, match=r"noise_multiplier=1\.0.*what it joined is .*noise_multiplier=8\.0"):
        budget.charge(1, 0, Event("gaussian", 1.0), run="a")
    budget.charge(1, 0, Event("gaussian", 1.0), run="b")
    with pytest.raises(UserError, match="go on as it began"):
        budget.charge(2, 0, Event("gaussian", 2.0), run="b")


def mechanism_with(events):
    return Mechanism(
        name="DpFedAvg",
        unit="site",
        clip=Clip(0.5, "flat"),
        clipped="deltas",
        noised="sum",
        stddev=np.ones(2),
        weight=2.0,
        denominators=np.ones(2),
        sampling=None,
        examples_per_unit=1,
        cohort_probability=0.5,
        site_weights=None,
        correlated=None,
        adaptive=None,
        events=events,
        adversary="",
        assumptions=(),
    )


def test_a_site_does_not_count_on_cohorts_that_it_cannot_see_drawn():
    secret = terms_of(mechanism_with({EVERY_SITE: Event("gaussian", 3.0, 0.5)}), "north", "secret")
    assert secret.event == Event("gaussian", 3.0, 1.0)
    own = terms_of(mechanism_with({"north": Event("gaussian", 3.0, 0.5), "south": PLAIN}), "north", "secret")
    assert own.event == Event("gaussian", 3.0, 0.5)
    assert (own.clip_norm, own.scope, own.unit, own.adaptive) == (0.5, "flat", "site", False)


ASKED = st.tuples(
    st.sampled_from(["a", "b"]),
    st.integers(1, 4),
    st.integers(0, 2),
    st.sampled_from([2.0, 5.0, 8.0]),
    st.sampled_from(["", "x", "y"]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ASKED, max_size=25))
def test_whatever_a_server_asks_no_more_is_released_than_the_limit(asked):
    """What is computed is counted here, as an adversary would; equal bits, told by their hash, are released once."""
    with tempfile.TemporaryDirectory() as folder:
        budget = SiteBudget(Path(folder) / "budget.jsonl", 2.0, DELTA, "north")
        released = {}
        for number, (run, round_number, attempt, noise, computation) in enumerate(asked):
            try:
                budget.charge(round_number, attempt, Event("gaussian", noise), run=run, computation=computation)
            except UserError:
                continue
            bits = (run, round_number, attempt, computation or number)
            assert released.setdefault(bits, noise) == noise
        total = gaussian_epsilon(released.values()) if released else 0.0
        assert total <= 2.0 * (1 + 1e-6)
        assert budget.standing().spent == pytest.approx(total, rel=1e-6)


class Killed(BaseException):
    """A kill, which nothing catches."""


@pytest.mark.parametrize(("sync", "entries"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_a_kill_after_any_write_leaves_a_charge_or_nothing_computed(path, monkeypatch, sync, entries):
    calls, write = [], os.fsync

    def fsync(handle):
        write(handle)
        calls.append(handle)
        if len(calls) == sync:
            raise Killed

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Killed):
        budget_at(path).charge(1, 0, PLAIN, run="a", computation="x")
    monkeypatch.undo()
    budget = budget_at(path)
    assert budget.standing().releases == entries
    assert budget.charge(1, 0, PLAIN, run="a", computation="x") == (entries == 0)
    assert budget.standing().releases == 1


def test_a_process_that_dies_between_charge_and_computation_has_paid(path):
    code = (
        "import os, sys; from pathlib import Path; from fedjax_llm.deployment.site_budget import SiteBudget\n"
        "from fedjax_llm.privacy.events import Event\n"
        'SiteBudget(Path(sys.argv[1]), 2.0, 1e-5, "north").charge(1, 0, Event("gaussian", 8.0), run="a")\n'
        "os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert budget_at(path).standing().spent == pytest.approx(gaussian_epsilon([8.0]), rel=1e-6)


def test_a_full_disk_stops_the_round(path, monkeypatch):
    budget = budget_at(path)
    budget.charge(1, 0, PLAIN, run="a")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        budget.charge(2, 0, PLAIN, run="a")
    monkeypatch.undo()
    assert budget.standing().releases == 1


@pytest.mark.parametrize("damage", ["shorter", "gone", "edited"])
def test_a_ledger_that_forgets_is_noticed(path, damage):
    budget = budget_at(path)
    for number in (1, 2):
        budget.charge(number, 0, PLAIN, run="a")
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "shorter":
        path.write_bytes(b"".join(lines[:-1]))
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"".join(lines).replace(b'"noise_multiplier":8.0', b'"noise_multiplier":9.0'))
    with pytest.raises(UserError, match="damaged or edited" if damage == "edited" else "lacks entries .* Restore"):
        budget.charge(3, 0, PLAIN, run="a")


def test_delta_and_site_hold_for_good_and_the_limit_is_the_site_s_to_change(path):
    budget_at(path, epsilon=0.5).charge(1, 0, PLAIN, run="a")
    with pytest.raises(UserError, match="delta: 1e-05 -> 1e-06"):
        SiteBudget(path, 2.0, 1e-6, "north").standing()
    with pytest.raises(UserError, match="of other settings"):
        SiteBudget(path, 2.0, DELTA, "south").standing()
    assert budget_at(path, epsilon=3.0).charge(2, 0, PLAIN, run="a")


def test_what_a_run_would_leave_is_told_before_it(path):
    budget = budget_at(path)
    budget.charge(1, 0, PLAIN, run="a")
    assert budget.with_rounds(Event("gaussian", 5.0), 3) == pytest.approx(gaussian_epsilon([8.0] + [5.0] * 3), rel=1e-6)
    assert budget.standing().releases == 1


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0)])
def test_impossible_budgets_are_refused(path, epsilon, delta):
    with pytest.raises(UserError, match="the budget's"):
        SiteBudget(path, epsilon, delta, "north")


def test_two_runs_at_once_are_charged_one_after_the_other(path):
    def run(name):
        for number in range(1, 7):
            budget_at(path, epsilon=50.0).charge(number, 0, PLAIN, run=name)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, "ab"))
    found = site_ledger.charges(ledger.read(path))
    assert sorted((charge.run, charge.round) for charge in found) == [(r, n) for r in "ab" for n in range(1, 7)]
    assert ledger.head(ledger.read(path)) == path.with_name("budget.jsonl.head").read_text().strip()
