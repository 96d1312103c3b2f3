"""Clients that lie: each is named with its stage, and the sum of the honest ones is right or the round is abandoned."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meetings import (
    LENIENT,
    MODEL,
    SESSION,
    Forge,
    Round,
    changed,
    finish,
    names,
    only,
    people,
    play,
    start,
    summed,
    until,
)

from fedjax_llm.secure import client as clients
from fedjax_llm.secure import primitives, sharing
from fedjax_llm.secure import server as servers
from fedjax_llm.secure.client import STAGES, Client
from fedjax_llm.secure.messages import encode
from fedjax_llm.secure.outcome import Abandoned, Outcome
from fedjax_llm.secure.sec_agg import Terms
from fedjax_llm.secure.server import Server

LIAR = names(5)[2]
HONEST = tuple(name for name in names(5) if name != LIAR)


def ended(forge: Forge, stage: str, terms: Any = LENIENT) -> Outcome:
    """A round in which answers of one stage are forged."""
    return servers.result(finish(start(terms), {stage: forge}).server)


def blamed(outcome: Outcome | Server | Abandoned) -> set[tuple[str, str]]:
    """Who is said to be at fault, in which stages."""
    return {(fault.client, fault.stage) for fault in outcome.faults}


def is_sum_of(outcome: Outcome, whose: tuple[str, ...]) -> None:
    """Whose inputs are in it, and only theirs."""
    assert outcome.survivors == whose
    np.testing.assert_array_equal(outcome.total, summed(start(LENIENT).vectors, whose))


def costs_its_place(forge: Forge, stage: str, reason: str) -> None:
    """The liar is named, and its input is in the sum if it was before."""
    outcome = ended(only(LIAR, forge), stage)
    assert blamed(outcome) == {(LIAR, stage)}
    assert reason in outcome.faults[0].reason
    is_sum_of(outcome, names(5) if STAGES.index(stage) > 2 else HONEST)


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "malformed": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "larger than": lambda data: data + bytes(10_000),
    "version": lambda data: data[:1] + b"\2" + data[2:],
    "in the name of": lambda data: data.replace(LIAR.encode(), HONEST[0].encode()),
    "another session or round": lambda data: data.replace(SESSION, bytes(16)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_a_message_costs_its_sender_its_place(stage: str, wrong: str):
    reason = {"empty": "malformed", "longer": "m"}.get(wrong, wrong)
    costs_its_place(lambda _, data: WRONG[wrong](data), stage, reason)


@pytest.mark.parametrize("stage", STAGES)
def test_of_two_answers_the_first_counts(stage: str):
    played = until(stage, LENIENT)
    said = play(played).sent[LIAR]
    server = servers.receive(servers.receive(played.server, LIAR, said), LIAR, said)
    assert LIAR in server.answers
    assert blamed(server) == {(LIAR, stage)}
    if stage == "MaskedInput":
        assert server.total is not None
        assert server.total.tobytes() in said  # added once


def test_a_second_input_is_not_in_the_sum():
    played, other = until("MaskedInput", LENIENT), np.full(3, 7, np.uint32)
    _, second = clients.mask(played.clients[LIAR], played.inbox[LIAR], other)
    server = played.server
    for name in names(5):
        state, data = clients.mask(played.clients[name], played.inbox[name], played.vectors[name])
        played.clients[name], server = state, servers.receive(server, name, data)
        if name == LIAR:
            server = servers.receive(server, name, second)
    server, inbox = servers.close(server)
    outcome = servers.result(finish(played._replace(server=server, inbox=inbox)).server)
    assert blamed(outcome) == {(LIAR, "MaskedInput")}
    is_sum_of(outcome, names(5))


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_an_answer_that_comes_too_late_is_not_heard(stage: str):
    """When the next stage is collected, and after the end; who missed a stage is out."""
    played = until(stage, LENIENT)
    said = play(played).sent[LIAR]
    after = play(played, only(LIAR, lambda _, data: None))
    server = servers.receive(after.server, LIAR, said)
    assert "too late" in server.faults[0].reason
    played = finish(after._replace(server=server))
    server = servers.receive(played.server, LIAR, said)
    assert [fault.client for fault in server.faults] == [LIAR, LIAR]
    assert "the round was over" in server.faults[1].reason
    is_sum_of(servers.result(server), names(5) if STAGES.index(stage) > 2 else HONEST)


@pytest.mark.parametrize("stranger", ["site 99", "", "é" * 300])
@pytest.mark.parametrize("stage", STAGES)
def test_who_was_not_invited_is_not_heard(stage: str, stranger: str):
    played = until(stage, LENIENT)
    server = servers.receive(played.server, stranger, play(played).sent[LIAR])
    assert blamed(server) == {(stranger, stage)}
    assert server.answers == {}


def advertised(keys: tuple[bytes, bytes], model: bytes = MODEL, identity: str = LIAR) -> bytes:
    """The liar's keys, signed by somebody."""
    meeting = start(LENIENT).meeting
    signature = primitives.signed(people(5).keys[identity], clients.advertisement(meeting, LIAR, *keys, model))
    return encode("AdvertiseKeys", meeting, LIAR, *keys, model, signature)


