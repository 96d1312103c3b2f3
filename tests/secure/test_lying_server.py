"""A server that lies: whatever it says, a client either goes on as in an honest round or says nothing more, and why."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
from meetings import FIVE, LENIENT, MODEL, SESSION, Round, answer, changed, names, people, play, until

from fedjax_llm.errors import UserError
from fedjax_llm.secure import client as clients
from fedjax_llm.secure import primitives
from fedjax_llm.secure.client import STAGES
from fedjax_llm.secure.messages import SERVER, ProtocolError, decode, encode
from fedjax_llm.secure.sec_agg import SecAgg, Terms

KINDS = {"ShareKeys": "Keys", "MaskedInput": "Shares", "ConsistencyCheck": "Survivors", "Unmask": "Signatures"}
"""What the server sends before each stage."""
VICTIM = names(5)[1]
Change = Callable[[list[Any]], Any]


def refuses(played: Round, data: bytes, reason: str, offender: str = "server", name: str = VICTIM) -> None:
    """The client answers nothing to a message, and says who is at fault."""
    with pytest.raises(ProtocolError, match=reason) as caught:
        answer(played, name, data)
    assert caught.value.offender == offender


def refuses_change(played: Round, change: Change, reason: str, offender: str = "server") -> None:
    """The same, of the server's honest message with something changed in it; the honest one is answered."""
    kind = KINDS[STAGES[played.server.stage]]
    refuses(played, changed(played, kind, SERVER, played.inbox[VICTIM], change), reason, offender)
    answer(played, VICTIM, played.inbox[VICTIM])


def advertised(name: str, *, model: bytes = MODEL, keys: tuple[bytes, bytes] | None = None, **about: Any) -> list[Any]:
    """An entry of the list of keys, signed by its client: a colluder's, or one from another time."""
    meeting, own = until("AdvertiseKeys", **about).meeting, people(5)
    found = keys or tuple(primitives.public_bytes(primitives.private_key(primitives.fresh(), "any")) for _ in range(2))
    message = clients.advertisement(meeting, name, found[0], found[1], model)
    return [name, *found, model, primitives.signed(own.keys[name], message)]


def put(place: int, entry: list[Any]) -> Change:
    """Replaces an entry of the list of keys."""
    return lambda fields: fields[0].__setitem__(place, entry)


@pytest.mark.parametrize("stage", KINDS)
def test_messages_come_when_they_are_due_and_once(stage: str):
    """Too early, again, and of another stage; only what is due is answered."""
    played = until(stage)
    due, fresh = played.inbox[VICTIM], play(played)
    with pytest.raises(ProtocolError, match=f"it sent {KINDS[stage]} again: {VICTIM} is at") as caught:
        answer(fresh, VICTIM, due, stage)
    assert caught.value.offender == "server"
    for other in KINDS:
        if other != stage:
            with pytest.raises(ProtocolError, match=r"again|too early"):
                answer(played, VICTIM, due, other)
            refuses(played, until(other).inbox[VICTIM], "larger than|malformed|fields|where")


@pytest.mark.parametrize("about", [{"session": bytes(16)}, {"number": 2}], ids=["session", "round"])
@pytest.mark.parametrize("stage", KINDS)
def test_messages_of_another_session_or_round_are_refused(stage: str, about: dict[str, Any]):
    refuses(until(stage), until(stage, **about).inbox[VICTIM], "of another session or round")


@pytest.mark.parametrize("stage", KINDS)
def test_messages_in_a_clients_name_are_refused(stage: str):
    played = until(stage)
    fields = decode(KINDS[stage], played.meeting, SERVER, played.inbox[VICTIM])
    refuses(played, encode(KINDS[stage], played.meeting, names(5)[0], *fields), "in the name of")


def test_keys_that_their_client_did_not_sign_are_refused():
    played, other = until("ShareKeys"), names(5)[3]
    stranger = people(6).keys[names(6)[3]]
    forged = advertised(other)
    signature = clients.advertisement(played.meeting, other, forged[1], forged[2], MODEL)
    refuses_change(played, put(3, [*forged[:4], primitives.signed(stranger, signature)]), "not signed by")
    refuses_change(played, put(3, [*forged[:4], bytes(64)]), "not signed by")
    refuses_change(played, lambda fields: fields[0][3].__setitem__(1, forged[1]), "not signed by")
    refuses_change(played, put(3, advertised(other, session=bytes(16))), "not signed by")
    refuses_change(played, put(3, advertised(other, number=2)), "not signed by")
    refuses_change(played, put(3, [other, *advertised(names(5)[4])[1:]]), "not signed by")


