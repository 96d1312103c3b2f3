"""Membership scores against the formulas worked out candidate by candidate, and what any such score must do."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.errors import UserError
from fedjax_llm.leakage.membership import (
    attack_scores,
    confidence,
    joined,
    lira,
    loss,
    min_k,
    min_k_plus,
    reference,
    rmia,
    zlib_ratio,
)
from fedjax_llm.leakage.roc import roc
from fedjax_llm.leakage.shadows import coins
from fedjax_llm.leakage.token_scores import TokenScores

seeds = st.integers(0, 2**32 - 1)


def one_text(rng, tokens):
    """Random, but possible: no token is likelier than the likeliest."""
    best = -rng.exponential(0.3, tokens)
    return TokenScores(best - rng.exponential(1.5, tokens), best - rng.random(tokens), rng.random(tokens) + 0.1, best)


def some_texts(seed, count=9):
    rng = np.random.default_rng(seed)
    return [one_text(rng, int(rng.integers(1, 30))) for _ in range(count)]


def some_strings(seed, count=9):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("aeé\n日"), int(rng.integers(1, 80)))) for _ in range(count)]


def some_shadows(seed, shadows=6, candidates=9, texts=14):
    """Log-probabilities of the candidates under target and shadows, and of a population's texts."""
    rng = np.random.default_rng(seed)
    included = coins(rng, shadows, candidates)
    target, population = (-rng.exponential(1.0, n) - 0.01 for n in (candidates, texts))
    other = (-rng.exponential(1.0, (shadows, n)) - 0.01 for n in (candidates, texts))
    return target, next(other), included, population, next(other)


def test_scores_of_two_texts_by_hand():
    short = TokenScores(np.array([-1.0, -3.0]), np.array([-2.0, -2.0]), np.array([0.5, 2.0]), np.array([-1.0, -0.5]))
    long = TokenScores(-np.arange(10.0), np.full(10, -4.5), np.full(10, 0.5), np.zeros(10))
    base = [TokenScores(np.array([-2.0, -3.0]), *short[1:]), TokenScores(np.full(10, -5.0), *long[1:])]
    assert loss([short, long]).tolist() == [-2.0, -4.5]
    assert reference([short, long], base).tolist() == [0.5, 0.5]
    assert min_k([short, long], 0.2).tolist() == [-3.0, -8.5]  # one of two tokens, two of ten
    assert min_k([short, long], 1.0).tolist() == [-2.0, -4.5]
    assert min_k_plus([short, long], 0.2).tolist() == [-0.5, -8.0]  # (-1 + 2) / 0.5 and (-3 + 2) / 2; -9 and -7
    texts = ["a" * 100, "héllo"]
    bytes_ = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    assert zlib_ratio([short, long], texts).tolist() == [-4.0 / bytes_[0], -45.0 / bytes_[1]]


@given(seed=seeds, share=st.floats(0.05, 1.0))
def test_the_lowest_share_is_that_of_the_sorted_tokens(seed, share):
    texts = some_texts(seed)
    for found, values in (
        (min_k(texts, share), [one.log_prob for one in texts]),
        (min_k_plus(texts, share), [(one.log_prob - one.mean) / one.std for one in texts]),
    ):
        lowest = [sorted(row)[: max(1, math.floor(share * len(row)))] for row in values]
        np.testing.assert_allclose(found, [sum(row) / len(row) for row in lowest], rtol=1e-12)


def test_a_certain_model_divides_by_no_zero():
    certain = TokenScores(np.zeros(5), np.zeros(5), np.zeros(5), np.zeros(5))
    surprised = TokenScores(np.array([-20.0, 0, 0, 0, 0]), np.zeros(5), np.zeros(5), np.zeros(5))
    found = min_k_plus([certain, surprised])
    assert found[0] == 0
    assert np.isfinite(found[1])
    assert found[1] < -1000