FRESH = tuple(primitives.public_bytes(primitives.private_key(bytes([n]) * 16, "any")) for n in range(2))
KEYS: dict[str, bytes] = {
    "not signed by": advertised(FRESH, identity=HONEST[0]),
    "the same": advertised((FRESH[0], FRESH[0])),
    "did not receive the model": advertised(FRESH, bytes(32)),
    "is not one": advertised((FRESH[0], bytes(32))),
    "key is not one": advertised((b"\1" + bytes(31), FRESH[1])),
}


@pytest.mark.parametrize("reason", KEYS)
def test_keys_with_which_others_would_not_go_on_are_refused(reason: str):
    """One client must not stop all others, which would see the fault and blame the server."""
    costs_its_place(lambda *_: KEYS[reason], "AdvertiseKeys", reason)


@pytest.mark.parametrize("purpose", [1, 2], ids=["cipher", "mask"])
def test_the_keys_of_another_are_refused(purpose: int):
    played, taken = start(LENIENT), []

    def copy(name: str, data: bytes) -> bytes:
        changed(played, "AdvertiseKeys", name, data, lambda fields: taken.append(fields[purpose - 1]))
        return advertised((FRESH[0], taken[0])) if name == LIAR else data

    outcome = ended(copy, "AdvertiseKeys")
    assert blamed(outcome) == {(LIAR, "AdvertiseKeys")}
    assert "keys of another" in outcome.faults[0].reason
    is_sum_of(outcome, HONEST)


@pytest.mark.parametrize("change", ["fewer", "reversed", "twice", "none", "foreign"])
def test_shares_must_be_for_all_neighbours(change: str):
    played = start(LENIENT)

    def spoil(fields: list[Any]) -> None:
        boxes = fields[1]
        changes = {"fewer": boxes[1:], "reversed": boxes[::-1], "twice": boxes[:4] + boxes[3:4], "none": []}
        fields[1] = changes.get(change, [*boxes[:3], [3, *boxes[2][1:]], [3, *boxes[4][1:]]])

    costs_its_place(
        lambda name, data: changed(played, "ShareKeys", name, data, spoil), "ShareKeys", "not for its neighbours"
    )


@pytest.mark.parametrize("place", range(4))
def test_a_wrong_share_is_named_and_the_right_ones_suffice(place: int):
    played = start(LENIENT)

    def spoil(fields: list[Any]) -> None:
        fields[0][place][1] = bytes(16)

    costs_its_place(lambda name, data: changed(played, "Unmask", name, data, spoil), "Unmask", "not the one that was")


@pytest.mark.parametrize("change", ["reversed", "twice", "of a stranger"])
def test_shares_must_be_in_order_and_of_those_who_dealt(change: str):
    gone = names(5)[4]
    played = play(start(LENIENT))
    played = play(played, lambda name, data: None if name == gone else data)

    def spoil(fields: list[Any]) -> None:
        shares = fields[0]
        changes = {"reversed": shares[::-1], "twice": shares[:1] + shares}
        fields[0] = changes.get(change, [*shares, [4, bytes(16)]])

    forge = only(LIAR, lambda name, data: changed(played, "Unmask", name, data, spoil))
    outcome = servers.result(finish(played, {"Unmask": forge}).server)
    assert blamed(outcome) == {(LIAR, "Unmask")}
    is_sum_of(outcome, names(5)[:4])