def test_a_stranger_in_the_list_of_keys_is_refused():
    played = until("ShareKeys")
    refuses_change(played, lambda fields: fields[0][4].__setitem__(0, "site 99"), "whom the directory does not know")


def test_its_own_keys_must_be_in_the_list_once_and_unchanged():
    """Even others that it signed itself, in this round: of an earlier start."""
    played = until("ShareKeys")
    refuses_change(played, put(1, advertised(VICTIM)), "other keys in the place")
    refuses_change(played, lambda fields: fields[0].__delitem__(1), "it left .* out of the list")


def test_nobody_is_listed_twice_or_out_of_order():
    played = until("ShareKeys")
    refuses_change(played, lambda fields: fields[0].__setitem__(4, fields[0][3]), "holds somebody twice")
    refuses_change(played, lambda fields: fields[0].reverse(), "not in order")
    refuses_change(played, put(4, advertised(names(5)[3])), "holds somebody twice")


def test_no_two_keys_are_the_same():
    """A colluder that signs another's key, or one key for both of its purposes."""
    played = until("ShareKeys")
    (members,) = decode("Keys", played.meeting, SERVER, played.inbox[VICTIM])
    refuses_change(played, put(4, advertised(names(5)[4], keys=(members[0][1], bytes(32)))), "are the same")
    refuses_change(played, put(4, advertised(names(5)[4], keys=(members[1][2], bytes(32)))), "are the same")
    refuses_change(played, put(4, advertised(names(5)[4], keys=(MODEL, MODEL))), "are the same")


def test_a_key_that_agrees_with_everybody_is_its_clients_fault():
    played, colluder = until("ShareKeys"), names(5)[4]
    for key in (bytes(32), b"\1" + bytes(31)):
        refuses_change(played, put(4, advertised(colluder, keys=(key, MODEL))), "is not one", colluder)


def test_all_must_have_received_one_model():
    played = until("ShareKeys")
    refuses_change(played, put(4, advertised(names(5)[4], model=bytes(32))), "one model to")


def test_too_few_keys_are_refused():
    refuses_change(until("ShareKeys"), lambda fields: fields[0].__delitem__(slice(2, 4)), "3 clients, too few")


def test_who_dealt_shares_must_be_told_in_one_way():
    """In order, with itself, without places that nobody has, and with a box from each neighbour among them."""
    played, reason = until("MaskedInput"), "not of the clients that it says"
    refuses_change(played, lambda fields: fields[0].__delitem__(1), reason)
    refuses_change(played, lambda fields: fields[0].reverse(), reason)
    refuses_change(played, lambda fields: fields[0].__setitem__(4, [3]), reason)
    refuses_change(played, lambda fields: fields[0].__delitem__(-1), reason)
    refuses_change(played, lambda fields: fields[1].__delitem__(-1), reason)
    refuses_change(played, lambda fields: fields[1].reverse(), reason)
    refuses_change(played, lambda fields: fields[1].__setitem__(0, fields[1][2]), reason)
    for own in (False, True):
        gone = [place for place in range(5) if (place == 1) == own][:2]
        refuses_change(played, lambda fields, gone=gone: _without(fields, gone), reason if own else "too few to open")
    absent = names(5)[4]
    four = play(until("AdvertiseKeys"), lambda name, data: None if name == absent else data)
    refuses_change(play(four), lambda fields: fields[0].append([4]), reason)


def _without(fields: list[Any], gone: list[int]) -> list[Any]:
    """Shares as if some had dealt none."""
    return [[entry for entry in field if entry[0] not in gone] for field in fields]


@pytest.mark.parametrize("swap", ["another dealer's", "another holder's", "flipped", "commitment"])
def test_a_box_that_is_not_the_dealers_is_not_kept(swap: str):
    """The client goes on without that share: it has one less to give, and its masks are on as ever."""
    played = until("MaskedInput")
    other, holder = names(5)[3], names(5)[2]
    (_, foreign) = decode("Shares", played.meeting, SERVER, played.inbox[holder])

    def change(fields: list[Any]) -> None:
        entry = fields[1][3]
        if swap == "another dealer's":
            entry[1:] = fields[1][2][1:]
        elif swap == "another holder's":
            entry[1:] = foreign[3][1:]
        elif swap == "flipped":
            entry[1] = bytes([entry[1][0] ^ 1]) + entry[1][1:]
        else:
            entry[2], entry[3] = entry[3], entry[2]

    data = changed(played, "Shares", SERVER, played.inbox[VICTIM], change)
    me, masked = answer(played, VICTIM, data)
    assert sorted(me.shares) == [0, 1, 2, 4]
    assert masked == answer(played, VICTIM, played.inbox[VICTIM])[1]
    played = play(played)
    played = play(played._replace(clients=played.clients | {VICTIM: me}))
    _, unmasked = answer(played, VICTIM, played.inbox[VICTIM])
    (shares,) = decode("Unmask", played.meeting, VICTIM, unmasked)
    assert [dealer for dealer, _ in shares] == [0, 1, 2, 4]
    assert other not in {names(5)[dealer] for dealer, _ in shares}


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        ([0, 1, 2], r"a sum of 3 clients.*at least 4"),
        ([], "has dropped out"),
        ([0, 2, 3, 4], f"says that {VICTIM} has dropped out"),
        ([0, 1, 2, 3, 3], "dealt no shares"),
        ([0, 1, 3, 2, 4], "dealt no shares"),
    ],
)
def test_survivors_must_be_enough_and_the_client_one_of_them(survivors: list[int], reason: str):
    refuses_change(until("ConsistencyCheck"), lambda _: [[[place] for place in survivors]], reason)


