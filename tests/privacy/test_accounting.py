"""Epsilon and delta against closed forms, jax-privacy, dp_accounting's own accountants, and known figures."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import dp_accounting
import hypothesis
import hypothesis.strategies as st
import pytest
from dp_accounting import NeighboringRelation

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting
from fedjax_llm.privacy.accounting import delta_of, epsilon, epsilon_curve, guarantee
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.gaussian_releases import releases_of, to_dp_event
from fedjax_llm.privacy.mechanism import Budget, Population, Regime

gaussian = partial(Event, "gaussian")
STEPS = ("sgd", 1.0, True, 0.0, "float32", "Sum")
"""The end of a ``Regime``: of steps that a mechanism for gradients accepts."""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own: nothing that another version computed is believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDJAX_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def normal_below(x):
    """The normal distribution function."""
    return math.erfc(-x / math.sqrt(2)) / 2


def analytic_delta(noise_multiplier, eps):
    """Balle & Wang 2018, theorem 8, as it stands."""
    shift = 1 / noise_multiplier
    return normal_below(shift / 2 - eps / shift) - math.exp(eps) * normal_below(-shift / 2 - eps / shift)


def analytic_epsilon(noise_multiplier, delta):
    """Its inverse, by bisection."""
    low, high = 0.0, 600.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if analytic_delta(noise_multiplier, middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise_multiplier", "count"), [(1.0, 1), (0.3, 1), (8.0, 20), (5.0, 1000), (300.0, 10)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_unsampled_releases_cost_the_analytic_gaussian_and_never_less(noise_multiplier, count, delta):
    expected = analytic_epsilon(noise_multiplier / math.sqrt(count), delta)
    found = guarantee([gaussian(noise_multiplier, count=count)], delta)
    assert found.accountant == "gaussian"
    assert expected <= found.epsilon <= expected * (1 + 1e-6)
    assert epsilon([gaussian(noise_multiplier, count=count)], delta, "rdp") > expected


@pytest.mark.parametrize(("noise_multiplier", "count"), [(1.0, 1), (5.0, 1000), (300.0, 1000), (50.0, 100_000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-8])
def test_pld_stays_above_the_truth_that_sampling_almost_everybody_approaches(noise_multiplier, count, delta):
    almost = releases_of([gaussian(noise_multiplier, 1 - 1e-12, count)])
    expected = analytic_epsilon(noise_multiplier / math.sqrt(count), delta)
    assert expected - 1e-8 <= accounting._pld_epsilon(almost, delta) <= expected * 1.001


@pytest.mark.parametrize("delta", [1e-12, 1e-14])
def test_pld_is_not_believed_where_rounding_would_decide(delta):
    # dp_accounting's own answer at this delta is below the truth.
    event = gaussian(5.0, 1 - 1e-12, 1000)
    assert math.isnan(accounting._pld_epsilon(releases_of([event]), delta))
    assert guarantee([event], delta).epsilon >= analytic_epsilon(5 / math.sqrt(1000), delta) - 1e-8


@pytest.mark.parametrize(
    ("event", "delta", "pld", "rdp"),
    [
        (gaussian(1.0, 0.01, 1000), 1e-5, 1.828, 2.101),
        (gaussian(1.0, 0.1, 100), 1e-3, 4.784, 5.655),
        (gaussian(2.0, 1.0, 20), 1e-3, 8.787, 9.733),
        (gaussian(1.0, 1.0, 20), 1e-3, 23.1, None),
        (gaussian(4.0, 1.0, 20), 1e-3, 3.61, None),
        (gaussian(8.0, 1.0, 20), 1e-3, 1.55, None),
        (gaussian(1.0), 1e-5, 4.377, 4.729),
    ],
)
def test_known_figures(event, delta, pld, rdp):
    digits = 5e-4 if rdp else 5e-2
    assert epsilon([event], delta) == pytest.approx(pld, abs=digits + 1e-3)
    if rdp:
        assert epsilon([event], delta, "rdp") == pytest.approx(rdp, abs=digits)
        assert guarantee([event], delta, "rdp").accountant == "rdp"


def test_replacement_would_mean_two_things_and_is_never_used():
    """Under REPLACE_ONE one accountant doubles the sensitivity and the other does not."""
    figures = {}
    for relation in (NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE):
        for name, accountant in {
            "pld": dp_accounting.pld.PLDAccountant(neighboring_relation=relation, value_discretization_interval=1e-3),
            "rdp": dp_accounting.rdp.RdpAccountant(neighboring_relation=relation),
        }.items():
            figures[name, relation.name] = accountant.compose(to_dp_event([gaussian(1.0)])).get_epsilon(1e-5)
    assert figures["pld", "REPLACE_ONE"] == pytest.approx(9.997, abs=1e-3)
    assert figures["rdp", "REPLACE_ONE"] == pytest.approx(4.729, abs=1e-3)
    assert figures["rdp", "REPLACE_ONE"] < figures["pld", "REPLACE_ONE"] / 2

    almost = releases_of([gaussian(1.0, 1 - 1e-12)])
    assert accounting._pld_epsilon(almost, 1e-5) == pytest.approx(figures["pld", "ADD_OR_REMOVE_ONE"], abs=1e-4)
    assert accounting._rdp_accountant(almost).neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE


def test_jax_privacy_agrees():
    from jax_privacy.accounting import DpParams, DpsgdTrainingAccountant, PldAccountantConfig, RdpAccountantConfig
    from jax_privacy.experimental import accounting as events

    params = DpParams(noise_multipliers=1.3, batch_size=50, num_samples=1000, delta=1e-4)
    for name, config in {
        "pld": PldAccountantConfig(value_discretization_interval=1e-3),
        "rdp": RdpAccountantConfig(),
    }.items():
        expected = DpsgdTrainingAccountant(config).compute_epsilon(200, params)
        assert epsilon([gaussian(1.3, 0.05, 200)], 1e-4, name) == pytest.approx(expected, rel=1e-3)
    assert to_dp_event([gaussian(1.3, 0.05, 200)]) == events.dpsgd_event(1.3, 200, sampling_prob=0.05)
    banded = Event("banded", 1.3, 0.05, 201, bands=4)
    assert to_dp_event([banded]) == events.amplified_bandmf_event(1.3, 201, num_bands=4, sampling_prob=0.05)


@pytest.mark.parametrize(("bands", "budget"), [(1, Budget(None, 1e-4)), (1, Budget(3.0, 1e-4, "rdp")), (4, None)])
def test_a_plan_of_jax_privacy_releases_the_same_with_the_same_noise(bands, budget, monkeypatch):
    """One band is DP-SGD. Clip norm and sampling are a unit's own: not rescaled to 1, and within its group."""
    from jax_privacy.batch_selection import PartitionType
    from jax_privacy.experimental import execution_plan

    asked, make = {}, execution_plan.noise_addition.matrix_factorization_privatizer

    def privatizer(matrix, *, stddev, prng_key, dtype):
        asked["stddev"] = stddev
        return make(matrix, stddev=stddev, prng_key=prng_key, dtype=dtype)

    monkeypatch.setattr(execution_plan.noise_addition, "matrix_factorization_privatizer", privatizer)
    budget = budget or Budget(None, 1e-4)
    given = budget.epsilon is None
    config = execution_plan.BandMFExecutionPlanConfig.default(
        num_bands=bands,
        iterations=18,
        epsilon=budget.epsilon,
        delta=None if given else budget.delta,
        noise_multiplier=1.3 if given else None,
        l2_clip_norm=0.7,
        rescale_to_unit_norm=False,
        sampling_prob=0.05 * bands,
        partition_type=PartitionType.INDEPENDENT,
        accountant=dp_accounting.rdp.RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE),
    )
    theirs = config.plan
    noise = BandedToeplitz(bands) if bands > 1 else None
    regime = Regime("federated", "record", 9, None, "uniform", 20, 2, None, "example", *STEPS)
    mechanism = DpSgd(0.7, 1.3 if given else None, noise=noise).make(
        regime, Population(("a",), (400,), (9,), (1,)), budget
    )
    assert float(mechanism.stddev[0] * mechanism.clip.norm) == pytest.approx(
        asked["stddev"], rel=1e-6 if given else 2e-3
    )
    run = [mechanism.events["a"]] * 9
    if given:
        assert to_dp_event(run) == theirs.dp_event
    spent = dp_accounting.pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3).compose(theirs.dp_event)
    assert epsilon(run, budget.delta) == pytest.approx(spent.get_epsilon(budget.delta), rel=1e-3 if given else 5e-3)


