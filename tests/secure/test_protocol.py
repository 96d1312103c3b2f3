"""Whole rounds without faults: the sum to the bit, and that what the server sees tells nothing of an input."""

from collections.abc import Mapping

import numpy as np
import pytest
from meetings import FIVE, LENIENT, SESSION, changed, finish, inputs, names, people, play, start, summed, until
from scipy.stats import chi2, norm

from fedjax_llm.secure import client as clients
from fedjax_llm.secure import primitives, sharing
from fedjax_llm.secure import server as servers
from fedjax_llm.secure.client import STAGES
from fedjax_llm.secure.messages import decode
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.secure.simulation import close, open_round, run_round, submit

FALSE_ALARM = 1e-6
EXTREMES = {"zeros": 0, "ones": -1}


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(
    ("count", "settings"),
    [(3, {}), (5, {}), (8, {}), (9, {"neighbours": 4}), (20, {"neighbours": 6}), (32, {"neighbours": 4})],
)
def test_the_sum_is_that_of_the_inputs_to_the_bit(count: int, settings: dict[str, int], bits: int):
    vectors = inputs(count, bits, values=50)
    outcome = run_round(SecAgg(**settings).make(count), people(count), vectors)
    np.testing.assert_array_equal(outcome.total, summed(vectors, names(count)))
    assert outcome.total.dtype == np.dtype(f"<u{bits // 8}")
    assert outcome.survivors == names(count)
    assert outcome.faults == ()


@pytest.mark.parametrize("bits", [16, 32])
def test_sums_wrap_around(bits: int):
    most = np.full(4, 2**bits - 1, f"<u{bits // 8}")
    outcome = run_round(FIVE, people(5), dict.fromkeys(names(5), most))
    np.testing.assert_array_equal(outcome.total, np.full(4, 2**bits - 5, most.dtype))


@pytest.mark.parametrize("neighbours", [None, 4])
def test_the_result_does_not_depend_on_the_randomness_or_the_order(neighbours: int | None):
    """Keys, seeds, graph and order of arrival are others; the sum is the same, and no client's message is."""
    vectors, terms = inputs(8, values=20), SecAgg(neighbours=neighbours).make(8)
    one = run_round(terms, people(8), vectors)
    other = run_round(terms, people(8), dict(reversed(vectors.items())), session=bytes(15) + b"1", round_number=2)
    np.testing.assert_array_equal(one.total, other.total)
    assert one.survivors == other.survivors


def test_inputs_may_come_in_any_order_between_opening_and_closing():
    vectors = inputs(5)
    session = open_round(FIVE, people(5), names(5), session=SESSION, round_number=3, model=bytes(32), values=3)
    for name in reversed(names(5)):
        session = submit(session, name, vectors[name])
    np.testing.assert_array_equal(close(session).total, summed(vectors, names(5)))


def test_the_traffic_is_the_length_of_all_messages():
    received, sent, played = dict.fromkeys(names(5), 0), dict.fromkeys(names(5), 0), start()
    while played.server.stage < len(STAGES):
        played = play(played)
        for name in names(5):
            sent[name] += len(played.sent[name])
            received[name] += len(played.inbox.get(name, b""))
    outcome = run_round(FIVE, people(5), played.vectors)
    assert outcome.traffic == {name: (received[name], sent[name]) for name in names(5)}


def test_the_client_does_not_change_its_input():
    vectors = inputs(5)
    before = {name: vector.copy() for name, vector in vectors.items()}
    run_round(FIVE, people(5), vectors)
    for name in names(5):
        np.testing.assert_array_equal(vectors[name], before[name])


@pytest.mark.parametrize(
    "vector", [np.zeros(4, np.uint32), np.zeros(3, np.uint16), np.zeros(3, np.int32), np.zeros((3, 1), np.uint32)]
)
def test_an_input_of_another_ring_is_refused(vector: np.ndarray):
    played = until("MaskedInput")
    name = names(5)[0]
    with pytest.raises(ValueError, match="3 integers of 32 bits"):
        clients.mask(played.clients[name], played.inbox[name], vector)


def sent_by(name: str, vectors: Mapping[str, np.ndarray], session: bytes, bits: int = 32) -> np.ndarray:
    """The masked input that the server sees."""
    size = next(iter(vectors.values())).size
    opened = open_round(
        FIVE, people(5), names(5), session=session, round_number=1, model=bytes(32), values=size, bits=bits
    )
    _, data = clients.mask(opened.clients[name], opened.inbox[name], vectors[name])
    (raw,) = decode("MaskedInput", opened.meeting, name, data)
    return np.frombuffer(raw, f"<u{bits // 8}")


def chi_square(found: np.ndarray) -> float:
    """Of the bytes against the uniform distribution."""
    counts = np.bincount(np.frombuffer(found.tobytes(), np.uint8), minlength=256)
    return float(((counts - found.nbytes / 256) ** 2 / (found.nbytes / 256)).sum())


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """How far the share of equal bits is from one half, in standard deviations."""
    equal = np.unpackbits(~(one ^ other).view(np.uint8)).mean()
    return float(abs(equal - 0.5) * 2 * np.sqrt(8 * one.nbytes))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("value", EXTREMES.values(), ids=EXTREMES)
