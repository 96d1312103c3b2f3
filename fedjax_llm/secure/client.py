"""A client of secure aggregation as a pure state machine: each stage takes the server's message and gives the answer.

    advertise -> share -> mask -> confirm -> unmask

A client trusts nobody but the directory of identities. Where the server (or another client through it) breaks the
protocol the stage raises a :class:`~fedjax_llm.secure.messages.ProtocolError`, and the client takes no further part:
nothing that it has sent until then tells its input.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedjax_llm.secure import primitives, sharing
from fedjax_llm.secure.graph import connected, neighbours
from fedjax_llm.secure.messages import SERVER, Meeting, ProtocolError, ascending, decode, encode

STAGES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmask")


class Roster(NamedTuple):
    """Everybody's keys as one client has verified them, or the server has collected them.

    Attributes:
      names: of the clients that advertised keys, in alphabetical order; elsewhere clients are places in this list.
      cipher: their public keys for sealing shares.
      mask: their public keys for masks.
      transcript: hash of all of it.
      graph: the places of each client's neighbours.
    """

    names: tuple[str, ...]
    cipher: tuple[bytes, ...]
    mask: tuple[bytes, ...]
    transcript: bytes
    graph: tuple[tuple[int, ...], ...]

    def holders(self, place: int) -> tuple[int, ...]:
        """Who holds the shares of a client's secrets: its neighbours and itself, ascending."""
        return tuple(sorted((*self.graph[place], place)))


class Client(NamedTuple):
    """What a client knows; a stage takes it and gives the next. ``done`` counts the stages that it has answered.

    Attributes:
      meeting: the round.
      name: the client's.
      identity: its long-term signing key.
      directory: everybody's public identity by name.
      model: SHA-256 of what the server sent to be trained.
      seed: b, of its own mask.
      mask_secret: what its key of pair masks is derived from.
      cipher_secret: what its key for shares is derived from.
      done: stages.
      roster: after ShareKeys.
      place: its own in the roster.
      agreed: secrets that it shares with its holders, by place.
      shared: after MaskedInput, who dealt shares, by place.
      shares: of those whose shares it could open: their seed's and their mask key's, by place.
      survivors: after ConsistencyCheck, whose inputs the server has.
    """

    meeting: Meeting
    name: str
    identity: Ed25519PrivateKey
    directory: Mapping[str, bytes]
    model: bytes
    seed: bytes
    mask_secret: bytes
    cipher_secret: bytes
    done: int = 0
    roster: Roster | None = None
    place: int = -1
    agreed: Mapping[int, bytes] = {}
    shared: frozenset[int] = frozenset()
    shares: Mapping[int, tuple[bytes, bytes]] = {}
    survivors: tuple[int, ...] = ()


def advertise(
    meeting: Meeting, name: str, identity: Ed25519PrivateKey, directory: Mapping[str, bytes], model: bytes
) -> tuple[Client, bytes]:
    """Fresh keys, signed together with the hash of the model.

    Args:
      meeting: the round.
      name: the client's, in the directory.
      identity: its long-term signing key.
      directory: public identities by name, from a source that is not the server.
      model: SHA-256 of what this client received to train.
    """
    client = Client(meeting, name, identity, directory, model, *(primitives.fresh() for _ in range(3)), done=1)
    keys = [_public(client.cipher_secret, "cipher"), _public(client.mask_secret, "mask"), model]
    signature = primitives.signed(identity, advertisement(meeting, name, *keys))
    return client, encode("AdvertiseKeys", meeting, name, *keys, signature)