def test_events_in_the_words_of_dp_accounting():
    one = dp_accounting.GaussianDpEvent(2.0)
    sampled = dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.0))
    assert to_dp_event([]) == dp_accounting.NoOpDpEvent()
    assert to_dp_event([gaussian(2.0, count=0)]) == dp_accounting.NoOpDpEvent()
    assert to_dp_event([gaussian(2.0)]) == one
    assert to_dp_event([gaussian(2.0, count=3)]) == dp_accounting.SelfComposedDpEvent(one, 3)
    assert to_dp_event([Event("matrix", 2.0, 0.5, 64)] * 2) == one
    steps = [Event("banded", 2.0, 1.0, 1, bands=4)] * 5
    assert to_dp_event(steps) == dp_accounting.SelfComposedDpEvent(one, 2)
    assert to_dp_event([gaussian(2.0), gaussian(1.0, 0.5)]) == dp_accounting.ComposedDpEvent([sampled, one])
    assert to_dp_event([gaussian(0.0, 0.5)]) == dp_accounting.NonPrivateDpEvent()


def test_a_mixed_composition_is_that_of_dp_accounting_and_no_order_matters():
    events = [gaussian(3.0, 1.0, 4), gaussian(1.5, 0.1, 50), Event("matrix", 2.0, count=9)]
    theirs = dp_accounting.pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3).compose(to_dp_event(events))
    found = guarantee(events, 1e-4)
    assert found.accountant == "pld"
    assert found.epsilon == pytest.approx(theirs.get_epsilon(1e-4), rel=1e-4)
    assert guarantee(events[::-1], 1e-4, keep=False) == found
    assert delta_of(events, found.epsilon) == pytest.approx(1e-4, rel=1e-3)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert guarantee([], 1e-5) == (0.0, 1e-5, "none")
    assert delta_of([], 1.0) == 0.0
    bare = [gaussian(1.0, 0.1, 10), gaussian(0.0, 0.01)]
    assert guarantee(bare, 1e-5) == (math.inf, 1e-5, "none")
    assert delta_of(bare, 1.0) == 1.0


