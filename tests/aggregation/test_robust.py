"""The rules that resist malicious clients against plain NumPy, with absent clients, ties and attackers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.aggregation.bulyan import Bulyan
from fedjax_llm.aggregation.coordinate_median import CoordinateMedian
from fedjax_llm.aggregation.geometric_median import GeometricMedian
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.aggregation.norm_bound import NormBound
from fedjax_llm.aggregation.trimmed_mean import TrimmedMean
from fedjax_llm.errors import UserError
from fedjax_llm.types import Stack

WIDTH = 10  # numbers in a delta


@cache
def jitted(algorithm):
    return jax.jit(algorithm.make().update)


def step(algorithm, deltas, weights) -> np.ndarray:
    """By how much the adapters move: deltas [C, WIDTH], as two leaves, and weights [C]."""
    deltas, weights = jnp.asarray(deltas, jnp.float32), jnp.asarray(weights, jnp.float32)
    tree = {"q": {"a": deltas[:, :6].reshape(-1, 3, 2), "b": deltas[:, 6:].reshape(-1, 2, 2)}}
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), tree)
    moved, _ = jitted(algorithm)(Stack(tree, weights), (), start)
    return np.concatenate([np.ravel(moved["q"]["a"]), np.ravel(moved["q"]["b"])])


def cohort(seed: int, clients: int, absent: int = 0):
    """Random deltas and weights; ``absent`` of the clients have zeros for both."""
    rng = np.random.default_rng(seed)
    deltas, weights = rng.normal(size=(clients, WIDTH)), rng.uniform(0.5, 9, clients)
    gone = rng.permutation(clients)[:absent]
    deltas[gone], weights[gone] = 0, 0
    return deltas, weights


def median(deltas, weights):
    return np.median(deltas, axis=0)


def trimmed(cut: int):
    def mean(deltas, weights):
        return np.sort(deltas, axis=0)[cut : len(deltas) - cut].mean(axis=0)

    return mean


def nearest(deltas, count: int) -> np.ndarray:
    """Each client's sum of the squared distances to its ``count`` nearest others."""
    apart = [[np.sum((own - other) ** 2) for other in deltas] for own in deltas]
    return np.array([sum(sorted(np.delete(row, i))[:count]) for i, row in enumerate(apart)])


def best(deltas, byzantine: int, to_all=None) -> np.ndarray:
    """Krum: the clients by ascending sums over n - f - 2 others, or one; ties by a second number."""
    sums = nearest(deltas, max(len(deltas) - byzantine - 2, 1))
    return np.lexsort((np.arange(len(deltas)) if to_all is None else to_all, sums))


def krum(byzantine: int, keep: int = 1):
    return lambda deltas, weights: deltas[best(deltas, byzantine)[:keep]].mean(axis=0)


def bulyan(byzantine: int):
    def rule(deltas, weights):
        left, selected, to_all = np.arange(len(deltas)), [], nearest(deltas, len(deltas))
        while len(selected) < len(deltas) - 2 * byzantine:
            selected.append(left[best(deltas[left], byzantine, to_all[left])[0]])
            left = left[left != selected[-1]]
        found = []
        for column in deltas[selected].T:
            order = np.argsort(np.abs(column - np.median(column)))
            found.append(column[order[: len(column) - 2 * byzantine]].mean())
        return np.array(found)

    return rule


def weiszfeld(iterations: int, smoothing: float):
    def rule(deltas, weights):
        centre = np.average(deltas, axis=0, weights=weights)
        for _ in range(iterations):
            pull = weights / np.maximum(smoothing, np.linalg.norm(deltas - centre, axis=1))
            centre = np.average(deltas, axis=0, weights=pull)
        return centre

    return rule


def bounded(norm: float):
    def rule(deltas, weights):
        norms = np.linalg.norm(deltas, axis=1, keepdims=True)
        return np.average(deltas * np.minimum(1, norm / norms), axis=0, weights=weights)

    return rule


