"""The server of secure aggregation as a pure state machine: it collects a stage's messages, then closes the stage.

    begin -> receive ... close -> (once for each of client.STAGES) -> result

A client's fault never stops the server: it is recorded with the client's name, and its message counts as if it had not
come. Whoever has not answered when a stage is closed has dropped out. The sum of masked inputs is kept, not the inputs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.secure import primitives, sharing
from fedjax_llm.secure.client import STAGES, Roster, agreement, commitment, dealers_hash, pair_seed, verified
from fedjax_llm.secure.graph import connected
from fedjax_llm.secure.messages import SERVER, Meeting, ProtocolError, ascending, decode, encode
from fedjax_llm.secure.outcome import Abandoned, Fault, Outcome

_MOST_FAULTS = 16
"""On record, for each client of the round."""


class Server(NamedTuple):
    """What the server knows. A state is used once: the running total is changed in place.

    Attributes:
      meeting: the round.
      directory: everybody's public identity by name.
      invited: the clients of the round.
      stage: which of ``STAGES`` it collects; their number when all are closed.
      answers: of the stage, fields by name.
      alive: who has answered all stages so far.
      faults: found in clients.
      roster: after AdvertiseKeys.
      dealt: after ShareKeys, by place: the seed's commitment, and the boxes with their commitments by holder.
      total: the sum of masked inputs; ``None`` before the first.
      survivors: after MaskedInput, whose inputs are in the total, as places.
      revealed: after Unmask, by place of the dealer: shares by place of the holder.
      model: SHA-256 of what the clients were sent to train.
    """

    meeting: Meeting
    directory: Mapping[str, bytes]
    invited: tuple[str, ...]
    stage: int = 0
    answers: Mapping[str, list[Any]] = {}
    alive: frozenset[str] = frozenset()
    faults: tuple[Fault, ...] = ()
    roster: Roster | None = None
    dealt: Mapping[int, tuple[bytes, dict[int, list[Any]]]] = {}
    total: np.ndarray | None = None
    survivors: tuple[int, ...] = ()
    revealed: Mapping[int, dict[int, bytes]] = {}
    model: bytes = b""

    def place(self, name: str) -> int:
        """A client's in the roster."""
        assert self.roster is not None
        return self.roster.names.index(name)


def begin(meeting: Meeting, directory: Mapping[str, bytes], invited: tuple[str, ...], model: bytes) -> Server:
    """The server before the first message; ``model`` is the SHA-256 of what the clients were sent to train."""
    return Server(meeting, directory, tuple(sorted(invited)), alive=frozenset(invited), model=model)


def receive(server: Server, sender: str, data: bytes) -> Server:
    """The server with one more message; whatever is wrong with it is recorded as the sender's fault.

    Of two messages of a stage the first counts.

    Args:
      server: the state.
      sender: who sent it, as the connection tells.
      data: what came.
    """
    if server.stage == len(STAGES):
        return _fault(server, sender, "its message came when the round was over")
    stage = STAGES[server.stage]
    if sender not in server.invited:
        return _fault(server, sender, "it was not asked to take part in the round")
    if sender not in server.alive:
        return _fault(server, sender, "it comes too late: it missed an earlier stage, and counts as dropped out")
    if sender in server.answers:
        return _fault(server, sender, "it answered twice; the first answer counts")
    try:
        fields = decode(stage, server.meeting, sender, data)
        _check(server, stage, sender, fields)
    except ProtocolError as error:
        return _fault(server, sender, error.reason)
    if stage == "MaskedInput":
        (raw,) = fields
        vector = np.frombuffer(raw, f"<u{server.meeting.bits // 8}")
        total = vector.copy() if server.total is None else np.add(server.total, vector, out=server.total)
        return server._replace(total=total, answers={**server.answers, sender: []})
    return server._replace(answers={**server.answers, sender: fields})


def close(server: Server) -> tuple[Server, dict[str, bytes]]:
    """Ends the stage.

    Returns:
      The state in the next stage, and what each remaining client is sent (nothing after the last stage).

    Raises:
      Abandoned: too few clients are left; nothing more may be sent, and nothing can be opened.
    """
    alive = frozenset(server.answers)
    if len(alive) < server.meeting.terms.survivors:
        raise _abandoned(server, alive, f"{len(alive)} clients are left after {STAGES[server.stage]}")
    steps = (_keys, _shares, _survivors, _signatures, _revealed)
    after, sent = steps[server.stage](server._replace(alive=alive))
    return after._replace(stage=server.stage + 1, answers={}), sent