def test_attacks_come_by_name_and_follow_their_candidates():
    tuned, base, texts = some_texts(0), some_texts(1), some_strings(2)
    found = attack_scores(tuned, base, texts)
    assert list(found) == ["loss", "reference", "zlib", "min_k", "min_k_plus"]
    order = np.random.default_rng(3).permutation(len(tuned))
    moved = attack_scores(*([column[i] for i in order] for column in (tuned, base, texts)))
    for name, values in found.items():
        assert values.dtype == np.float64
        assert len(set(values)) == len(tuned), name
        assert np.array_equal(moved[name], values[order]), name


@given(seed=seeds, gain=st.floats(0.0, 3.0))
def test_likelier_tokens_never_look_less_like_a_member(seed, gain):
    before, base, texts = some_texts(seed), some_texts(seed), some_strings(seed)
    rng = np.random.default_rng(seed)
    after = [one._replace(log_prob=one.log_prob + gain * rng.random(len(one.log_prob))) for one in before]
    one, other = attack_scores(before, base, texts), attack_scores(after, base, texts)
    for name in one:
        assert (other[name] >= one[name] - 1e-12).all(), name


def test_a_record_is_its_examples_tokens():
    parts = some_texts(4, 3)
    whole = joined(parts)
    assert whole.best.tolist() == [*parts[0].best, *parts[1].best, *parts[2].best]
    assert loss([whole])[0] == pytest.approx(np.average(loss(parts), weights=[len(one.best) for one in parts]))


def test_a_text_without_targets_is_refused():
    empty = TokenScores(*np.zeros((4, 0)))
    with pytest.raises(UserError, match="candidate 2 has no target"):
        attack_scores([*some_texts(0, 2), empty], [*some_texts(0, 2), empty], ["a", "b", "c"])


def test_confidence_is_the_logit_of_the_mean_token():
    p = np.array([1e-12, 0.01, 0.5, 0.99, 1 - 1e-5])
    np.testing.assert_allclose(confidence(np.log(p)), np.log(p / (1 - p)), rtol=1e-9)
    assert confidence(np.log(0.5)) == pytest.approx(0, abs=1e-12)
    top = confidence(np.array([-1e-6, 0.0, 1e-9]))
    assert np.isfinite(top).all()
    assert top[0] < top[1] == top[2]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("offline", [False, True])
def test_lira_is_the_ratio_of_two_gaussians(shared, offline):
    target, shadows, included, _, _ = some_shadows(5, shadows=10)
    shadows = shadows * np.arange(1, 10)  # candidates of unlike spread
    found = lira(target, shadows, included, offline=offline, shared=shared)
    inside = [shadows[included[:, n], n] for n in range(9)]
    out = [shadows[~included[:, n], n] for n in range(9)]
    pooled = [math.sqrt(np.mean([np.var(row, ddof=1) for row in rows])) for rows in (inside, out)]
    for n in range(9):
        spread_in, spread_out = pooled if shared else (np.std(inside[n], ddof=1), np.std(out[n], ddof=1))
        above, below = stats.norm(inside[n].mean(), spread_in), stats.norm(out[n].mean(), spread_out)
        if offline:  # the paper scores by 1 - Pr[Z > phi]
            assert stats.norm.cdf(found[n]) == pytest.approx(below.cdf(target[n]), rel=1e-9)
        else:
            assert found[n] == pytest.approx(above.logpdf(target[n]) - below.logpdf(target[n]), rel=1e-9)


@given(seed=seeds, offline=st.booleans())
def test_attacks_with_shadows_follow_their_candidates(seed, offline):
    target, shadows, included, *population = some_shadows(seed)
    rng = np.random.default_rng(seed)
    order, models = rng.permutation(9), rng.permutation(6)
    moved = (target[order], shadows[models][:, order], included[models][:, order])
    moved_population = (population[0], population[1][models])
    a = 0.3 if offline else None
    one, other = (lira(*given, offline=offline) for given in ((target, shadows, included), moved))
    np.testing.assert_allclose(other, one[order], rtol=1e-9, atol=1e-9)
    one = rmia(target, shadows, included, *population, offline=a)
    other = rmia(*moved, *moved_population, offline=a)
    np.testing.assert_allclose(other, one[order], atol=1e-12)
    higher = rmia(target * 0.9, shadows, included, *population, offline=a)
    assert (higher >= one).all()


