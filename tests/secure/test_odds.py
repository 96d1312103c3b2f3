"""The odds of a sparse graph against counting all cases, and against graphs as they are drawn."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.secure.graph import neighbours
from fedjax_llm.secure.odds import least_neighbours, odds
from fedjax_llm.secure.sec_agg import SecAgg, Terms

SMALL = [(7, 2, 2), (7, 2, 3), (8, 4, 3), (8, 4, 4), (8, 4, 5), (9, 6, 5)]
"""n, k, t."""


def terms_of(n: int, k: int, t: int) -> Terms:
    """Terms with this threshold."""
    return Terms(n, k, t, 2, 0)


def is_opened(t: int, k: int, dishonest: int) -> bool:
    """Of a client with so many dishonest neighbours: both secrets, or it may be left alone among them."""
    return k + 1 + dishonest >= 2 * t or dishonest >= t - 1


def is_stuck(t: int, holders_left: int) -> bool:
    """A client's secret cannot be opened."""
    return holders_left < t


@pytest.mark.parametrize(("n", "k", "t"), SMALL)
@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_they_are_the_expected_number_of_such_clients(n: int, k: int, t: int, bad: int):
    """All sets of bad clients on one graph, every client: a union bound is exactly this expectation (or one)."""
    graph = neighbours([str(place) for place in range(n)], k, b"")
    opened, stuck, sets = 0, 0, list(combinations(range(n), bad))
    for chosen in map(set, sets):
        for place, near in enumerate(graph):
            if place not in chosen:
                opened += is_opened(t, k, len(chosen.intersection(near)))
            stuck += is_stuck(t, len({place, *near} - chosen))
    found = odds(terms_of(n, k, t), bad, bad)
    assert found.stuck == pytest.approx(min(1.0, stuck / len(sets)), abs=1e-12)
    # Dishonest clients themselves need no protection: the bound counts n clients, of which n - bad are honest.
    assert found.opened == pytest.approx(min(1.0, opened / len(sets) * n / (n - bad)), abs=1e-12)


@pytest.mark.parametrize(("n", "k", "t"), [(20, 6, 5), (20, 8, 6), (24, 10, 7)])
@pytest.mark.parametrize("bad", [2, 4, 6])
def test_they_bound_what_happens_on_drawn_graphs(n: int, k: int, t: int, bad: int):
    """Frequencies over 1,500 graphs with fixed bad clients; 4.9 standard deviations: a false alarm below 10^-6."""
    rounds, chosen, opened, stuck = 1500, set(range(bad)), 0, 0
    for number in range(rounds):
        graph = neighbours([str(place) for place in range(n)], k, number.to_bytes(4, "big"))
        opened += any(is_opened(t, k, len(chosen.intersection(graph[place]))) for place in range(bad, n))
        stuck += any(is_stuck(t, len({place, *near} - chosen)) for place, near in enumerate(graph))
    bound = odds(terms_of(n, k, t), bad, bad)
    for count, limit in ((opened, bound.opened), (stuck, bound.stuck)):
        assert count / rounds <= limit + 4.9 * np.sqrt(limit * (1 - limit) / rounds) + 10 / rounds


def test_whom_a_dropped_client_leaves_behind_counts_too():
    """Two of nine leave a ring: a dropped one may lose no neighbour, one that stays may lose one of two."""
    assert odds(terms_of(9, 2, 2), 0, 2).stuck == pytest.approx(2 * 2 / 8 + 7 * 1 / 28)


def test_a_client_whose_neighbours_are_all_dishonest_is_exposed_at_any_threshold():
    assert odds(terms_of(20, 4, 5), 4, 0).opened > 0
    assert odds(terms_of(20, 4, 5), 3, 0).opened == 0


def test_more_bad_clients_are_worse():
    terms = SecAgg(neighbours=12).make(100)
    found = [odds(terms, bad, bad) for bad in range(100)]
    for one, other in pairwise(found):
        assert one.opened <= other.opened
        assert one.stuck <= other.stuck
    assert (found[0].opened, found[0].stuck) == (0, 0)
    assert (found[-1].opened, found[-1].stuck) == (1, 1)
    assert 0 < found[10].opened < 1
    assert 0 < found[10].stuck < 1


@pytest.mark.parametrize(("clients", "dishonest", "dropouts"), [(200, 0.05, 0.05), (500, 0.1, 0.05), (60, 0.0, 0.1)])
def test_the_least_neighbours_do_and_two_fewer_do_not(clients: int, dishonest: float, dropouts: float):
    least = least_neighbours(clients, dishonest, dropouts)
    counts = int(np.ceil(dishonest * clients)), int(np.ceil(dropouts * clients))

    def enough(k: int) -> bool:
        found = odds(SecAgg(neighbours=k).make(clients), *counts)
        return found.opened <= 2.0**-40 and found.stuck <= 1e-3

    assert least % 2 == 0
    assert least < clients - 1
    assert enough(least)
    assert not any(enough(k) for k in range(2, least, 2))


def test_it_is_the_complete_graph_where_no_sparse_one_does():
    assert least_neighbours(10, 0.3, 0.3) == 9
    assert least_neighbours(3, 0, 0) == 2


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (-0.1, 0.0), (float("nan"), 0.0)])
def test_shares_must_be_shares(shares: tuple[float, float]):
    with pytest.raises(UserError, match=r"at least 0 and below 1"):
        least_neighbours(100, *shares)