def result(server: Server) -> Outcome:
    """Takes all masks off the sum.

    Raises:
      Abandoned: a secret cannot be put together, for want of shares or because its dealer dealt wrong ones.
    """
    assert server.stage == len(STAGES)
    assert server.roster is not None
    assert server.total is not None
    meeting, roster, total = server.meeting, server.roster, server.total.copy()
    masks, bound = primitives.Masks(meeting.values, meeting.bits), dealers_hash(roster, sorted(server.dealt))
    for dealer in sorted(server.dealt):
        if dealer in server.survivors:
            masks.add(total, _secret(server, dealer, "seed"), -1)
            continue
        if not _needed(server, dealer):
            continue
        near = [other for other in roster.graph[dealer] if other in server.survivors]
        own = primitives.private_key(_secret(server, dealer, "key"), "mask")
        for other in near:  # the survivor's mask is still in the sum: with plus if the dropped one comes after it
            masks.add(total, pair_seed(meeting, roster, own, dealer, other, bound), -1 if dealer > other else 1)
    return Outcome(total, tuple(roster.names[place] for place in server.survivors), server.faults)


def _check(server: Server, stage: str, sender: str, fields: list[Any]) -> None:
    """Refuses a client's message that is well formed but wrong."""
    if stage == "AdvertiseKeys":
        _check_advertised(server, sender, fields)
        return
    if stage == "MaskedInput":
        return
    roster, place = server.roster, server.place(sender)
    assert roster is not None
    if stage == "ShareKeys":
        if tuple(holder for holder, *_ in fields[1]) != roster.holders(place):
            raise ProtocolError(sender, "its shares are not for its neighbours")
    elif stage == "ConsistencyCheck":
        message = agreement(server.meeting, roster, server.survivors)
        if not primitives.is_signed(server.directory[sender], fields[0], message):
            raise ProtocolError(sender, "its signature is not under the survivors that it was told")
    else:
        _check_revealed(server, roster, sender, place, fields[0])


def _check_advertised(server: Server, sender: str, fields: list[Any]) -> None:
    """Refuses keys because of which the other clients would not go on."""
    verified(server.meeting, server.directory, [[sender, *fields]])
    keys, model = fields[:2], fields[2]
    if model != server.model:
        raise ProtocolError(sender, "it did not receive the model that was sent")
    if not all(primitives.is_usable(key) for key in keys):
        raise ProtocolError(sender, "its public key is not one")
    if any(set(keys).intersection(other[:2]) for other in server.answers.values()):
        raise ProtocolError(sender, "it sent the keys of another client")


def _check_revealed(server: Server, roster: Roster, sender: str, place: int, revealed: list[Any]) -> None:
    """Refuses shares that are not those which their dealers committed to."""
    dealers = [dealer for dealer, _ in revealed]
    if not ascending(dealers) or not set(dealers).issubset(d for d in roster.holders(place) if d in server.dealt):
        raise ProtocolError(sender, "it gives shares of clients that dealt it none")
    for dealer, share in revealed:
        kind = "seed" if dealer in server.survivors else "key"
        index = roster.holders(dealer).index(place) + 1
        expected = server.dealt[dealer][1][place][1 if kind == "seed" else 2]
        if commitment(server.meeting, roster, dealer, kind, index, share) != expected:
            raise ProtocolError(sender, f"its share of {roster.names[dealer]}'s {kind} is not the one that was dealt")


def _keys(server: Server) -> tuple[Server, dict[str, bytes]]:
    """After AdvertiseKeys: everybody's keys to everybody."""
    members = [[name, *server.answers[name]] for name in sorted(server.answers)]
    roster, threshold = verified(server.meeting, server.directory, members), server.meeting.terms.threshold
    if len(roster.holders(0)) < threshold:
        raise _abandoned(server, server.alive, f"{len(members)} clients are too few for {threshold} holders of shares")
    message = encode("Keys", server.meeting, SERVER, members)
    return server._replace(roster=roster), dict.fromkeys(roster.names, message)


def _shares(server: Server) -> tuple[Server, dict[str, bytes]]:
    """After ShareKeys: to each holder what was sealed for it. Clients with too few holders cannot go on."""
    roster, terms = server.roster, server.meeting.terms
    assert roster is not None
    places = {server.place(name) for name in server.answers}
    while lonely := {p for p in places if len(places.intersection(roster.holders(p))) < terms.threshold}:
        places -= lonely
    alive = frozenset(roster.names[place] for place in places)
    if len(places) < terms.survivors:
        raise _abandoned(server, alive, f"{len(places)} clients with {terms.threshold} holders of shares are left")
    dealt = {}
    for place in sorted(places):
        own, boxes = server.answers[roster.names[place]]
        dealt[place] = (own, {holder: rest for holder, *rest in boxes})
    listed = [[place] for place in sorted(places)]
    sent = {}
    for place in sorted(places):
        boxes = [[dealer, *dealt[dealer][1][place]] for dealer in roster.holders(place) if dealer in places]
        sent[roster.names[place]] = encode("Shares", server.meeting, SERVER, listed, boxes)
    return server._replace(alive=alive, dealt=dealt), sent