def test_the_share_of_the_other_secret_is_refused():
    """A holder that would give the server both kinds gives one too few of the right kind, and is named."""
    played = until("Unmask", LENIENT)
    shares = sorted(played.clients[LIAR].shares.items())
    data = encode("Unmask", played.meeting, LIAR, [[dealer, both[1]] for dealer, both in shares])
    server = finish(played, {"Unmask": only(LIAR, lambda *_: data)}).server
    assert blamed(server) == {(LIAR, "Unmask")}
    is_sum_of(servers.result(server), names(5))


def test_shares_that_are_kept_back_are_noted_and_the_others_suffice():
    """Whether the dealer dealt nothing or the holder gives nothing cannot be known: dealers are noted, holders told."""
    played = start(LENIENT)
    outcome = ended(only(LIAR, lambda name, data: changed(played, "Unmask", name, data, lambda _: [[]])), "Unmask")
    assert blamed(outcome) == {(name, "ShareKeys") for name in names(5)}
    assert all(f"{LIAR} has no share" in fault.reason for fault in outcome.faults)
    is_sum_of(outcome, names(5))


@pytest.mark.parametrize("survivors", [(0, 1, 2, 3), (0, 1, 2), (0, 1, 2, 4)])
def test_a_signature_under_other_survivors_is_refused(survivors: tuple[int, ...]):
    played = until("ConsistencyCheck", LENIENT)
    roster = played.server.roster
    assert roster is not None
    signature = primitives.signed(played.own.keys[LIAR], clients.agreement(played.meeting, roster, survivors))
    data = encode("ConsistencyCheck", played.meeting, LIAR, signature)
    server = finish(played, {"ConsistencyCheck": only(LIAR, lambda *_: data)}).server
    assert blamed(server) == {(LIAR, "ConsistencyCheck")}
    assert "not under the survivors" in server.faults[0].reason
    is_sum_of(servers.result(server), names(5))


def dealing(played: Round, change: Callable[[Client, int, bytes, bytes], list[Any]], seed: bytes, key: bytes) -> bytes:
    """What a dealer sends that shares these secrets, with boxes of its own making."""
    me, _ = clients.share(played.clients[LIAR], played.inbox[LIAR])
    assert me.roster is not None
    boxes = [change(me, holder, *both) for holder, both in enumerate(_pairs(seed or me.seed, key or me.mask_secret))]
    own = clients.commitment(played.meeting, me.roster, me.place, "seed", 0, me.seed)
    return encode("ShareKeys", played.meeting, LIAR, own, boxes)


def _pairs(seed: bytes, key: bytes) -> list[tuple[bytes, bytes]]:
    """Three of five open each."""
    return list(zip(sharing.dealt(seed, 3, 5), sharing.dealt(key, 3, 5), strict=True))


def boxed(me: Client, holder: int, seed: bytes, key: bytes) -> list[Any]:
    """As an honest dealer does."""
    return clients.boxed(me, holder, seed, key)


def spoilt(me: Client, holder: int, seed: bytes, key: bytes) -> list[Any]:
    """A box that cannot be opened."""
    place, box, *commitments = boxed(me, holder, seed, key)
    return [place, bytes(len(box)), *commitments]


@pytest.mark.parametrize("secret", ["seed", "key"])
def test_shares_of_another_secret_end_the_round_in_the_dealers_name(secret: str):
    """All shares are as they were committed to; what they open is not the secret that its masks are made of."""
    played = until("ShareKeys", LENIENT)
    wrong = {"seed": bytes(16), "key": b""} if secret == "seed" else {"seed": b"", "key": bytes(16)}
    played = play(played, only(LIAR, lambda *_: dealing(played, boxed, **wrong)))
    leaves = only(LIAR, lambda _, data: None if secret == "key" else data)
    with pytest.raises(Abandoned, match=f"{LIAR} dealt shares of something else than its {secret}") as caught:
        servers.result(finish(played, {"MaskedInput": leaves}).server)
    assert blamed(caught.value) == {(LIAR, "ShareKeys")}