def test_tiny_noise_has_a_finite_figure():
    """Noise of 0.02 clip norms over 200 rounds: a grid of 1e-3 would need gigabytes."""
    found = guarantee([gaussian(0.02, 0.8, 200)], 1e-5)
    assert found.accountant == "pld"
    # In four rounds of five, a loss of 1 / (2 z^2) = 1250 on average; and less than without any sampling.
    assert 200_000 < found.epsilon < epsilon([gaussian(0.02, 1.0, 200)], 1e-5) < 260_000


@pytest.mark.parametrize("event", [gaussian(1e-4, 0.5, 100), gaussian(1e-6, 0.3, 10), gaussian(1e4, 1e-6, 10)])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_extreme_noise_has_a_figure_within_what_no_sampling_costs(event, accountant):
    without = epsilon([replace(event, sampling_probability=1.0)], 1e-5, accountant)
    assert math.isfinite(without)
    assert 0 <= epsilon([event], 1e-5, accountant) <= without


def test_without_an_answer_from_pld_the_smaller_of_the_other_bounds_holds(monkeypatch):
    def too_large(releases):
        raise MemoryError

    monkeypatch.setattr(accounting, "_loss_distribution", too_large)
    often, rarely = gaussian(0.05, 0.9, 50), gaussian(1.0, 0.01, 100)
    assert guarantee([often], 1e-5, keep=False).accountant == "gaussian"
    assert guarantee([often], 1e-5, keep=False).epsilon == epsilon([replace(often, sampling_probability=1.0)], 1e-5)
    assert guarantee([rarely], 1e-5, keep=False) == guarantee([rarely], 1e-5, "rdp")
    assert delta_of([rarely], epsilon([rarely], 1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_orders_that_do_not_converge_are_dropped_without_a_word(caplog):
    with caplog.at_level("WARNING"):
        assert math.isfinite(epsilon([gaussian(40.0, 0.5, 10)], 1e-5, "rdp"))
    assert not caplog.records


@pytest.mark.parametrize(("noise_multiplier", "eps"), [(1.0, 0.0), (1.0, 3.0), (0.5, 6.0), (0.2, 30.0), (50.0, 0.01)])
def test_delta_is_the_analytic_one(noise_multiplier, eps):
    expected = analytic_delta(noise_multiplier, eps)
    assert expected * (1 - 1e-12) <= delta_of([gaussian(noise_multiplier)], eps) <= expected * (1 + 1e-6)
    almost = delta_of([gaussian(noise_multiplier, 1 - 1e-12)], eps)
    assert expected * (1 - 1e-6) <= almost <= expected * 1.001
    assert delta_of([gaussian(noise_multiplier)], eps, "rdp") >= expected


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    noise=st.floats(0.7, 4.0),
    probability=st.floats(0.01, 0.9),
    count=st.integers(1, 60),
    accountant=st.sampled_from(["pld", "rdp"]),
)
def test_more_noise_less_sampling_fewer_rounds_and_a_larger_delta_cost_less(noise, probability, count, accountant):
    event = gaussian(noise, probability, count)
    ask = partial(guarantee, accountant=accountant, keep=False)
    full = ask([event], 1e-5).epsilon
    assert ask([replace(event, noise_multiplier=noise * 1.1)], 1e-5).epsilon < full
    assert ask([replace(event, sampling_probability=probability * 0.9)], 1e-5).epsilon < full
    assert ask([replace(event, count=count + 5)], 1e-5).epsilon > full
    assert ask([event], 1e-4).epsilon < full
    assert full <= ask([event, gaussian(30.0)], 1e-5).epsilon
    if accountant == "pld":
        assert full <= guarantee([event], 1e-5, "rdp", keep=False).epsilon


def test_the_curve_ends_where_the_whole_does_and_asks_once_for_each_composition(monkeypatch):
    asked = []

    def counting(events, delta, accountant="pld"):
        asked.append(releases_of(events))
        return epsilon(events, delta, accountant)

    monkeypatch.setattr(accounting, "epsilon", counting)
    rounds = [[], [gaussian(2.0, 0.2, 3)], [], [gaussian(2.0, 0.2, 3)], [gaussian(4.0)]]
    curve = epsilon_curve(rounds, 1e-5)
    assert curve[0] == 0.0
    assert curve[1] == curve[2] == epsilon([gaussian(2.0, 0.2, 3)], 1e-5)
    assert curve[3] == epsilon([gaussian(2.0, 0.2, 6)], 1e-5)
    assert curve[4] == epsilon([event for events in rounds for event in events], 1e-5)
    assert curve == sorted(curve)
    assert len(asked) == len(set(asked)) == 4
    assert epsilon_curve([], 1e-5) == []


def test_the_second_time_no_accounting_is_done(monkeypatch):
    events = [gaussian(1.7, 0.3, 7)]
    first = guarantee(events, 1e-5), guarantee(events, 1e-5, "rdp"), delta_of(events, 2.0)

    def refuse(*_):
        raise AssertionError("accounted again")

    for name in ("_pld_epsilon", "_rdp_epsilon", "_gaussian_epsilon", "_loss_distribution", "_gaussian_delta"):
        monkeypatch.setattr(accounting, name, refuse)
    assert (guarantee(events, 1e-5), guarantee(events, 1e-5, "rdp"), delta_of(events, 2.0)) == first
    with pytest.raises(AssertionError, match="again"):
        guarantee(events, 1e-6)
    with pytest.raises(AssertionError, match="again"):
        guarantee([replace(events[0], count=8)], 1e-5)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (gaussian(-1.0), r"noise multiplier is -1\.0"),
        (gaussian(math.nan), "noise multiplier is nan"),
        (gaussian(math.inf), "noise multiplier is inf"),
        (gaussian(1.0, 0.0), r"sampling probability is 0\.0; it must be in \(0, 1\]"),
        (gaussian(1.0, 1.5), r"sampling probability is 1\.5"),
        (gaussian(1.0, 1.0, -1), "count is -1"),
        (Event("banded", 1.0, 0.5, 4, bands=0), "bands 0"),
        (Event("gausian", 1.0), "did you mean 'gaussian'"),
    ],
)
def test_impossible_events_are_refused(event, message):
    for ask in (to_dp_event, partial(epsilon, delta=1e-5), partial(delta_of, epsilon=1.0)):
        with pytest.raises(UserError, match=message):
            ask([event])


def test_impossible_questions_are_refused():
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(UserError, match=f"delta is {delta}; it must be larger than 0 and smaller than 1"):
            epsilon([gaussian(1.0)], delta)
    for eps in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=f"epsilon is {eps}"):
            delta_of([gaussian(1.0)], eps)
    with pytest.raises(UserError, match="unknown accountant 'pdl'; did you mean 'pld'"):
        epsilon([gaussian(1.0)], 1e-5, "pdl")


def test_importing_costs_neither_dp_accounting_nor_scipy():
    code = "import sys, fedjax_llm.privacy.calibration; print({'scipy', 'dp_accounting'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