def _survivors(server: Server) -> tuple[Server, dict[str, bytes]]:
    """After MaskedInput: who is left."""
    roster = server.roster
    assert roster is not None
    places = tuple(sorted(server.place(name) for name in server.answers))
    server = server._replace(survivors=places)
    _check_holders(server)
    if not connected(roster.graph, places):
        raise _abandoned(server, server.alive, "those who are left do not hang together in the graph of masks")
    message = encode("Survivors", server.meeting, SERVER, [[place] for place in places])
    return server, {roster.names[place]: message for place in places}


def _signatures(server: Server) -> tuple[Server, dict[str, bytes]]:
    """After ConsistencyCheck: everybody's signature to everybody."""
    _check_holders(server)
    signatures = sorted([server.place(name), fields[0]] for name, fields in server.answers.items())
    message = encode("Signatures", server.meeting, SERVER, signatures)
    return server, dict.fromkeys(server.answers, message)


def _check_holders(server: Server) -> None:
    """Abandons the round, before anything is opened, if one of the secrets that it needs cannot be."""
    roster, threshold = server.roster, server.meeting.terms.threshold
    assert roster is not None
    left = {server.place(name) for name in server.alive}
    for dealer in server.dealt:
        near = left.intersection(roster.holders(dealer))
        if _needed(server, dealer) and len(near) < threshold:
            raise _abandoned(server, server.alive, f"{len(near)} holders of {roster.names[dealer]}'s shares are left")


def _needed(server: Server, dealer: int) -> bool:
    """Whether a mask of this client is in the sum: its own, or one that it has in common with a survivor."""
    assert server.roster is not None
    return not set(server.survivors).isdisjoint(server.roster.holders(dealer))


def _revealed(server: Server) -> tuple[Server, dict[str, bytes]]:
    """After Unmask: the shares by dealer. Of one that is missing its dealer and its holder are suspected alike."""
    assert server.roster is not None
    found: dict[int, dict[int, bytes]] = {}
    for name, (revealed,) in server.answers.items():
        for dealer, share in revealed:
            found.setdefault(dealer, {})[server.place(name)] = share
        given = {dealer for dealer, _ in revealed}
        for dealer in server.dealt:
            if dealer not in given and server.place(name) in server.roster.holders(dealer):
                reason = f"{name} has no share of its secrets that can be opened, or keeps it back"
                server = _fault(server, server.roster.names[dealer], reason, "ShareKeys")
    return server._replace(revealed=found), {}


def _secret(server: Server, dealer: int, kind: str) -> bytes:
    """A secret from its shares, as its dealer committed to it."""
    roster, threshold = server.roster, server.meeting.terms.threshold
    assert roster is not None
    holders, name = roster.holders(dealer), roster.names[dealer]
    shares = {holders.index(holder) + 1: share for holder, share in server.revealed.get(dealer, {}).items()}
    secret = sharing.combined(shares, threshold)
    if secret is None:
        reason = f"{len(shares)} shares of {name}'s {kind} are left, and {threshold} open it"
        raise _abandoned(server, server.alive, reason)
    if kind == "seed":
        right = commitment(server.meeting, roster, dealer, "seed", 0, secret) == server.dealt[dealer][0]
    else:
        right = primitives.public_bytes(primitives.private_key(secret, "mask")) == roster.mask[dealer]
    if not right:
        broken = _fault(server, name, f"the shares that it dealt do not give its {kind}", "ShareKeys")
        raise _abandoned(broken, server.alive, f"{name} dealt shares of something else than its {kind}")
    return secret


def _fault(server: Server, client: str, reason: str, stage: str | None = None) -> Server:
    """The server with one more fault on record, as long as there are not very many: a flood must not fill memory."""
    if len(server.faults) >= _MOST_FAULTS * server.meeting.terms.clients:
        return server
    at = stage or (STAGES[server.stage] if server.stage < len(STAGES) else "the end")
    return server._replace(faults=(*server.faults, Fault(client, at, reason)))


def _abandoned(server: Server, alive: frozenset[str], why: str) -> Abandoned:
    """The end of a round without a sum."""
    terms, dropped = server.meeting.terms, tuple(name for name in server.invited if name not in alive)
    agreed = f"at least {terms.survivors} of {terms.clients} clients and {terms.threshold} holders of each secret"
    return Abandoned(f"{why}; agreed were {agreed}", dropped, server.faults)
