"""Rounds of secure aggregation for tests: who takes part, and a round played stage by stage by hand."""

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.secure import client as clients
from fedjax_llm.secure import server as servers
from fedjax_llm.secure.client import STAGES, Client
from fedjax_llm.secure.messages import Meeting, decode, encode
from fedjax_llm.secure.sec_agg import SecAgg, Terms
from fedjax_llm.secure.server import Server
from fedjax_llm.secure.simulation import Identities, identities

VALUES = 3
MODEL = bytes(range(32))
SESSION = b"a session of one"
FIVE = SecAgg().make(5)
"""Complete, 4 of 5 open a secret, 4 survivors."""
LENIENT = SecAgg(threshold=3).make(5)
"""Complete, 3 of 5 open a secret, 3 survivors."""


def names(count: int) -> tuple[str, ...]:
    """Of so many clients, in alphabetical order."""
    return tuple(f"site {place:02}" for place in range(count))


@cache
def people(count: int) -> Identities:
    """Identities of so many clients, the same in every test: a round's keys are fresh."""
    return identities(names(count))


def inputs(count: int, bits: int = 32, values: int = VALUES, seed: int = 0) -> dict[str, np.ndarray]:
    """Uniform integers of the ring, by name."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 2**bits, (count, values), dtype=np.uint64).astype(f"<u{bits // 8}")
    return dict(zip(names(count), drawn, strict=True))


def summed(vectors: Mapping[str, np.ndarray], whose: Collection[str]) -> np.ndarray:
    """Of some clients' inputs, modulo 2^bits: what a round should give."""
    (dtype,) = {vector.dtype for vector in vectors.values()}
    exact = [sum(int(vectors[name][place]) for name in whose) for place in range(next(iter(vectors.values())).size)]
    return np.array([value % 2 ** (8 * dtype.itemsize) for value in exact], dtype)


class Round(NamedTuple):
    """A round by hand: the states of all, and what the server has sent each client.

    Attributes:
      meeting: what all know.
      own: identities.
      vectors: inputs by name.
      server: its state.
      clients: their states by name.
      inbox: the server's messages by name.
      sent: what each client answered in the stage that was played last, by name.
    """

    meeting: Meeting
    own: Identities
    vectors: Mapping[str, np.ndarray]
    server: Server
    clients: dict[str, Client]
    inbox: dict[str, bytes]
    sent: dict[str, bytes]


Forge = Callable[[str, bytes], bytes | None]
"""Makes of a client's name and honest answer what it sends instead; ``None``: nothing."""


def honest(_name: str, data: bytes) -> bytes | None:
    """Sends what a client should."""
    return data


def start(terms: Terms = FIVE, *, session: bytes = SESSION, number: int = 1, bits: int = 32) -> Round:
    """A round before its first message."""
    own, meeting = people(terms.clients), Meeting(terms, session, number, VALUES, bits)
    server = servers.begin(meeting, own.directory, names(terms.clients), MODEL)
    return Round(meeting, own, inputs(terms.clients, bits), server, {}, {}, {})


def answer(played: Round, name: str, data: bytes, stage: str | None = None) -> tuple[Client, bytes]:
    """What an honest client makes of a message of the server in the stage that is due."""
    state = played.clients[name]
    stage = stage or STAGES[played.server.stage]
    if stage == "MaskedInput":
        return clients.mask(state, data, played.vectors[name])
    steps = {"ShareKeys": clients.share, "ConsistencyCheck": clients.confirm, "Unmask": clients.unmask}
    return steps[stage](state, data)


def play(played: Round, forge: Forge = honest) -> Round:
    """One stage, whose answers may be forged; the server closes it.

    Raises:
      Abandoned: too few clients are left.
    """
    answered: dict[str, tuple[Client, bytes]] = {}
    if played.server.stage == 0:
        for name in played.server.invited:
            answered[name] = clients.advertise(played.meeting, name, played.own.keys[name], played.own.directory, MODEL)
    else:
        answered = {name: answer(played, name, data) for name, data in played.inbox.items()}
    server = played.server
    sent = {name: forged for name, (_, data) in answered.items() if (forged := forge(name, data)) is not None}
    for name, data in sent.items():
        server = servers.receive(server, name, data)
    played = played._replace(sent=sent, clients=played.clients | {name: state for name, (state, _) in answered.items()})
    server, inbox = servers.close(server)
    return played._replace(server=server, inbox=inbox)


def until(stage: str, terms: Terms = FIVE, **about: Any) -> Round:
    """An honest round in which this stage is due."""
    played = start(terms, **about)
    while STAGES[played.server.stage] != stage:
        played = play(played)
    return played


def finish(played: Round, forge: Mapping[str, Forge] | None = None) -> Round:
    """All remaining stages, with what is forged by stage."""
    while played.server.stage < len(STAGES):
        played = play(played, (forge or {}).get(STAGES[played.server.stage], honest))
    return played


def changed(played: Round, kind: str, sender: str, data: bytes, change: Callable[[list[Any]], Any]) -> bytes:
    """A message whose fields are changed in place (or replaced by what is returned), in its proper encoding."""
    fields = decode(kind, played.meeting, sender, data)
    found = change(fields)
    return encode(kind, played.meeting, sender, *(fields if found is None else found))


def only(name: str, forge: Forge) -> Forge:
    """One client forges, all others are honest."""
    return lambda sender, data: forge(sender, data) if sender == name else data