def share(client: Client, data: bytes) -> tuple[Client, bytes]:
    """Checks everybody's keys, and deals shares of both secrets to the neighbours.

    Raises:
      ProtocolError: naming the server, or whose keys are not what they should be.
    """
    (members,) = _received(client, "Keys", 1, data)
    roster = verified(client.meeting, client.directory, members)
    if roster.names.count(client.name) != 1:
        raise ProtocolError(SERVER, f"it left {client.name}, to whom it speaks, out of the list of keys")
    place = roster.names.index(client.name)
    if [roster.cipher[place], roster.mask[place]] != [
        _public(client.cipher_secret, "cipher"),
        _public(client.mask_secret, "mask"),
    ]:
        raise ProtocolError(SERVER, f"it put other keys in the place of those of {client.name}")
    for name, _, _, model, _ in members:
        if model != client.model:
            raise ProtocolError(SERVER, f"it sent one model to {client.name} and another to {name}")
    client = client._replace(done=2, roster=roster, place=place)
    terms, holders = client.meeting.terms, roster.holders(place)
    if len(holders) < terms.threshold or len(roster.names) < terms.survivors:
        raise ProtocolError(SERVER, f"it goes on with {len(roster.names)} clients, too few to open anything")
    seeds, keys = (sharing.dealt(secret, terms.threshold, len(holders)) for secret in (client.seed, client.mask_secret))
    client = client._replace(agreed=agreed_with(client, holders))
    boxes = [boxed(client, *one) for one in zip(holders, seeds, keys, strict=True)]
    own = commitment(client.meeting, roster, place, "seed", 0, client.seed)
    return client, encode("ShareKeys", client.meeting, client.name, own, boxes)


def agreed_with(client: Client, holders: Sequence[int]) -> dict[int, bytes]:
    """The secrets that a client shares with holders (places), from which the keys of boxes are derived."""
    roster, own = client.roster, primitives.private_key(client.cipher_secret, "cipher")
    assert roster is not None
    return {holder: _agreed(own, roster.cipher[holder], roster.names[holder]) for holder in holders}


def boxed(client: Client, holder: int, seed: bytes, key: bytes) -> list[Any]:
    """A holder's shares of both secrets, sealed for it, with the commitments to them.

    Args:
      client: the dealer.
      holder: the holder's place.
      seed: share of the seed.
      key: share of what the mask key is derived from.
    """
    meeting, roster, place = client.meeting, client.roster, client.place
    assert roster is not None
    about = _about(client, place, holder)
    box = primitives.sealed(_lock(client, holder, about), seed + key, about)
    index = roster.holders(place).index(holder) + 1
    return [holder, box, *(commitment(meeting, roster, place, kind, index, own) for kind, own in _kinds(seed, key))]


def mask(
    client: Client, data: bytes, vector: np.ndarray, masks: primitives.Masks | None = None
) -> tuple[Client, bytes]:
    """Opens the shares dealt to this client, and sends its input under all masks.

    Shares that cannot be opened, or are not what their dealer committed to, are not kept and not given in Unmask: if
    the client stopped at them, one dealer could drive any of its neighbours out of the sum.

    Args:
      client: after :func:`share`.
      data: the server's message.
      vector: uint [P] of the ring.
      masks: buffers to use again; ``None``: new ones.

    Raises:
      ProtocolError: naming the server.
      ValueError: the vector is not of the ring.
    """
    shared, boxes = _received(client, "Shares", 2, data)
    meeting, roster, place = client.meeting, client.roster, client.place
    assert roster is not None
    if vector.shape != (meeting.values,) or vector.dtype != np.dtype(f"<u{meeting.bits // 8}"):
        raise ValueError(f"an input of this round is {meeting.values} integers of {meeting.bits} bits without sign")
    members = [member for (member,) in shared]
    dealers = [dealer for dealer, *_ in boxes]
    near = [member for member in members if member in roster.holders(place)]
    known = all(member < len(roster.names) for member in members)
    if not known or not ascending(members) or place not in members or dealers != near:
        raise ProtocolError(SERVER, "the shares that it passes on are not of the clients that it says dealt some")
    if len(near) < meeting.terms.threshold or len(members) < meeting.terms.survivors:
        raise ProtocolError(SERVER, f"it goes on with {len(members)} clients, too few to open anything")
    opened = {dealer: _opened(client, dealer, *rest) for dealer, *rest in boxes}
    shares = {dealer: both for dealer, both in opened.items() if both is not None}
    masks, total = masks or primitives.Masks(meeting.values, meeting.bits), vector.copy()
    masks.add(total, client.seed, 1)
    own, bound = primitives.private_key(client.mask_secret, "mask"), dealers_hash(roster, members)
    for other in near:
        if other != place:
            masks.add(total, pair_seed(meeting, roster, own, place, other, bound), 1 if other > place else -1)
    client = client._replace(done=3, shared=frozenset(members), shares=shares)
    return client, encode("MaskedInput", meeting, client.name, total.tobytes())


