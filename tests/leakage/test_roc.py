"""ROC curves against pair counts, jax_privacy's auditor and scipy; intervals against known areas."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax_privacy.auditing import CanaryScoreAuditor
from scipy import stats

from fedjax_llm.errors import UserError
from fedjax_llm.leakage.roc import roc

tied = st.lists(st.integers(-4, 4), min_size=2, max_size=30).map(np.array)
"""Scores with many ties."""


def pair_counts(members, non_members):
    """psi of DeLong et al.: 1 where the member is above, 1/2 where they tie, [M, N]."""
    return (members[:, None] > non_members) + 0.5 * (members[:, None] == non_members)


def hull_area(fpr, tpr):
    """The area below the least concave curve above an ROC curve: what tossing coins between thresholds gives."""
    hull = []
    for x, y in zip(fpr, tpr, strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) < (y1 - y0) * (x - x0):
                break
            hull.pop()
        hull.append((x, y))
    return np.trapezoid([y for _, y in hull], [x for x, _ in hull])


def gaussian(seed, shift, members=300, non_members=200):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, members), rng.normal(0, 1, non_members)


@given(tied, tied)
def test_the_area_counts_pairs(members, non_members):
    found, psi = roc("loss", members, non_members), pair_counts(members, non_members)
    assert found.auc == pytest.approx(psi.mean(), abs=1e-12)
    assert found.auc == pytest.approx(stats.mannwhitneyu(members, non_members).statistic / psi.size, abs=1e-12)
    assert found.auc == pytest.approx(np.trapezoid(found.tpr, found.fpr), abs=1e-12)
    assert 0 <= found.auc_low <= found.auc + 1e-12
    assert found.auc - 1e-12 <= found.auc_high <= 1
    assert (found.members, found.non_members) == (len(members), len(non_members))


@given(tied, tied)
def test_the_auditors_area_is_that_of_the_curves_hull(members, non_members):
    found = roc("loss", members, non_members)
    auditor = CanaryScoreAuditor(members, non_members).attack_auroc()
    assert hull_area(found.fpr, found.tpr) == pytest.approx(auditor, abs=1e-9)


@given(tied, tied)
def test_swapped_scores_mirror_the_area(members, non_members):
    one, other = roc("a", members, non_members), roc("b", non_members, members)
    negated = roc("c", -non_members, -members)
    assert other.auc == pytest.approx(1 - one.auc, abs=1e-12)
    assert (other.auc_low, other.auc_high) == pytest.approx((1 - one.auc_high, 1 - one.auc_low), abs=1e-9)
    assert (negated.auc, negated.auc_low, negated.auc_high) == pytest.approx((one.auc, one.auc_low, one.auc_high))


@given(tied, tied, st.integers(0, 1000))
def test_only_the_order_of_scores_counts(members, non_members, seed):
    one = roc("a", members, non_members)
    rng = np.random.default_rng(seed)
    other = roc("b", rng.permutation(np.exp(members)), rng.permutation(np.exp(non_members)))
    assert (one.auc, one.auc_low, one.auc_high) == pytest.approx((other.auc, other.auc_low, other.auc_high))
    assert one.tpr_at == other.tpr_at
    assert np.array_equal(one.fpr, other.fpr)
    assert np.array_equal(one.tpr, other.tpr)


@given(tied, tied)
def test_the_curve_has_every_threshold(members, non_members):
    found = roc("a", members, non_members)
    expected = [(0.0, 0.0)]
    for cut in sorted({*members, *non_members}, reverse=True):
        expected.append(((non_members >= cut).mean(), (members >= cut).mean()))
    np.testing.assert_allclose(np.stack([found.fpr, found.tpr], axis=1), expected, atol=1e-12)
    assert (found.fpr[-1], found.tpr[-1]) == (1, 1)


def test_the_interval_is_delongs_on_the_logit_scale():
    members, non_members = gaussian(0, 1.0, 12, 9)
    psi = pair_counts(members, non_members)
    variance = np.var(psi.mean(axis=1), ddof=1) / 12 + np.var(psi.mean(axis=0), ddof=1) / 9
    logit = stats.logistic.ppf(psi.mean())
    half = stats.norm.ppf(0.95) * math.sqrt(variance) / (psi.mean() * (1 - psi.mean()))
    found = roc("a", members, non_members, confidence=0.9)
    assert (found.auc_low, found.auc_high) == pytest.approx(tuple(stats.logistic.cdf([logit - half, logit + half])))


@pytest.mark.parametrize(("shift", "members"), [(0.0, 60), (0.5, 60), (1.5, 150)])
def test_the_interval_covers_the_true_area_as_often_as_it_says(shift, members):
    # Misses of 500 intervals at 95 %: within a binomial's range of false-alarm rate 1e-6, on either side.
    truth = stats.norm.cdf(shift / math.sqrt(2))
    found = [roc("a", *gaussian(seed, shift, members, 80)) for seed in range(500)]
    misses = sum(not one.auc_low <= truth <= one.auc_high for one in found)
    assert stats.binom.ppf(5e-7, 500, 0.05) <= misses <= stats.binom.isf(5e-7, 500, 0.05)


def test_perfect_separation_is_not_certainty():
    # The true area may be as low as lets 20 disjoint pairs all be in order with probability 0.025.
    found = roc("a", np.arange(20) + 100.0, np.arange(50))
    assert (found.auc, found.auc_high) == (1, 1)
    assert found.auc_low**20 == pytest.approx(0.025)
    other = roc("a", np.arange(20), np.arange(50) + 100.0)
    assert (other.auc, other.auc_low) == (0, 0)
    assert other.auc_high == pytest.approx(1 - found.auc_low)
    wider = roc("a", np.arange(20) + 100.0, np.arange(50), confidence=0.999)
    assert wider.auc_low < found.auc_low


def test_scores_that_say_nothing_give_a_half():
    found = roc("a", np.ones(5), np.ones(7))
    assert (found.auc, found.auc_low, found.auc_high) == (0.5, 0.5, 0.5)
    assert found.tpr_at[0.01].tpr == 0
    assert found.fpr.tolist() == found.tpr.tolist() == [0, 1]


@given(tied, tied, st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.3, 0.9]))
def test_the_threshold_is_the_lowest_that_the_rate_allows(members, non_members, fpr):
    found = roc("a", members, non_members, fprs=(fpr,)).tpr_at[fpr]
    thresholds = [*non_members, *members]
    kept = [t for t in thresholds if (non_members > t).sum() <= fpr * len(non_members) + 1e-9]
    assert found.tpr == max((members > t).mean() for t in kept)
    assert found.allowed == math.floor(fpr * len(non_members) + 1e-9)
    # the auditor may toss coins between two thresholds, which never does worse
    assert found.tpr <= CanaryScoreAuditor(members, non_members).tpr_at_given_fpr(fpr) + 1e-12


def test_the_auditor_agrees_where_no_coin_is_tossed():
    # the curve is concave, and 10 % is one of its corners
    non_members = np.arange(100.0)
    members = np.concatenate([np.full(30, 200.0), np.full(50, 89.5), np.full(20, -1.0)])
    found = roc("a", members, non_members, fprs=(0.1, 0.05))
    assert found.tpr_at[0.1].tpr == CanaryScoreAuditor(members, non_members).tpr_at_given_fpr(0.1) == 0.8
    assert found.tpr_at[0.05].tpr == 0.3


def test_too_few_non_members_are_said_so():
    found = roc("a", np.arange(10) + 95.5, np.arange(100))
    assert [found.tpr_at[fpr].allowed for fpr in (0.01, 0.001)] == [1, 0]
    assert found.tpr_at[0.01].tpr == 0.7  # above 98, which 99 alone exceeds
    assert found.tpr_at[0.001].tpr == 0.6
    assert found.label(0.01) == "TPR at 1% FPR"
    assert found.label(0.001) == "TPR with none of 100 non-members above"


@pytest.mark.parametrize("above", [0, 3, 10])
def test_the_rates_interval_is_clopper_and_pearsons(above):
    members = np.concatenate([np.ones(above), np.zeros(10 - above)])
    found = roc("a", members, np.full(5, 0.5), fprs=(0.1,), confidence=0.9).tpr_at[0.1]
    expected = stats.binomtest(above, 10).proportion_ci(0.9, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.tpr == above / 10


def test_it_is_plain_json():
    found = roc("min_k", *gaussian(1, 0.5, 20, 30))
    written = json.loads(json.dumps(found.to_json()))
    assert written["tpr_at"]["0.01"]["allowed"] == 0
    assert written["tpr_at"]["0.01"]["label"] == found.label(0.01)
    assert written["auc"] == found.auc
    assert written["fpr"] == found.fpr.tolist()
    assert (written["name"], written["members"], written["non_members"]) == ("min_k", 20, 30)


@pytest.mark.parametrize(
    ("members", "non_members", "change", "message"),
    [
        ([1.0], [0.0, 1.0], {}, "'x' has 1 scores of members"),
        ([1.0, 2.0], [], {}, "'x' has 0 scores of non-members"),
        ([1.0, math.nan], [0.0, 1.0], {}, "'x' gives 1 members a score that is not a number"),
        ([1.0, 2.0], [0.0, 1.0], {"fprs": (1.0,)}, "fprs has 1.0"),
    ],
)
def test_what_has_no_curve_is_refused(members, non_members, change, message):
    with pytest.raises(UserError, match=message):
        roc("x", np.array(members), np.array(non_members), **change)


def test_infinite_scores_have_their_place():
    found = roc("a", np.array([np.inf, 1.0]), np.array([-np.inf, 0.0]))
    assert found.auc == 1
