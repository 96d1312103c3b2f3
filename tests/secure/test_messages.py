"""Messages: what is encoded comes back; nothing else is accepted, whatever its bytes, and nothing crashes."""

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meetings import FIVE, SESSION

from fedjax_llm.secure import messages
from fedjax_llm.secure.messages import Bytes, Listing, Meeting, ProtocolError, Text, Whole, ascending, decode, encode

MEETING = Meeting(FIVE, SESSION, 7, 4, 16)
FROM_CLIENTS = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")
FROM_SERVER = ("Keys", "Shares", "Survivors", "Signatures")
KINDS = dict.fromkeys(FROM_CLIENTS, "site") | dict.fromkeys(FROM_SERVER, messages.SERVER)
"""Every kind with a sender of it."""
FUZZ = settings(max_examples=150, deadline=None)
kinds = st.sampled_from(sorted(KINDS))
every_kind = pytest.mark.parametrize("kind", KINDS)


def values(field: Any) -> st.SearchStrategy[Any]:
    """All that a field may hold."""
    if isinstance(field, Bytes):
        return st.binary(min_size=field.length, max_size=field.length)
    if isinstance(field, Text):
        return st.text(st.characters(codec="utf-8"), min_size=1, max_size=field.most // 4)
    if isinstance(field, Whole):
        return st.integers(0, field.below - 1)
    return st.lists(st.tuples(*map(values, field.item)).map(list), max_size=field.most)


def fields_of(kind: str) -> st.SearchStrategy[list[Any]]:
    """All that a kind of message may say."""
    return st.tuples(*map(values, messages.schema(kind, MEETING))).map(list)


def least(field: Any) -> Any:
    """The plainest value of a field, with one item where it is a list."""
    if isinstance(field, Listing):
        return [[least(part) for part in field.item]]
    return {Bytes: lambda: bytes(field[0]), Text: lambda: "a", Whole: lambda: 0}[type(field)]()


def plain(kind: str) -> list[Any]:
    """The parts of a valid message."""
    fields = [least(field) for field in messages.schema(kind, MEETING)]
    return [messages.VERSION, kind, SESSION, 7, KINDS[kind], *fields]


def refused(kind: str, data: Any) -> str:
    """The reason why a message is not accepted, which must be a fault of the sender."""
    with pytest.raises(ProtocolError) as caught:
        decode(kind, MEETING, KINDS[kind], data)
    assert caught.value.offender == (KINDS[kind] or "server")
    assert len(caught.value.reason) < 400
    return caught.value.reason


def refused_or_itself(kind: str, data: bytes) -> None:
    """Either it is the one encoding of what is read, or its sender is at fault."""
    try:
        fields = decode(kind, MEETING, KINDS[kind], data)
    except ProtocolError:
        refused(kind, data)
        return
    assert encode(kind, MEETING, KINDS[kind], *fields) == data


@FUZZ
@given(kinds.flatmap(lambda kind: st.tuples(st.just(kind), fields_of(kind))))
def test_what_is_encoded_comes_back(message: tuple[str, list[Any]]):
    kind, fields = message
    assert decode(kind, MEETING, KINDS[kind], encode(kind, MEETING, KINDS[kind], *fields)) == fields


@FUZZ
@given(kinds, st.binary(max_size=400))
def test_arbitrary_bytes_crash_nothing(kind: str, data: bytes):
    refused_or_itself(kind, data)


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary()
EXTENSIONS = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
MAPS = st.dictionaries(st.text(max_size=3), SCALARS, max_size=3)
ANYTHING = st.recursive(SCALARS | EXTENSIONS | MAPS, lambda inner: st.lists(inner, max_size=6))


@FUZZ
@given(kinds, ANYTHING)
def test_arbitrary_values_crash_nothing(kind: str, value: Any):
    refused(kind, msgpack.packb(value))


@FUZZ
@given(kinds, st.data())
def test_a_part_of_another_type_is_refused(kind: str, data: st.DataObject):
    parts = plain(kind)
    place = data.draw(st.integers(0, len(parts) - 1))
    parts[place] = data.draw(ANYTHING)
    refused_or_itself(kind, msgpack.packb(parts))


@settings(max_examples=400, deadline=None)
@given(kinds, st.data())
def test_no_change_of_the_bytes_crashes_or_is_read_as_something_else(kind: str, data: st.DataObject):
    good = msgpack.packb(plain(kind))
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        where, byte = data.draw(st.integers(0, len(bad))), data.draw(st.integers(0, 255))
        how = data.draw(st.sampled_from(("set", "insert", "remove", "truncate")))
        if how == "insert":
            bad.insert(where, byte)
        elif how == "truncate":
            del bad[where:]
        elif where < len(bad):
            bad[where : where + 1] = bytes([byte]) if how == "set" else b""
    refused_or_itself(kind, bytes(bad))


@every_kind
def test_every_single_byte_matters(kind: str):
    """All truncations, all bytes appended, and all single bytes flipped in the part that is not free to choose."""
    good = encode(kind, MEETING, KINDS[kind], *plain(kind)[5:])
    for length in range(len(good)):
        refused(kind, good[:length])
    for byte in range(256):
        refused(kind, good + bytes([byte]))
    start = len(msgpack.packb(plain(kind)[:5]))  # the array's own byte says how many parts there are, in one byte too
    for place in range(start):
        for bit in range(8):
            refused(kind, good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])