ORACLES = [
    # the algorithm, its oracle, clients that are there, and absent ones
    (CoordinateMedian(), median, 7, 0),
    (CoordinateMedian(), median, 4, 3),
    (TrimmedMean(0.1), trimmed(1), 7, 2),
    (TrimmedMean(0.25), trimmed(2), 8, 0),
    (TrimmedMean(0.4), trimmed(2), 5, 3),
    (Krum(), krum(0), 7, 2),
    (Krum(2), krum(2), 7, 0),
    (Krum(2, keep=5), krum(2, 5), 9, 0),
    (Krum(1, keep=3), krum(1, 3), 6, 1),
    (Bulyan(), lambda deltas, weights: deltas.mean(axis=0), 4, 1),
    (Bulyan(1), bulyan(1), 7, 0),
    (Bulyan(2), bulyan(2), 12, 2),
    (GeometricMedian(), weiszfeld(16, 1e-6), 6, 1),
    (GeometricMedian(3, smoothing=3.0), weiszfeld(3, 3.0), 6, 0),
    (NormBound(2.0), bounded(2.0), 6, 1),
]


@pytest.mark.parametrize(("algorithm", "oracle", "clients", "absent"), ORACLES)
@settings(max_examples=15)
@given(seed=st.integers(0, 999))
def test_the_step_is_that_of_the_paper_among_those_who_are_there(algorithm, oracle, clients, absent, seed):
    deltas, weights = cohort(seed, clients + absent, absent)
    there = weights > 0
    np.testing.assert_allclose(step(algorithm, deltas, weights), oracle(deltas[there], weights[there]), atol=1e-5)


def test_the_oracles_tell_the_rules_apart():
    deltas, weights = cohort(0, 11)
    found = [oracle(deltas, weights) for oracle in (median, trimmed(2), krum(2), krum(2, 5), bulyan(2), bounded(3.0))]
    found += [weiszfeld(16, 1e-6)(deltas, weights), np.average(deltas, axis=0, weights=weights)]
    assert min(np.abs(one - other).max() for i, one in enumerate(found) for other in found[:i]) > 1e-2


@pytest.mark.parametrize(
    ("trim", "clients", "cut"),
    [(0.1, 10, 1), (0.2, 5, 1), (0.2, 4, 1), (0.3, 10, 3), (0.25, 9, 3), (0.49, 4, 1), (0.28, 25, 7), (0.4, 1, 0)],
)
def test_at_least_the_share_is_cut_and_something_is_left(trim, clients, cut):
    deltas, weights = cohort(clients, clients)
    expected = trimmed(cut)(deltas, weights)
    np.testing.assert_allclose(step(TrimmedMean(trim), deltas, weights), expected, atol=1e-6)


def test_the_geometric_median_has_the_least_sum_of_distances():
    deltas, weights = cohort(5, 6)

    def cost(point):
        return weights @ np.linalg.norm(deltas - point, axis=1)

    found = step(GeometricMedian(iterations=200), deltas, weights)
    around = found + 0.02 * np.random.default_rng(0).normal(size=(50, WIDTH))
    assert cost(found) < min(map(cost, [*around, *deltas, np.average(deltas, axis=0, weights=weights)]))


EVERY = (
    CoordinateMedian(),
    TrimmedMean(0.15),
    Krum(1),
    Krum(1, keep=3),
    Bulyan(1),
    GeometricMedian(),
    NormBound(2.0),
)
every = pytest.mark.parametrize("algorithm", EVERY, ids=str)


@every
@settings(max_examples=15)
@given(order=st.permutations(range(7)), seed=st.integers(0, 999))
def test_ties_are_not_broken_by_the_order_of_clients(algorithm, order, seed):
    rng = np.random.default_rng(seed)
    deltas, weights = rng.integers(-1, 2, size=(7, WIDTH)), rng.integers(1, 4, size=7)
    deltas[:, 3:] = 0  # few different deltas, and many equal distances
    order = np.array(order)
    one, other = step(algorithm, deltas, weights), step(algorithm, deltas[order], weights[order])
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_both_ends_of_the_shortest_distance_share_the_one_place():
    deltas = np.zeros((3, WIDTH))
    deltas[:, 0] = 0.0, 1.0, 5.0
    assert step(Krum(), deltas, np.ones(3))[0] == pytest.approx(0.5)
    assert step(Krum(), deltas[::-1], np.ones(3))[0] == pytest.approx(0.5)