def test_a_wrong_secret_that_is_not_needed_does_no_harm():
    played = until("ShareKeys", LENIENT)
    played = finish(play(played, only(LIAR, lambda *_: dealing(played, boxed, b"", bytes(16)))))
    outcome = servers.result(played.server)
    assert outcome.faults == ()
    is_sum_of(outcome, names(5))


def test_boxes_that_some_cannot_open_drive_nobody_out():
    """One dealer must not choose whose inputs are in the sum; enough others hold its shares."""
    played = until("ShareKeys", LENIENT)
    pick = lambda me, holder, *both: (spoilt if holder in (0, 1) else boxed)(me, holder, *both)  # noqa: E731
    outcome = servers.result(finish(play(played, only(LIAR, lambda *_: dealing(played, pick, b"", b"")))).server)
    assert blamed(outcome) == {(LIAR, "ShareKeys")}
    assert [fault.reason.split(" has")[0] for fault in outcome.faults] == [*names(5)[:2]]
    is_sum_of(outcome, names(5))


@pytest.mark.parametrize("stays", [True, False])
def test_boxes_that_nobody_can_open_end_the_round_in_the_dealers_name(stays: bool):
    played = until("ShareKeys", LENIENT)
    played = play(played, only(LIAR, lambda *_: dealing(played, spoilt, b"", b"")))
    leaves = only(LIAR, lambda _, data: data if stays else None)
    with pytest.raises(Abandoned, match=f"0 shares of {LIAR}'s {'seed' if stays else 'key'} are left") as caught:
        servers.result(finish(played, {"MaskedInput": leaves}).server)
    assert blamed(caught.value) == {(LIAR, "ShareKeys")}
    assert len(caught.value.faults) == (5 if stays else 4)


def test_as_many_liars_as_the_terms_allow_do_no_harm():
    """Two of five, a different lie each; four of twelve on a sparse graph."""
    played = until("Unmask", LENIENT)
    lies = {names(5)[0]: b"", names(5)[4]: bytes(3)}
    outcome = servers.result(finish(played, {"Unmask": lambda name, data: lies.get(name, data)}).server)
    assert blamed(outcome) == {(name, "Unmask") for name in lies}
    is_sum_of(outcome, names(5))
    terms = Terms(12, 8, 5, 6, 0)
    liars = names(12)[3:7]
    played = finish(start(terms), {"MaskedInput": lambda name, data: b"\x90" if name in liars else data})
    outcome = servers.result(played.server)
    assert blamed(outcome) == {(name, "MaskedInput") for name in liars}
    np.testing.assert_array_equal(outcome.total, summed(played.vectors, set(names(12)) - set(liars)))


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from(names(5)), st.tuples(st.sampled_from(STAGES), st.binary(max_size=80)), max_size=4),
    st.data(),
)
def test_no_bytes_of_any_client_do_more_than_end_the_round(lies: dict[str, tuple[str, bytes]], data: st.DataObject):
    """Random bytes, or an honest answer with one byte changed: the sum of who submitted, or Abandoned; liars named."""
    played, heard, faults = start(LENIENT), {}, ()
    flips = {name: data.draw(st.none() | st.integers(0, 10_000)) for name in lies}

    def forge(name: str, honest: bytes) -> bytes:
        stage, junk = lies.get(name, ("", b""))
        if stage != STAGES[played.server.stage]:
            return honest
        place = flips[name]
        return junk if place is None else _flipped(honest, place % len(honest))

    try:
        while played.server.stage < len(STAGES):
            stage = STAGES[played.server.stage]
            played = play(played, forge)
            heard[stage] = played.server.alive
        outcome = servers.result(played.server)
        faults = outcome.faults
    except Abandoned as lost:
        outcome, faults = None, lost.faults
    assert {fault.client for fault in faults} <= set(lies)
    if outcome is None:
        assert len(lies) > 2 or any(stage == "ShareKeys" for stage, _ in lies.values())
        return
    assert set(outcome.survivors) == heard["MaskedInput"]
    if not any(stage == "MaskedInput" for stage, _ in lies.values()):
        is_sum_of(outcome, outcome.survivors)


def _flipped(data: bytes, place: int) -> bytes:
    """One bit of one byte."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