@every_kind
@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, 2, "version 2"),
        (0, True, "version True"),
        (0, 1.0, "version 1.0"),
        (0, [0] * 5, "version"),
        (1, "Hello", "'Hello' where"),
        (1, b"Unmask", "where"),
        (2, bytes(16), "another session or round"),
        (2, SESSION[:-1], "another session or round"),
        (2, SESSION.decode(), "another session or round"),
        (3, 8, "another session or round"),
        (3, 7.0, "another session or round"),
        (3, -7, "another session or round"),
        (4, "other", "in the name of 'other'"),
        (4, b"site", "in the name of"),
        (4, None, "in the name of"),
    ],
)
def test_the_head_must_be_that_of_the_stage(kind: str, place: int, value: Any, reason: str):
    parts = plain(kind)
    parts[place] = value
    assert reason in refused(kind, msgpack.packb(parts))


@pytest.mark.parametrize("other", KINDS)
@every_kind
def test_a_message_of_another_kind_is_refused(kind: str, other: str):
    if kind != other:
        refused(kind, encode(other, MEETING, KINDS[kind], *plain(other)[5:]))


@every_kind
def test_a_message_of_another_round_session_or_sender_is_refused(kind: str):
    for other in (MEETING._replace(round=8), MEETING._replace(session=bytes(16))):
        assert "a replay" in refused(kind, encode(kind, other, KINDS[kind], *plain(kind)[5:]))
    assert "name of" in refused(kind, encode(kind, MEETING, "another", *plain(kind)[5:]))


@every_kind
def test_extra_and_missing_fields_are_refused(kind: str):
    assert "fields" in refused(kind, msgpack.packb(plain(kind)[:-1]))
    refused(kind, msgpack.packb([*plain(kind), 0]))
    refused(kind, msgpack.packb(dict(enumerate(plain(kind)))))


WRONG = [True, None, 1.0, -1, 2**32, "", "text", b"", bytes(1000), [], [[]], ["0"], [[True]], {}, {"a": 1}]
WRONG += [msgpack.ExtType(1, b"0"), msgpack.ExtType(1, b""), msgpack.Timestamp(1), [[[[0]]]], bytes(16).decode()]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@every_kind
def test_a_field_of_the_wrong_type_is_refused(kind: str, wrong: Any):
    """At the top and within the items of lists; an empty list is one."""
    schema = messages.schema(kind, MEETING)
    for place, field in enumerate(schema, 5):
        parts = plain(kind)
        if not (isinstance(field, Listing) and wrong == []):
            refused(kind, msgpack.packb([*parts[:place], wrong, *parts[place + 1 :]]))
        if not isinstance(field, Listing):
            continue
        for inner, what in enumerate(field.item):
            if isinstance(what, Text) and isinstance(wrong, str) and wrong:
                continue
            item = parts[place][0]
            spoilt = [*item[:inner], wrong, *item[inner + 1 :]]
            refused(kind, msgpack.packb([*parts[:place], [spoilt], *parts[place + 1 :]]))
        for spoilt in (parts[place][0][:-1], [*parts[place][0], 0], wrong):
            refused(kind, msgpack.packb([*parts[:place], [spoilt], *parts[place + 1 :]]))