def confirm(client: Client, data: bytes) -> tuple[Client, bytes]:
    """Signs who is left, if they are enough.

    Raises:
      ProtocolError: naming the server.
    """
    (listed,) = _received(client, "Survivors", 3, data)
    roster, terms, survivors = client.roster, client.meeting.terms, tuple(member for (member,) in listed)
    assert roster is not None
    if not ascending(survivors) or not client.shared.issuperset(survivors):
        raise ProtocolError(SERVER, "it counts clients among the survivors that dealt no shares")
    if client.place not in survivors:
        raise ProtocolError(SERVER, f"it says that {client.name} has dropped out, and asks it to go on")
    near = set(survivors).intersection(roster.holders(client.place))
    if len(survivors) < terms.survivors or len(near) < terms.threshold:
        raise ProtocolError(
            SERVER,
            f"it would open a sum of {len(survivors)} clients with {len(near)} holders of shares, and at least "
            f"{terms.survivors} and {terms.threshold} were agreed",
        )
    if not connected(roster.graph, survivors):
        raise ProtocolError(SERVER, "the survivors do not hang together: it would see the sums of their parts")
    client = client._replace(done=4, survivors=survivors)
    signature = primitives.signed(client.identity, agreement(client.meeting, roster, survivors))
    return client, encode("ConsistencyCheck", client.meeting, client.name, signature)


def unmask(client: Client, data: bytes) -> tuple[Client, bytes]:
    """Gives one share of each neighbour that dealt it some: of its seed if it survived, else of its mask key. Once.

    Raises:
      ProtocolError: naming the server.
    """
    (signatures,) = _received(client, "Signatures", 4, data)
    roster, terms, place = client.roster, client.meeting.terms, client.place
    assert roster is not None
    signers, message = [member for member, _ in signatures], agreement(client.meeting, roster, client.survivors)
    if not ascending(signers) or not set(client.survivors).issuperset(signers):
        raise ProtocolError(SERVER, "it shows signatures of clients that are no survivors")
    for member, signature in signatures:
        if not primitives.is_signed(client.directory[roster.names[member]], signature, message):
            raise ProtocolError(SERVER, f"{roster.names[member]} did not sign the survivors that it told {client.name}")
    near = set(signers).intersection(roster.holders(place))
    if len(near) < terms.threshold or len(signers) < terms.survivors:
        raise ProtocolError(SERVER, f"only {len(signers)} clients signed who is left, {len(near)} of them neighbours")
    chosen = [[dealer, own[0 if dealer in client.survivors else 1]] for dealer, own in sorted(client.shares.items())]
    return client._replace(done=5), encode("Unmask", client.meeting, client.name, chosen)


def verified(meeting: Meeting, directory: Mapping[str, bytes], members: list[list[Any]]) -> Roster:
    """The keys of a list of advertisements, each checked against the directory.

    Raises:
      ProtocolError: naming whose keys are not signed by them, or the server.
    """
    names = tuple(name for name, *_ in members)
    if list(names) != sorted(set(names)):
        raise ProtocolError(SERVER, "its list of keys is not in order, or holds somebody twice")
    for name, cipher, key, model, signature in members:
        if name not in directory:
            raise ProtocolError(SERVER, f"it lists {name!r}, whom the directory does not know")
        if not primitives.is_signed(directory[name], signature, advertisement(meeting, name, cipher, key, model)):
            raise ProtocolError(SERVER, f"the keys that it lists for {name} are not signed by {name}")
    cipher, mask_keys = (tuple(member[place] for member in members) for place in (1, 2))
    if len({*cipher, *mask_keys}) < 2 * len(names):
        raise ProtocolError(SERVER, "two of the keys that it lists are the same")
    listed = primitives.digest(*(part for member in members for part in member))
    transcript = primitives.digest("transcript", meeting.session, meeting.round, listed)
    return Roster(names, cipher, mask_keys, transcript, neighbours(names, meeting.terms.neighbours, transcript))


