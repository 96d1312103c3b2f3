"""The terms of secure aggregation: defaults, what is refused and why, and that accepted ones protect by counting."""

import math
from itertools import product
from typing import Any

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.secure.sec_agg import SecAgg, Terms


def accepted(clients: int) -> list[Terms]:
    """All terms of so many clients that are not refused."""
    found = []
    for neighbours, colluders in product(range(2, clients), range(clients)):
        for threshold, survivors in product(range(2, neighbours + 2), range(2, clients + 1)):
            try:
                found.append(SecAgg(threshold, neighbours, survivors, colluders).make(clients))
            except UserError:
                continue
    return found


@pytest.mark.parametrize("clients", range(3, 60))
def test_the_default_is_the_complete_graph_and_above_two_thirds(clients: int):
    terms = SecAgg().make(clients)
    assert terms == Terms(clients, clients - 1, terms.threshold, terms.threshold, 0)
    assert terms.threshold > 2 * clients / 3
    assert terms.threshold == clients or terms.threshold - 1 <= 2 * clients / 3


@pytest.mark.parametrize(("clients", "neighbours"), [(20, 4), (64, 12), (9, 8), (301, 40)])
def test_on_a_sparse_graph_the_share_of_survivors_is_that_of_the_holders(clients: int, neighbours: int):
    terms = SecAgg(neighbours=neighbours).make(clients)
    assert terms.threshold == 2 * (neighbours + 1) // 3 + 1
    assert terms.survivors == math.ceil(clients * terms.threshold / (neighbours + 1))


def test_what_is_asked_for_is_what_is_agreed():
    assert SecAgg(6, 6, 7, 2).make(8) == Terms(8, 6, 6, 7, 2)


@pytest.mark.parametrize("clients", [3, 4, 5, 6, 7])
def test_accepted_terms_protect_by_counting(clients: int):
    """Whoever holds what: no client's two secrets can both be opened, and none is alone among colluders."""
    terms = accepted(clients)
    assert len(terms) >= clients - 2
    for n, k, t, survivors, colluders in terms:
        holders = k + 1
        assert 2 <= t <= holders
        # An honest holder gives one kind of share of a client, a colluder both.
        for honest in range(holders - colluders + 1):
            seeds, keys = honest + colluders, holders - colluders - honest + colluders
            assert not (seeds >= t and keys >= t)
        assert survivors - colluders >= 2
        # Two lists of survivors: who signs both is a colluder.
        assert not (survivors <= n and 2 * survivors - n <= colluders)
        # Of the t holders that must be left one is the client itself.
        assert t - 1 - colluders >= 1
        assert survivors <= n


@pytest.mark.parametrize("clients", [5, 6, 7])
def test_no_safe_terms_are_refused(clients: int):
    """The refusals are exactly the counts above, one holder more on the ring, and odd sparse graphs."""
    safe = set()
    for k, t, survivors, colluders in product(
        range(2, clients), range(2, clients + 1), range(2, clients + 1), range(9)
    ):
        sparse = k < clients - 1
        counts = t <= k + 1 and k + 1 + colluders + sparse < 2 * t and t >= colluders + 2
        signed = survivors >= max(2 + colluders, t) and 2 * survivors > clients + colluders
        if counts and signed and not (sparse and k % 2):
            safe.add(Terms(clients, k, t, survivors, colluders))
    assert set(accepted(clients)) == safe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1}, r"secure\.threshold is 1; it must be at least 2"),
        ({"neighbours": 1}, r"secure\.neighbours is 1; it must be at least 2"),
        ({"survivors": 1}, r"secure\.survivors is 1; it must be at least 2"),
        ({"colluders": -1}, r"secure\.colluders is -1; it must be at least 0"),
        ({"bound": 0.0}, r"secure\.bound is 0\.0; it must be positive and finite"),
        ({"bound": math.inf}, r"secure\.bound is inf"),
        ({"bound": math.nan}, r"secure\.bound is nan"),
    ],
)
def test_impossible_values_are_refused_when_they_are_written(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        SecAgg(**settings)


@pytest.mark.parametrize(
    ("settings", "clients", "message"),
    [
        ({}, 2, "of 2 clients hides nothing.*at least 3 sites"),
        ({"neighbours": 8}, 8, r"secure\.neighbours is 8, but a client has only 7 others"),
        ({"neighbours": 3}, 8, r"secure\.neighbours is 3.*Set it to 2 or 4"),
        ({"neighbours": 3}, 9, r"secure\.neighbours is 3.*Set it to 2 or 4"),
        ({"threshold": 4}, 8, r"secure\.threshold is 4 of 8 shares.*from 5 to 8"),
        ({"threshold": 9}, 8, r"secure\.threshold is 9 of 8 shares.*from 5 to 8"),
        ({"threshold": 6, "colluders": 4}, 8, r"secure\.threshold is 6 of 8 shares.*4 colluders.*from 7 to 8"),
        ({"threshold": 3, "neighbours": 2, "colluders": 2}, 8, r"secure\.threshold is 3 of 3 shares.*from 4 to 3"),
        ({"survivors": 9}, 8, r"secure\.survivors is 9 of 8 clients"),
        ({"survivors": 5}, 8, r"secure\.survivors is 5 of 8.*from 6 to 8"),
        ({"neighbours": 4, "survivors": 2, "colluders": 1}, 8, r"secure\.survivors is 2.*from 5 to 8"),
    ],
)
def test_terms_that_protect_nobody_are_refused_by_field(settings: dict[str, Any], clients: int, message: str):
    with pytest.raises(UserError, match=message):
        SecAgg(**settings).make(clients)
