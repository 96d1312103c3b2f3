"""Clients leave at any stage: the sum is of those who submitted, or the round is abandoned when the rules say so."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meetings import FIVE, LENIENT, MODEL, Round, answer, inputs, names, people, start, summed

from fedjax_llm.secure import client as clients
from fedjax_llm.secure import server as servers
from fedjax_llm.secure.client import STAGES, Roster
from fedjax_llm.secure.graph import connected
from fedjax_llm.secure.outcome import Abandoned, Outcome
from fedjax_llm.secure.sec_agg import SecAgg, Terms
from fedjax_llm.secure.simulation import run_round

RING = Terms(5, 2, 2, 2, 0)
"""Sparse, 2 of 3 open a secret, 2 survivors."""
STRICT_RING = SecAgg(threshold=3, neighbours=2, survivors=3).make(5)
Names = frozenset[str]


class Ending(NamedTuple):
    """What the rules say of a round: whose sum it gives, or who was left when it was abandoned."""

    summed: Names = frozenset()
    left: Names = frozenset()


def ending(terms: Terms, roster: Roster | None, stayed: Sequence[Names]) -> Ending:
    """From who answered each stage, each a part of the one before; the roster is that of the first."""
    if len(stayed[0]) < terms.survivors or min(terms.neighbours, len(stayed[0]) - 1) + 1 < terms.threshold:
        return Ending(left=stayed[0])
    assert roster is not None
    near = {name: {roster.names[p] for p in roster.holders(place)} for place, name in enumerate(roster.names)}
    dealt = set(stayed[1])
    if len(dealt) >= terms.survivors:
        for _ in roster.names:  # whoever has too few holders cannot go on, and is no holder for others either
            dealt = {name for name in dealt if len(near[name] & dealt) >= terms.threshold}
    if len(dealt) < terms.survivors:
        return Ending(left=frozenset(dealt))
    submitted = stayed[2] & dealt
    for stage in (2, 3, 4):
        left = frozenset(stayed[stage] & dealt)
        needed = [name for name in dealt if near[name] & submitted]
        opens = all(len(near[name] & left) >= terms.threshold for name in needed)
        whole = connected(roster.graph, [roster.names.index(name) for name in submitted])
        if len(left) < terms.survivors or not opens or not whole:
            return Ending(left=left)
    return Ending(summed=frozenset(submitted))


def answers(played: Round) -> dict[str, tuple[clients.Client, bytes]]:
    """What all who are still there say in the stage that is due; it does not depend on who else will answer."""
    if played.server.stage == 0:
        own, meeting = played.own, played.meeting
        return {
            name: clients.advertise(meeting, name, own.keys[name], own.directory, MODEL)
            for name in played.server.invited
        }
    return {name: answer(played, name, data) for name, data in played.inbox.items()}


def closed(played: Round, said: dict[str, tuple[clients.Client, bytes]], whose: Names) -> Round:
    """The stage after some have answered."""
    server = played.server
    for name in sorted(whose.intersection(said)):
        server = servers.receive(server, name, said[name][1])
    after = played._replace(clients={name: state for name, (state, _) in said.items()})
    server, inbox = servers.close(server)
    return after._replace(server=server, inbox=inbox)


def all_endings(played: Round, stayed: tuple[Names, ...]) -> Iterator[tuple[Roster | None, tuple[Names, ...], object]]:
    """Every way in which those who are left go on to leave: who answered each stage, and how the round ends."""
    if played.server.stage == len(STAGES):
        try:
            yield played.server.roster, stayed, servers.result(played.server)
        except Abandoned as lost:
            yield played.server.roster, stayed, lost
        return
    said, before = answers(played), sorted(stayed[-1] if stayed else played.server.invited)
    for count in range(len(before) + 1):
        for whose in map(frozenset, combinations(before, count)):
            try:
                after = closed(played, said, whose)
            except Abandoned as lost:
                yield played.server.roster, (*stayed, whose), lost
            else:
                yield from all_endings(after, (*stayed, whose))


def check(terms: Terms, roster: Roster | None, stayed: Sequence[Names], found: object, vectors: dict) -> bool:
    """Compares an end with what the rules say; whether there was a sum."""
    everybody, nobody = names(terms.clients), frozenset[str]()
    expected = ending(terms, roster, [*stayed, *[nobody] * (len(STAGES) - len(stayed))])
    if isinstance(found, Abandoned):
        assert not expected.summed, (stayed, str(found))
        assert found.dropped == tuple(name for name in everybody if name not in expected.left)
        assert found.faults == ()
        assert f"at least {terms.survivors} of {terms.clients} clients" in str(found)
        return False
    assert isinstance(found, Outcome)
    assert found.survivors == tuple(sorted(expected.summed)), (stayed, found)
    np.testing.assert_array_equal(found.total, summed(vectors, found.survivors))
    assert found.faults == ()
    return True


def ways(last: int, clients_left: int) -> int:
    """In how many ways so many clients may leave before one of the stages from ``last`` on, or stay."""
    return (len(STAGES) - last + 1) ** clients_left


@pytest.mark.parametrize("terms", [FIVE, LENIENT, RING, STRICT_RING], ids=["four", "three", "ring", "strict ring"])
def test_all_ways_of_five_clients_to_leave(terms: Terms):
    """6^5 = 7,776 of them; those that share a beginning are played together up to where they part."""
    played, covered, sums = start(terms), 0, 0
    for roster, stayed, found in all_endings(played, ()):
        covered += ways(len(stayed), len(stayed[-1]))  # an abandoned round ends alike however the rest would go on
        sums += check(terms, roster, stayed, found, dict(played.vectors))
    assert covered == 6**5
    if terms.neighbours == 4:  # with all neighbours it is the number of those who stay to the end that decides
        assert sums == sum(5**gone * [1, 5, 10][gone] for gone in range(5 - terms.survivors + 1))
    else:
        assert sums > 5


@pytest.mark.parametrize("stage", STAGES)
def test_the_simulation_drops_who_is_said_to_leave(stage: str):
    vectors = inputs(5)
    gone = names(5)[1]
    outcome = run_round(LENIENT, people(5), vectors, {stage: [gone]})
    left = set(names(5)) - ({gone} if STAGES.index(stage) < 3 else set())
    assert set(outcome.survivors) == left
    np.testing.assert_array_equal(outcome.total, summed(vectors, left))
    with pytest.raises(Abandoned, match=r"2 clients are left") as caught:
        run_round(LENIENT, people(5), vectors, {stage: names(5)[2:]})
    assert caught.value.dropped == names(5)[2:]
    assert set(caught.value.traffic) == set(names(5))
    assert all(sent > 0 for name, (_, sent) in caught.value.traffic.items() if name in names(5)[:2])


def leave(terms: Terms, rng: np.random.Generator, chance: float) -> list[Names]:
    """Who answers each stage, where each client leaves before each with this chance."""
    left, stayed = frozenset(names(terms.clients)), []
    for _ in STAGES:
        left = frozenset(name for name in sorted(left) if rng.random() >= chance)
        stayed.append(left)
    return stayed


def one_ending(terms: Terms, stayed: Sequence[Names]) -> bool:
    """Plays one way to leave, and compares."""
    played, seen = start(terms), []
    try:
        for whose in stayed:
            seen.append(whose)
            played = closed(played, answers(played), whose)
        found: object = servers.result(played.server)
    except Abandoned as lost:
        found = lost
    return check(terms, played.server.roster, seen, found, dict(played.vectors))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(3, 64), st.sampled_from([None, 2, 4, 6, 8]), st.integers(0, 2**32), st.sampled_from([0.02, 0.05, 0.1])
)
def test_any_number_of_clients_on_both_graphs(count: int, neighbours: int | None, seed: int, chance: float):
    if neighbours is not None and (neighbours > count - 1 or count > 40):
        neighbours = None if count < 20 else 6
    terms = SecAgg(neighbours=neighbours).make(count if neighbours else min(count, 16))
    one_ending(terms, leave(terms, np.random.default_rng(seed), chance))


@pytest.mark.parametrize(
    ("count", "settings_", "chance"),
    [
        (12, {"threshold": 7}, 0.06),
        (20, {"neighbours": 4, "survivors": 11}, 0.04),
        (24, {"neighbours": 6, "threshold": 5, "survivors": 13}, 0.04),
        (64, {"neighbours": 8, "threshold": 6, "survivors": 33}, 0.03),
    ],
)
def test_some_rounds_end_with_a_sum_and_some_do_not(count: int, settings_: dict[str, int], chance: float):
    terms, rng = SecAgg(**settings_).make(count), np.random.default_rng(1)
    rounds = 6 if count == 64 else 12
    found = {one_ending(terms, leave(terms, rng, chance if number % 2 else 3 * chance)) for number in range(rounds)}
    assert found == {True, False}


def test_a_survivor_that_is_cut_off_from_the_others_ends_the_round():
    """Two on opposite sides of a ring: each sum would be an input."""
    terms = Terms(6, 2, 2, 2, 0)
    played = start(terms)
    everybody = frozenset(names(6))
    for _ in range(2):
        played = closed(played, answers(played), everybody)
    roster = played.server.roster
    assert roster is not None
    ring = [0]
    while len(ring) < 6:
        ring.append(next(p for p in roster.graph[ring[-1]] if p not in ring))
    halves = frozenset(roster.names[ring[place]] for place in (0, 1, 3, 4))
    with pytest.raises(Abandoned, match="do not hang together"):
        closed(played, answers(played), halves)
    half = frozenset(roster.names[ring[place]] for place in (0, 1, 2))
    with pytest.raises(Abandoned, match=r"1 holders of .* shares are left"):  # of a dropped one at an end of the half
        closed(played, answers(played), half)


def test_too_few_signatures_end_a_sparse_round_before_anything_is_opened():
    """Enough signed, but not around one client: no client is asked to unmask."""
    terms = Terms(20, 4, 4, 4, 0)
    played, everybody = start(terms), frozenset(names(20))
    for _ in range(3):
        played = closed(played, answers(played), everybody)
    roster = played.server.roster
    assert roster is not None
    around = {roster.names[place] for place in roster.graph[0][:2]}
    with pytest.raises(Abandoned, match=r"3 holders of .* shares are left"):
        closed(played, answers(played), everybody - around)


def test_too_few_keys_for_the_threshold_end_a_sparse_round():
    terms = Terms(20, 10, 8, 3, 0)
    played = start(terms)
    with pytest.raises(Abandoned, match="5 clients are too few for 8 holders"):
        closed(played, answers(played), frozenset(names(20)[:5]))


def test_with_an_odd_number_left_the_masks_of_a_sparse_graph_cancel_too():
    vectors = inputs(8)
    outcome = run_round(SecAgg(neighbours=4).make(8), people(8), vectors, {"AdvertiseKeys": [names(8)[3]]})
    np.testing.assert_array_equal(outcome.total, summed(vectors, set(names(8)) - {names(8)[3]}))