@pytest.mark.parametrize("a", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 1.7])
def test_rmia_counts_pairs(gamma, a):
    target, shadows, included, population, population_shadows = some_shadows(6)
    found = rmia(target, shadows, included, population, population_shadows, gamma=gamma, offline=a)
    p, q = np.exp(shadows), np.exp(population_shadows)
    for x in range(9):
        out = p[~included[:, x], x].mean()
        p_x = (out + p[included[:, x], x].mean()) / 2 if a is None else ((1 + a) * out + 1 - a) / 2
        won = 0
        for z in range(14):
            p_z = q[:, z].mean() if a is None else ((1 + a) * q[:, z].mean() + 1 - a) / 2
            won += (np.exp(target[x]) / p_x) / (np.exp(population[z]) / p_z) > gamma
        assert found[x] == pytest.approx(won / 14)
    assert 0 < found.mean() < 1


def gaussian_world(seed, gain, candidates=2000, shadows=16):
    """Statistics that differ between candidates far more than membership changes them, and who is in the target."""
    rng = np.random.default_rng(seed)
    easy, included, member = rng.normal(0, 5, candidates), coins(rng, shadows, candidates), rng.random(candidates) < 0.5
    shadow = easy + gain * included + rng.normal(size=(shadows, candidates))
    return easy + gain * member + rng.normal(size=candidates), shadow, included, member


@pytest.mark.parametrize(("offline", "noise"), [(False, 1 / 16), (True, 1 / 8)])
def test_lira_finds_what_membership_adds_where_texts_differ_more(offline, noise):
    # The means are estimated from 8 shadows each, which adds their variance; where all candidates share equal
    # variances, the ratio is linear in the distance to the means: AUC = Phi(gain / sqrt(2 (1 + noise))).
    target, shadow, included, member = gaussian_world(7, gain=2.0)
    scores = lira(target, shadow, included, offline=offline)
    found = roc("lira", scores[member], scores[~member], confidence=1 - 1e-6)
    expected = stats.norm.cdf(2.0 / math.sqrt(2 * (1 + noise)))
    assert found.auc_low < expected < found.auc_high
    plain = roc("loss", target[member], target[~member])
    assert found.auc > plain.auc + 0.2


@pytest.mark.parametrize("offline", [False, True])
def test_nothing_is_found_where_membership_adds_nothing(offline):
    # An interval of some 900 scores a side misses 1/2 with probability 1e-6. The first 200 texts are the population.
    target, shadow, included, member = gaussian_world(8, gain=0.0)
    population, a = (target[:200] - 30, shadow[:, :200] - 30), 1.0 if offline else None
    scores = {
        "lira": lira(target, shadow, included, offline=offline),
        "rmia": rmia(target - 30, shadow - 30, included, *population, offline=a),
    }
    for name, values in scores.items():
        found = roc(name, values[200:][member[200:]], values[200:][~member[200:]], confidence=1 - 1e-6)
        assert found.auc_low < 0.5 < found.auc_high, name
        assert found.auc_high - found.auc_low < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.5}, "gamma is 0.5"),
        ({"offline": 1.5}, "offline is 1.5"),
        ({"offline": -0.1}, "offline is -0.1"),
    ],
)
def test_impossible_settings_of_rmia_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        rmia(*some_shadows(0), **change)


def test_too_few_shadows_are_refused():
    target, shadows, included, *population = some_shadows(0)
    nowhere = included.copy()
    nowhere[:, 4] = False
    for attack in (lira, lambda *given: rmia(*given, *population)):
        with pytest.raises(UserError, match="candidate 4 is in no shadow"):
            attack(target, shadows, nowhere)
        with pytest.raises(UserError, match="candidate 4 is out of no shadow"):
            attack(target, shadows, ~nowhere)
    assert np.isfinite(lira(target, shadows, nowhere, offline=True)).all()
    pair = coins(np.random.default_rng(0), 2, 9)
    with pytest.raises(UserError, match="out of a single shadow"):
        lira(target, shadows[:2], pair)
    assert np.isfinite(rmia(target, shadows[:2], pair, population[0], population[1][:2])).all()