@every_kind
def test_lists_hold_no_more_than_there_are_clients_and_whole_numbers_name_one_of_them(kind: str):
    for place, field in enumerate(messages.schema(kind, MEETING), 5):
        if isinstance(field, Listing):
            parts = plain(kind)
            parts[place] *= field.most
            decode(kind, MEETING, KINDS[kind], msgpack.packb(parts))
            parts[place] = parts[place] + parts[place][:1]
            refused(kind, msgpack.packb(parts))
            if isinstance(field.item[0], Whole):
                for wrong in (field.item[0].below, -1):
                    parts[place] = [[wrong, *parts[place][0][1:]]]
                    refused(kind, msgpack.packb(parts))


@every_kind
def test_what_is_too_large_is_refused_before_it_is_parsed(kind: str, monkeypatch: pytest.MonkeyPatch):
    def parse(*_: Any, **__: Any) -> None:
        pytest.fail("it was parsed")

    monkeypatch.setattr(msgpack, "unpackb", parse)
    for data in (bytes(100_000), msgpack.packb(bytes(100_000)), bytearray(10), "text", None):
        assert "larger than" in refused(kind, data)


@every_kind
def test_the_largest_message_fits(kind: str):
    """The bound on the size is no less than what the schema allows."""

    def largest(field: Any) -> Any:
        if isinstance(field, Listing):
            return [[largest(part) for part in field.item]] * field.most
        whole = {Bytes: lambda: bytes(field[0]), Text: lambda: "a" * field[0], Whole: lambda: field[0] - 1}
        return whole[type(field)]()

    name = "é" * 128 if KINDS[kind] else ""
    data = encode(kind, MEETING, name, *(largest(field) for field in messages.schema(kind, MEETING)))
    assert decode(kind, MEETING, name, data)


def wide(value: Any) -> bytes:
    """The same value in msgpack's widest encoding."""
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, str):
        return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
    if isinstance(value, int):
        return b"\xcf" + struct.pack(">Q", value)
    return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(msgpack.packb, value))


@every_kind
def test_another_encoding_of_the_same_is_refused(kind: str):
    parts = plain(kind)
    for place, part in enumerate(parts):
        head = bytes([0x90 + len(parts)]) + b"".join(map(msgpack.packb, parts[:place]))
        data = head + wide(part) + b"".join(map(msgpack.packb, parts[place + 1 :]))
        assert msgpack.unpackb(data) == parts
        assert "encoded" in refused(kind, data)
    assert "encoded" in refused(kind, wide(parts))


@every_kind
def test_deep_nests_and_long_repetitions_stay_cheap(kind: str):
    for depth in (100, 500, 511, 512, 550):
        refused(kind, b"\x91" * depth + b"\x00")
    parts = plain(kind)
    for place in (0, 1, 4):
        refused(kind, msgpack.packb([*parts[:place], "x" * 200, *parts[place + 1 :]]))
        refused(kind, msgpack.packb([*parts[:place], bytes(700), *parts[place + 1 :]]))
    refused(kind, b"\xdd\xff\xff\xff\xff" + bytes(20))  # claims 2^32 - 1 items
    refused(kind, b"\xc6\xff\xff\xff\xff" + bytes(20))


def test_text_that_is_not_utf_8_is_malformed():
    good = encode("Survivors", MEETING, messages.SERVER, [[0]])
    assert "malformed" in refused("Survivors", good.replace(b"Survivors", b"Survivor\xff"))


def test_the_offender_and_the_reason_are_in_the_error():
    assert str(ProtocolError("", "it lied")) == "secure aggregation: server: it lied"
    assert (ProtocolError("site 1", "x").offender, ProtocolError("", "x").offender) == ("site 1", "server")


@given(st.lists(st.integers(0, 9)))
def test_ascending_means_sorted_and_without_repetition(members: list[int]):
    assert ascending(members) == (members == sorted(set(members)))