def test_a_survivor_must_have_dealt_shares_to_this_client():
    """Also where the others were told that it did: the set must lie within all that were told."""
    played, gone = until("ShareKeys"), names(5)[4]
    played = play(play(played, lambda name, data: None if name == gone else data))
    refuses_change(played, lambda _: [[[place] for place in range(5)]], "dealt no shares")


def test_survivors_must_hang_together():
    """On a ring of six with two missing on opposite sides each sum would be of two."""
    terms = Terms(6, 2, 2, 2, 0)
    played = until("ConsistencyCheck", terms)
    roster = played.server.roster
    assert roster is not None
    first, last = roster.graph[1]
    beyond = next(place for place in roster.graph[last] if place != 1)
    far = {0, 1, 2, 3, 4, 5} - {1, first, last, beyond}
    pairs = [[1, first], sorted(far | {beyond})]
    split = sorted({*pairs[0], *(place for place in pairs[1] if place not in roster.graph[first])})
    refuses_change(played, lambda _: [[[place] for place in split]], "do not hang together")
    alone = sorted({0, 1, 2, 3, 4, 5} - {first, last})
    refuses_change(played, lambda _: [[[place] for place in alone]], "4 clients with 1 holders")


def test_signatures_must_be_enough_and_of_survivors():
    played, reason = until("Unmask"), "are no survivors"
    refuses_change(played, lambda fields: fields[0].__delitem__(slice(3, 5)), "only 3 clients signed")
    refuses_change(played, lambda _: [[]], "only 0 clients signed")
    refuses_change(played, lambda fields: fields[0].reverse(), reason)
    refuses_change(played, lambda fields: fields[0].__setitem__(4, fields[0][3]), reason)
    gone = names(5)[4]
    four = play(until("MaskedInput", LENIENT), lambda name, data: None if name == gone else data)
    refuses_change(play(four), lambda fields: fields[0].append([4, bytes(64)]), reason)


def test_signatures_must_be_under_the_survivors_that_this_client_was_told():
    played = until("Unmask")
    roster, own = played.server.roster, played.own
    assert roster is not None
    message = clients.agreement(played.meeting, roster, (0, 1, 2, 3))
    others = [
        primitives.signed(own.keys[names(5)[4]], message),
        primitives.signed(own.keys[names(5)[3]], clients.agreement(played.meeting, roster, (0, 1, 2, 3, 4))),
        advertised(names(5)[4])[-1],
        bytes(64),
    ]
    for signature in others:
        refuses_change(played, lambda fields, s=signature: fields[0].__setitem__(4, [4, s]), "did not sign")
    for about in ({"session": bytes(16)}, {"number": 2}, {}):  # the last: other keys, in the same session and round
        (old,) = decode("Signatures", (past := until("Unmask", **about)).meeting, SERVER, past.inbox[VICTIM])
        refuses_change(played, lambda fields, old=old: [old], "did not sign")


def test_two_stories_are_noticed_by_the_signatures():
    """Three are told that all survived, two that the victim did not; each is shown what the five signed."""
    played = until("ConsistencyCheck")
    stories = {name: (0, 1, 2, 3, 4) if place < 3 else (0, 2, 3, 4) for place, name in enumerate(names(5))}
    told = {
        name: encode("Survivors", played.meeting, SERVER, [[place] for place in stories[name]]) for name in names(5)
    }
    signed = {name: answer(played, name, told[name]) for name in names(5)}
    played = played._replace(clients={name: state for name, (state, _) in signed.items()})
    shown = [[p, *decode("ConsistencyCheck", played.meeting, n, signed[n][1])] for p, n in enumerate(names(5))]
    for name in names(5):
        fitting = [entry for entry in shown if entry[0] in stories[name]]
        with pytest.raises(ProtocolError, match="did not sign the survivors") as caught:
            answer(played, name, encode("Signatures", played.meeting, SERVER, fitting), "Unmask")
        assert caught.value.offender == "server"


