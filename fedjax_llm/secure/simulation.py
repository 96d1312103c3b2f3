"""A round of secure aggregation in memory: clients and server exchange their real messages, as bytes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedjax_llm.secure import client as clients
from fedjax_llm.secure import server as servers
from fedjax_llm.secure.client import Client
from fedjax_llm.secure.messages import Meeting
from fedjax_llm.secure.outcome import Abandoned, Outcome
from fedjax_llm.secure.primitives import Masks, public_bytes
from fedjax_llm.secure.sec_agg import Terms
from fedjax_llm.secure.server import Server


class Identities(NamedTuple):
    """Long-term signing keys by name, and the directory of their public halves."""

    keys: Mapping[str, Ed25519PrivateKey]
    directory: Mapping[str, bytes]


def identities(names: Sequence[str]) -> Identities:
    """A fresh signing key for each name."""
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    return Identities(keys, {name: public_bytes(key) for name, key in keys.items()})


@dataclass
class Session:
    """One round among the clients of a process.

    Attributes:
      meeting: what all know.
      server: its state.
      clients: their states, of those that have not dropped out.
      inbox: what the server has sent to each.
      traffic: bytes received and sent, by name.
      masks: buffers.
    """

    meeting: Meeting
    server: Server
    clients: dict[str, Client]
    inbox: dict[str, bytes]
    traffic: dict[str, tuple[int, int]]
    masks: Masks


def open_round(
    terms: Terms,
    own: Identities,
    names: Sequence[str],
    *,
    session: bytes,
    round_number: int,
    model: bytes,
    values: int,
    bits: int = 32,
    drop: Mapping[str, Collection[str]] = {},
) -> Session:
    """AdvertiseKeys and ShareKeys.

    Args:
      terms: of the round.
      own: everybody's identity.
      names: of the clients.
      session: 16 bytes that no other attempt at a round has.
      round_number: of the round.
      model: SHA-256 of what the clients were sent to train.
      values: P, of an input.
      bits: 16 or 32, of the ring.
      drop: by stage, who leaves before answering it.

    Raises:
      Abandoned: too few were left.
    """
    meeting = Meeting(terms, session, round_number, values, bits)
    started = Session(
        meeting,
        servers.begin(meeting, own.directory, tuple(names), model),
        {},
        {},
        dict.fromkeys(names, (0, 0)),
        Masks(values, bits),
    )
    for name in sorted(set(names).difference(drop.get("AdvertiseKeys", ()))):
        state, data = clients.advertise(meeting, name, own.keys[name], own.directory, model)
        started.clients[name] = state
        deliver(started, name, data)
    _close(started)
    _answer(started, clients.share, drop.get("ShareKeys", ()))
    return started


def submit(session: Session, name: str, vector: np.ndarray) -> Session:
    """One client's input, masked and delivered.

    Args:
      session: after :func:`open_round`.
      name: of the client; one that has dropped out is not heard.
      vector: uint [P].
    """
    if name in session.inbox:
        data = session.inbox.pop(name)
        session.clients[name], answer = clients.mask(session.clients[name], data, vector, session.masks)
        deliver(session, name, answer)
    return session


def close(session: Session, drop: Mapping[str, Collection[str]] = {}) -> Outcome:
    """ConsistencyCheck and Unmask: the sum of the inputs that were submitted.

    Raises:
      Abandoned: too few were left; it holds the traffic until then.
    """
    _close(session)
    _answer(session, clients.confirm, drop.get("ConsistencyCheck", ()))
    _answer(session, clients.unmask, drop.get("Unmask", ()))
    try:
        outcome = servers.result(session.server)
    except Abandoned as lost:
        lost.traffic = session.traffic
        raise
    return outcome._replace(traffic=session.traffic)


def run_round(
    terms: Terms,
    own: Identities,
    inputs: Mapping[str, np.ndarray],
    drop: Mapping[str, Collection[str]] = {},
    **about: object,
) -> Outcome:
    """A whole round.

    Args:
      terms: of the round.
      own: everybody's identity.
      inputs: uint [P] by name.
      drop: by stage (``client.STAGES``), who leaves before answering it.
      about: as for :func:`open_round`.

    Raises:
      Abandoned: too few were left.
    """
    known = {"session": bytes(16), "round_number": 1, "model": bytes(32)} | about
    (values,) = {vector.size for vector in inputs.values()}
    (width,) = {vector.itemsize for vector in inputs.values()}
    session = open_round(terms, own, tuple(inputs), values=values, bits=8 * width, drop=drop, **known)  # type: ignore[arg-type]
    for name, vector in inputs.items():
        if name not in drop.get("MaskedInput", ()):
            session = submit(session, name, vector)
    return close(session, drop)


def _answer(session: Session, stage, drop: Collection[str]) -> None:
    """All clients that are left answer the server, which closes the stage."""
    for name, data in list(session.inbox.items()):
        del session.inbox[name]
        if name not in drop:
            session.clients[name], answer = stage(session.clients[name], data)
            deliver(session, name, answer)
    _close(session)


def deliver(session: Session, name: str, data: bytes) -> None:
    """A message to the server."""
    received, sent = session.traffic[name]
    session.traffic[name] = (received, sent + len(data))
    session.server = servers.receive(session.server, name, data)


def _close(session: Session) -> None:
    """The server ends the stage and sends its answers."""
    try:
        session.server, session.inbox = servers.close(session.server)
    except Abandoned as lost:
        lost.traffic = session.traffic
        raise
    for name, data in session.inbox.items():
        received, sent = session.traffic[name]
        session.traffic[name] = (received + len(data), sent)