def test_who_ties_even_in_the_distance_to_everybody_is_told_apart_by_the_delta():
    deltas, weights = np.zeros((7, WIDTH)), np.ones(7)
    deltas[:, :2] = [[1, 2], [2, -2], [-2, 2], [-2, 2], [2, 2], [-1, -2], [0, 2]]
    found = step(Bulyan(1), deltas, weights)
    assert min(abs(found[0] + 5 / 3), abs(found[0])) < 1e-6  # one way of the two
    np.testing.assert_allclose(step(Bulyan(1), deltas[::-1], weights), found, atol=1e-6)


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_message_that_is_not_finite_is_as_if_it_had_not_come(algorithm, value):
    deltas, weights = cohort(1, 7)
    broken = deltas.copy()
    broken[5, 3] = value
    without = np.where(np.arange(7) == 5, 0, weights)
    np.testing.assert_array_equal(step(algorithm, broken, weights), step(algorithm, deltas, without))


@pytest.mark.parametrize("algorithm", [CoordinateMedian(), TrimmedMean(0.4), Krum(), Bulyan(), GeometricMedian()])
def test_a_client_alone_has_its_way(algorithm):
    deltas, weights = cohort(2, 1)
    np.testing.assert_allclose(step(algorithm, deltas, weights), deltas[0], rtol=1e-6)


@pytest.mark.parametrize("algorithm", [CoordinateMedian(), TrimmedMean(0.4), Krum(), Bulyan()])
def test_two_clients_have_their_mean(algorithm):
    deltas, weights = cohort(3, 2)
    np.testing.assert_allclose(step(algorithm, deltas, weights), deltas.mean(axis=0), atol=1e-6)


@every
@settings(max_examples=15)
@given(seed=st.integers(0, 999), exponent=st.integers(0, 6))
def test_one_attacker_of_seven_leaves_the_step_among_the_honest_ones(algorithm, seed, exponent):
    deltas, _ = cohort(seed, 7)
    deltas[2] *= -(10.0**exponent)
    honest, found = np.delete(deltas, 2, axis=0), step(algorithm, deltas, np.ones(7))
    low, high = honest.min(axis=0), honest.max(axis=0)
    if isinstance(algorithm, NormBound):
        assert np.linalg.norm(found) <= algorithm.norm + 1e-5
    elif isinstance(algorithm, CoordinateMedian | TrimmedMean):
        assert (low - 1e-5 <= found).all()
        assert (found <= high + 1e-5).all()
    elif exponent > 1 and isinstance(algorithm, Krum):
        places = np.abs(honest[:, None] - found).max(axis=2).min() if algorithm.keep == 1 else 0.0
        assert places < 1e-5
        assert (low - 1e-5 <= found).all()
        assert (found <= high + 1e-5).all()
    else:  # not beyond the honest ones by more than they are apart
        assert (2 * low - high - 1e-4 <= found).all()
        assert (found <= 2 * high - low + 1e-4).all()


def test_too_small_a_cohort_is_refused_with_the_numbers():
    for algorithm, clients, said in (
        (Krum(1), 4, r"aggregation\.byzantine is 1, which takes a cohort of at least 5 clients, but it has 4;"),
        (Bulyan(2), 10, r"aggregation\.byzantine is 2, which takes a cohort of at least 11 clients, but it has 10;"),
        (Krum(1, keep=3), 5, r"aggregation\.keep is 3, but of a cohort of 5 .*byzantine 1 at most 2 can be kept"),
        (Krum(keep=2), 1, r"aggregation\.keep is 2, but of a cohort of 1 .*byzantine 0 at most 1 can be kept"),
    ):
        with pytest.raises(UserError, match=said):
            step(algorithm, *cohort(0, clients))


@pytest.mark.parametrize(("algorithm", "clients"), [(Krum(2, keep=2), 7), (Bulyan(1), 7)], ids=str)
@pytest.mark.parametrize("absent", range(1, 7))
def test_too_few_who_are_there_have_their_median(algorithm, clients, absent):
    deltas, weights = cohort(absent, clients, absent)
    there = weights > 0
    np.testing.assert_allclose(step(algorithm, deltas, weights), median(deltas[there], None), atol=1e-6)


def test_multi_krum_keeps_no_more_than_have_enough_honest_neighbours():
    deltas, weights = cohort(4, 9, absent=2)  # 7 are there: 7 - 2 - 2 may be kept, not 5
    there = weights > 0
    expected = krum(2, 3)(deltas[there], None)
    np.testing.assert_allclose(step(Krum(2, keep=5), deltas, weights), expected, atol=1e-5)