def opened(played: Round, group: set[int], told: tuple[int, ...], bad: set[int], victim: int) -> set[int]:
    """Who gives a share of the victim, of those who are told these survivors; colluders sign whatever is asked."""
    meeting, roster = played.meeting, played.server.roster
    assert roster is not None
    message, states, signatures = clients.agreement(meeting, roster, told), {}, []
    for place in sorted(group):
        try:
            data = encode("Survivors", meeting, SERVER, [[member] for member in told])
            states[place], _ = clients.confirm(played.clients[roster.names[place]], data)
        except ProtocolError:
            continue
    for place in sorted({*states, *bad}.intersection(told)):
        signatures.append([place, primitives.signed(played.own.keys[roster.names[place]], message)])
    gave = {place for place in bad if victim in roster.holders(place)}
    for place, state in states.items():
        try:
            _, data = clients.unmask(state, encode("Signatures", meeting, SERVER, signatures))
        except ProtocolError:
            continue
        (shares,) = decode("Unmask", meeting, roster.names[place], data)
        gave |= {place} if victim in dict(shares) else set()
    return gave


def both_opened(terms: Terms) -> bool:
    """Whether some split of the honest clients, with some colluders, opens both secrets of the first client."""
    played, everybody = until("ConsistencyCheck", terms), set(range(terms.clients))
    for bad in map(set, combinations(range(1, terms.clients), terms.colluders)):
        honest = sorted(everybody - bad)
        for mask in product((True, False), repeat=len(honest)):
            alive = {place for place, one in zip(honest, mask, strict=True) if one}
            seeds = opened(played, alive, tuple(sorted(everybody)), bad, 0)
            keys = opened(played, everybody - bad - alive, tuple(sorted(everybody - {0})), bad, 0)
            if len(seeds) >= terms.threshold and len(keys) >= terms.threshold:
                return True
    return False


def accepted() -> list[Terms]:
    """The laxest terms of five clients that are accepted, for each number of colluders."""
    found = []
    for neighbours, colluders in product((2, 4), range(4)):
        for threshold in range(2, neighbours + 2):
            try:
                found.append(
                    SecAgg(
                        threshold, neighbours, max(2 + colluders, threshold, (5 + colluders) // 2 + 1), colluders
                    ).make(5)
                )
                break
            except UserError:
                continue
    return found


@pytest.mark.parametrize("terms", accepted(), ids=str)
def test_no_two_stories_open_both_secrets_of_a_client(terms: Terms):
    assert not both_opened(terms)


@pytest.mark.parametrize("terms", [Terms(5, 4, 3, 3, 1), Terms(5, 4, 4, 3, 3), Terms(5, 2, 2, 2, 1)], ids=str)
def test_two_stories_would_open_both_where_the_threshold_is_one_lower(terms: Terms):
    """Terms that ``SecAgg`` refuses: the search above finds what it looks for."""
    with pytest.raises(UserError, match=r"secure\.threshold"):
        SecAgg(terms.threshold, terms.neighbours, 5, terms.colluders).make(5)
    assert both_opened(terms)


@pytest.mark.parametrize("lies", [False, True])
def test_masks_of_clients_that_were_told_of_other_dealers_do_not_cancel(lies: bool):
    """Else the ends of an arc could be made to leave out their masks with the rest, and the arc's sum be opened."""
    played = until("MaskedInput", Terms(9, 4, 4, 5, 0))
    roster, seeds = played.server.roster, []
    assert roster is not None
    ends = (0, roster.graph[0][0])
    hidden = next(place for place in range(9) if place not in ends)
    for place, other in (ends, ends[::-1]):
        dealers = [one for one in range(9) if not (lies and place == 0 and one == hidden)]
        boxes = [[one, *played.server.dealt[one][1][place]] for one in roster.holders(place) if one in dealers]
        data, name = encode("Shares", played.meeting, SERVER, [[one] for one in dealers], boxes), roster.names[place]
        state, _ = clients.mask(played.clients[name], data, played.vectors[name])
        own, bound = primitives.private_key(state.mask_secret, "mask"), clients.dealers_hash(roster, dealers)
        seeds.append(clients.pair_seed(played.meeting, roster, own, place, other, bound))
    assert (seeds[0] == seeds[1]) == (not lies)


def test_in_the_honest_meeting_all_know_the_same():
    played = until("ConsistencyCheck")
    assert {state.roster for state in played.clients.values()} == {played.server.roster}
    assert played.meeting.session == SESSION
    assert played.meeting.terms == FIVE
