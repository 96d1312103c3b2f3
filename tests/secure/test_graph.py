"""The graph of masks: regular, mutual, the same for all who know the same keys, and in one piece."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedjax_llm.secure.graph import connected, neighbours

sizes = st.integers(1, 40)
halves = st.integers(1, 8)


def named(count: int) -> list[str]:
    """So many names."""
    return [f"site {place}" for place in range(count)]


def reached(graph: tuple[tuple[int, ...], ...], members: set[int]) -> bool:
    """Connectedness by the powers of the adjacency matrix."""
    order = sorted(members)
    near = np.array([[one == other or other in graph[one] for other in order] for one in order])
    return bool(order) and bool(np.linalg.matrix_power(near.astype(object), len(order)).all())


@given(sizes, halves, st.binary(max_size=4))
def test_each_has_the_count_of_neighbours_and_being_one_is_mutual(n: int, half: int, transcript: bytes):
    graph = neighbours(named(n), 2 * half, transcript)
    assert len(graph) == n
    for place, near in enumerate(graph):
        assert len(near) == min(2 * half, n - 1)
        assert list(near) == sorted(set(near) - {place})
        assert all(place in graph[other] for other in near)


@given(sizes, st.integers(0, 60))
def test_all_are_neighbours_where_there_are_no_more_others(n: int, more: int):
    complete = tuple(tuple(other for other in range(n) if other != place) for place in range(n))
    assert neighbours(named(n), n - 1 + more, b"") == complete


@given(st.integers(3, 40), halves, st.binary(max_size=4))
def test_it_hangs_together_and_takes_as_many_losses_as_half_a_ring_has_chords(n: int, half: int, transcript: bytes):
    """A ring with chords to ``half`` places each way is 2 x half-connected: any fewer may leave."""
    graph = neighbours(named(n), 2 * half, transcript)
    rng = np.random.default_rng(n)
    gone = rng.permutation(n)[: min(2 * half - 1, n - 1)]
    assert connected(graph, set(range(n)))
    assert connected(graph, set(range(n)) - set(gone.tolist()))


def test_it_depends_on_the_transcript_and_on_nothing_else():
    seen = {neighbours(named(12), 4, bytes([number])) for number in range(50)}
    assert len(seen) > 45
    assert neighbours(named(12), 4, b"a") == neighbours(tuple(named(12)), 4, b"a")


def test_everybody_is_as_likely_to_be_somebodys_neighbour():
    """Chi-square of the neighbours of one client over 2,000 transcripts; a false alarm once in 10^6."""
    counts = np.zeros(11)
    for number in range(2000):
        counts[np.array(neighbours(named(12), 4, str(number).encode())[0]) - 1] += 1
    expected = 2000 * 4 / 11
    # Four of eleven are drawn without repetition, so that the variance is that of a share of 7/10 of the expected.
    statistic = ((counts - expected) ** 2 / expected).sum() * 10 / 7
    assert statistic < chi2.isf(1e-6, 10)
    assert statistic > chi2.isf(1 - 1e-6, 10)


@settings(max_examples=200)
@given(st.integers(1, 9), st.integers(1, 2), st.binary(max_size=2), st.data())
def test_connected_is_what_the_adjacency_matrix_says(n: int, half: int, transcript: bytes, data: st.DataObject):
    graph = neighbours(named(n), 2 * half, transcript)
    members = data.draw(st.sets(st.integers(0, n - 1)))
    assert connected(graph, members) == reached(graph, members)


def test_connected_on_all_subsets_of_a_ring():
    """Of a cycle of 8, a subset hangs together if its members are one run."""
    ring = tuple(((place - 1) % 8, (place + 1) % 8) for place in range(8))
    for count in range(9):
        for members in combinations(range(8), count):
            starts = sum((place - 1) % 8 not in members for place in members)
            assert connected(ring, members) == (count == 8 or starts == 1)


@pytest.mark.parametrize(("members", "expected"), [((), False), ((2,), True), ((0, 1), False), ((0, 2), True)])
def test_connected_without_members_and_with_few(members: tuple[int, ...], expected: bool):
    assert connected(((2,), (2,), (0, 1)), members) == expected
