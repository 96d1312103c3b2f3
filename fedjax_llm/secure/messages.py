"""The messages of secure aggregation as bytes: a schema for each kind, sizes bounded before anything is parsed.

A message is a msgpack array ``[version, kind, session, round, sender, *fields]``; nothing in it can name code. What
arrives must be of the expected kind, session and round, hold exactly the fields of its schema with their lengths, and
be the one encoding of what it says; anything else is a :class:`ProtocolError`.
"""

import reprlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgpack

from fedjax_llm.errors import UserError
from fedjax_llm.secure.primitives import HASH, PUBLIC, SEALED, SECRET, SIGNATURE
from fedjax_llm.secure.sec_agg import Terms

VERSION = 1
SERVER = ""
"""The server's name as a sender."""
_NAME = 256


class ProtocolError(UserError):
    """Somebody broke the protocol. ``offender`` is a client's name, or "server"."""

    def __init__(self, offender: str, reason: str) -> None:
        super().__init__(f"secure aggregation: {offender or 'server'}: {reason}")
        self.offender, self.reason = offender or "server", reason


class Meeting(NamedTuple):
    """What all parties of a round know before it.

    Attributes:
      terms: how many clients there are, and how many must stay.
      session: 16 bytes, of this attempt at this round alone.
      round: its number.
      values: P, how many integers an input has.
      bits: 16 or 32, of the ring.
    """

    terms: Terms
    session: bytes
    round: int
    values: int
    bits: int


class Bytes(NamedTuple):
    """Exactly so many bytes."""

    length: int


class Text(NamedTuple):
    """UTF-8 of at most so many bytes, and at least one."""

    most: int


class Whole(NamedTuple):
    """A whole number from 0 to below a bound."""

    below: int


class Listing(NamedTuple):
    """A list of at most so many items, each an array with these fields."""

    most: int
    item: tuple[Any, ...]


def schema(kind: str, meeting: Meeting) -> tuple[Any, ...]:
    """The fields of a kind of message in a round."""
    n, most = meeting.terms.clients, meeting.terms.neighbours + 1
    member = Whole(n)
    fields: dict[str, tuple[Any, ...]] = {
        # from clients
        "AdvertiseKeys": (Bytes(PUBLIC), Bytes(PUBLIC), Bytes(HASH), Bytes(SIGNATURE)),
        "ShareKeys": (Bytes(HASH), Listing(most, (member, Bytes(SEALED), Bytes(HASH), Bytes(HASH)))),
        "MaskedInput": (Bytes(meeting.values * meeting.bits // 8),),
        "ConsistencyCheck": (Bytes(SIGNATURE),),
        "Unmask": (Listing(most, (member, Bytes(SECRET))),),
        # from the server
        "Keys": (Listing(n, (Text(_NAME), Bytes(PUBLIC), Bytes(PUBLIC), Bytes(HASH), Bytes(SIGNATURE))),),
        "Shares": (Listing(n, (member,)), Listing(most, (member, Bytes(SEALED), Bytes(HASH), Bytes(HASH)))),
        "Survivors": (Listing(n, (member,)),),
        "Signatures": (Listing(n, (member, Bytes(SIGNATURE))),),
    }
    return fields[kind]


def encode(kind: str, meeting: Meeting, sender: str, *fields: Any) -> bytes:
    """A message as bytes."""
    return _packed([VERSION, kind, meeting.session, meeting.round, sender, *fields])


def decode(kind: str, meeting: Meeting, sender: str, data: bytes) -> list[Any]:
    """The fields of a message that must be of this kind and sender.

    Args:
      kind: that is due.
      meeting: the round.
      sender: who sent it, as the connection tells; the server's is empty.
      data: what came.

    Raises:
      ProtocolError: naming the sender.
    """
    expected = schema(kind, meeting)
    most = 64 + 2 * _NAME + sum(_room(field) for field in expected)
    if not isinstance(data, bytes) or len(data) > most:
        raise ProtocolError(sender, f"its {kind} is larger than the {most:,} bytes that it can have")
    longest = max([len(expected) + 5, 5, *(field.most for field in expected if isinstance(field, Listing))])
    limits = {"max_array_len": longest, "max_map_len": 0, "max_ext_len": 0, "max_str_len": _NAME, "max_bin_len": most}
    try:
        message = msgpack.unpackb(data, raw=False, use_list=True, **limits)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(sender, f"its {kind} is malformed ({type(error).__name__})") from error
    if not isinstance(message, list) or len(message) != 5 + len(expected):
        raise ProtocolError(sender, f"its {kind} does not have the fields of one")
    if type(message[0]) is not int or message[0] != VERSION:
        raise ProtocolError(sender, f"it speaks version {reprlib.repr(message[0])} of the protocol, not {VERSION}")
    if message[1] != kind:
        raise ProtocolError(sender, f"it sent {reprlib.repr(message[1])} where {kind} is due")
    if message[2] != meeting.session or type(message[3]) is not int or message[3] != meeting.round:
        raise ProtocolError(sender, f"its {kind} is of another session or round (a replay?)")
    if message[4] != sender:
        raise ProtocolError(sender, f"its {kind} is in the name of {reprlib.repr(message[4])}")
    for place, (field, value) in enumerate(zip(expected, message[5:], strict=True)):
        if not _fits(field, value):
            raise ProtocolError(sender, f"field {place} of its {kind} is not what the protocol asks for")
    if _packed(message) != data:
        raise ProtocolError(sender, f"its {kind} is not encoded in the one way that there is")
    return message[5:]


def ascending(members: Sequence[int]) -> bool:
    """Whether places are in ascending order, none of them twice."""
    return all(one < other for one, other in pairwise(members))


def _packed(message: list[Any]) -> bytes:
    """The one encoding of a message."""
    data = msgpack.packb(message, use_bin_type=True)
    assert data is not None
    return data


def _room(field: Any) -> int:
    """The most bytes that a field takes."""
    if isinstance(field, Listing):
        return 5 + field.most * (5 + sum(_room(part) for part in field.item))
    return {Bytes: 5, Text: 5, Whole: 9}[type(field)] + (0 if isinstance(field, Whole) else field[0])


def _fits(field: Any, value: Any) -> bool:
    """Whether a value is what a field may hold."""
    if isinstance(field, Bytes):
        return isinstance(value, bytes) and len(value) == field.length
    if isinstance(field, Text):
        return isinstance(value, str) and 0 < len(value.encode("utf-8", "replace")) <= field.most
    if isinstance(field, Whole):
        return type(value) is int and 0 <= value < field.below
    if not isinstance(value, list) or len(value) > field.most:
        return False
    return all(
        isinstance(item, list)
        and len(item) == len(field.item)
        and all(_fits(part, inner) for part, inner in zip(field.item, item, strict=True))
        for item in value
    )