def advertisement(meeting: Meeting, name: str, cipher: bytes, key: bytes, model: bytes) -> bytes:
    """What a client signs about its keys: with them, the terms that it takes part under."""
    about = (meeting.session, meeting.round, *meeting.terms, meeting.values, meeting.bits)
    return primitives.packed("AdvertiseKeys", *about, name, cipher, key, model)


def agreement(meeting: Meeting, roster: Roster, survivors: tuple[int, ...]) -> bytes:
    """What a client signs about who is left."""
    return primitives.packed("ConsistencyCheck", meeting.session, meeting.round, roster.transcript, *survivors)


def commitment(meeting: Meeting, roster: Roster, dealer: int, kind: str, place: int, secret: bytes) -> bytes:
    """To a holder's share (its place among the holders, from 1), or to the dealer's secret itself (0)."""
    about = primitives.packed(meeting.session, meeting.round, roster.transcript, roster.names[dealer])
    return sharing.commitment(about, kind, place, secret)


def dealers_hash(roster: Roster, dealers: Sequence[int]) -> bytes:
    """Hash of all keys and of who dealt shares (places, ascending).

    Masks are bound to it: between clients that the server told of other dealers they do not cancel. Otherwise it could
    have a client leave out the masks with some of its neighbours, and cut the graph there.
    """
    return primitives.digest("dealers", roster.transcript, *dealers)


def pair_seed(meeting: Meeting, roster: Roster, own: X25519PrivateKey, place: int, other: int, bound: bytes) -> bytes:
    """The seed of the mask between two clients, from one's private mask key and the other's public one.

    Args:
      meeting: the round.
      roster: everybody's keys.
      own: the one's private key.
      place: the one's.
      other: the other's place.
      bound: from :func:`dealers_hash`.
    """
    first, second = sorted((place, other))
    about = ("pair mask", meeting.session, meeting.round, bound, roster.names[first], roster.names[second])
    return primitives.derived(_agreed(own, roster.mask[other], roster.names[other]), primitives.SECRET, *about)


def _received(client: Client, kind: str, done: int, data: bytes) -> list[Any]:
    """The fields of the server's message, which must come when it is due, and once."""
    if client.done != done:
        late = "again" if client.done > done else "too early"
        raise ProtocolError(SERVER, f"it sent {kind} {late}: {client.name} is at {STAGES[min(client.done, 4)]}")
    return decode(kind, client.meeting, SERVER, data)


def _opened(client: Client, dealer: int, box: bytes, seed_check: bytes, key_check: bytes) -> tuple[bytes, bytes] | None:
    """The shares that a dealer sealed for this client, if they are those that it committed to."""
    roster, place = client.roster, client.place
    assert roster is not None
    about = _about(client, dealer, place)
    opened = primitives.unsealed(_lock(client, dealer, about), box, about)
    if opened is None:
        return None
    seed, key = opened[: primitives.SECRET], opened[primitives.SECRET :]
    index = roster.holders(dealer).index(place) + 1
    for (kind, own), check in zip(_kinds(seed, key), (seed_check, key_check), strict=True):
        if commitment(client.meeting, roster, dealer, kind, index, own) != check:
            return None
    return seed, key


def _lock(client: Client, other: int, about: bytes) -> bytes:
    """The key of a box between this client and another; each direction has its own, by what it is about."""
    return primitives.derived(client.agreed[other], primitives.PUBLIC, "share box", about)


def _about(client: Client, dealer: int, holder: int) -> bytes:
    """What a box of shares is bound to."""
    roster = client.roster
    assert roster is not None
    names = roster.names[dealer], roster.names[holder]
    return primitives.packed(client.meeting.session, client.meeting.round, roster.transcript, *names)


def _agreed(own: X25519PrivateKey, other: bytes, name: str) -> bytes:
    """The shared secret; a client whose key agrees with everybody is named."""
    try:
        return primitives.agreed(own, other)
    except ValueError as error:
        raise ProtocolError(name, "its public key is not one") from error


def _public(secret: bytes, purpose: str) -> bytes:
    """The public key of a secret."""
    return primitives.public_bytes(primitives.private_key(secret, purpose))


def _kinds(seed: bytes, key: bytes) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    """Both secrets (or shares of them) with what they are called in commitments."""
    return ("seed", seed), ("key", key)