def test_what_is_sent_looks_uniform_whatever_the_input(value: int, bits: int):
    """Chi-square of 200,000 bytes; a false alarm once in 10^6 in each of four cases."""
    vector = np.full(200_000 * 8 // bits, value, np.int64).astype(f"<u{bits // 8}")
    found = sent_by(names(5)[2], dict.fromkeys(names(5), vector), SESSION, bits)
    assert chi_square(found) < chi2.isf(FALSE_ALARM, 255)
    assert chi_square(vector) > chi2.isf(FALSE_ALARM, 255)  # the test has power


def test_one_input_in_two_rounds_gives_unrelated_messages():
    """Equal bits of 400,000, and their difference; a false alarm once in 10^6 each."""
    vectors = dict.fromkeys(names(5), np.arange(12_500, dtype=np.uint32))
    one, other = (sent_by(names(5)[0], vectors, session) for session in (SESSION, bytes(16)))
    assert agreement(one, other) < norm.isf(FALSE_ALARM / 2)
    assert chi_square(one - other) < chi2.isf(FALSE_ALARM, 255)


def unmasked_but(left_on: str | int) -> tuple[np.ndarray, np.ndarray]:
    """One client's input and its message with all masks taken off but one: "seed", or that with a place."""
    size, name, place = 25_000, names(5)[1], 1
    vectors = dict.fromkeys(names(5), np.arange(size, dtype=np.uint32))
    opened = open_round(FIVE, people(5), names(5), session=SESSION, round_number=1, model=bytes(32), values=size)
    me, data = clients.mask(opened.clients[name], opened.inbox[name], vectors[name])
    (raw,) = decode("MaskedInput", opened.meeting, name, data)
    found, masks = np.frombuffer(raw, "<u4").copy(), primitives.Masks(size, 32)
    assert me.roster is not None
    if left_on != "seed":
        masks.add(found, me.seed, -1)
    own = primitives.private_key(me.mask_secret, "mask")
    bound = clients.dealers_hash(me.roster, range(5))
    for other in {0, 2, 3, 4} - {left_on}:
        seed = clients.pair_seed(opened.meeting, me.roster, own, place, other, bound)
        masks.add(found, seed, -1 if other > place else 1)
    return vectors[name], found


@pytest.mark.parametrize("left_on", ["seed", 0, 2, 3, 4])
def test_a_single_mask_hides_the_input(left_on: str | int):
    """Neither equal bits nor their difference tell of the input; a false alarm once in 10^6 each."""
    vector, found = unmasked_but(left_on)
    assert agreement(vector, found) < norm.isf(FALSE_ALARM / 2)
    assert chi_square(found - vector) < chi2.isf(FALSE_ALARM, 255)
    assert chi_square(found) < chi2.isf(FALSE_ALARM, 255)


def test_without_any_mask_it_would_be_the_input():
    vector, found = unmasked_but("none")
    np.testing.assert_array_equal(vector, found)


def test_pairs_have_their_own_masks_and_every_round_others():
    seeds = set()
    for session, number in ((SESSION, 1), (SESSION, 2), (bytes(16), 1)):
        played = until("MaskedInput", session=session, number=number)
        for one, me in enumerate(played.clients.values()):
            assert me.roster is not None
            own = primitives.private_key(me.mask_secret, "mask")
            bound = clients.dealers_hash(me.roster, range(5))
            for other in set(range(5)) - {one}:
                seeds.add(
                    (
                        session,
                        number,
                        min(one, other),
                        max(one, other),
                        clients.pair_seed(played.meeting, me.roster, own, one, other, bound),
                    )
                )
            seeds.add((session, number, one, one, me.seed))
    assert len(seeds) == 3 * 15  # both ends of a pair have the same
    assert len({seed for *_, seed in seeds}) == 3 * 15


def test_what_the_server_opens_is_one_secret_of_each():
    """Of survivors the seed, of one that dropped out the key: never as many shares as open the other."""
    gone = names(5)[3]
    played = until("MaskedInput", LENIENT)
    played = finish(played, {"MaskedInput": lambda name, data: None if name == gone else data})
    for dealer, shares in played.server.revealed.items():
        me = played.clients[names(5)[dealer]]
        places = {holder + 1: share for holder, share in shares.items()}
        expected = me.mask_secret if names(5)[dealer] == gone else me.seed
        assert sharing.combined(places, 3) == expected
        assert {len(share) for share in shares.values()} == {primitives.SECRET}
    np.testing.assert_array_equal(servers.result(played.server).total, summed(played.vectors, set(names(5)) - {gone}))


def test_the_result_may_be_taken_twice():
    played = finish(until("Unmask"))
    np.testing.assert_array_equal(servers.result(played.server).total, servers.result(played.server).total)


def test_the_keys_of_a_stage_are_used_for_nothing_else():
    """The same secret gives other keys for other purposes, contexts and lengths of its parts."""
    secret = bytes(16)
    found = [primitives.derived(secret, 32, *context) for context in (("a",), ("b",), ("a", ""), ("ab",), ("a", "b"))]
    found += [primitives.private_key(secret, purpose).private_bytes_raw() for purpose in ("cipher", "mask")]
    assert len(set(found)) == len(found)
    assert len({primitives.packed(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""))}) == 4


def test_a_box_opens_with_its_key_and_context_alone():
    box = primitives.sealed(bytes(32), bytes(32), b"about")
    assert len(box) == primitives.SEALED
    assert primitives.unsealed(bytes(32), box, b"about") == bytes(32)
    assert primitives.unsealed(bytes(32), box, b"other") is None
    assert primitives.unsealed(b"1" * 32, box, b"about") is None
    for place in range(len(box)):
        bad = box[:place] + bytes([box[place] ^ 1]) + box[place + 1 :]
        assert primitives.unsealed(bytes(32), bad, b"about") is None


def test_an_honest_message_survives_being_read_and_written():
    played = play(until("ShareKeys"))
    for name, data in played.sent.items():
        assert changed(played, "ShareKeys", name, data, lambda fields: None) == data
