"""A round under secure aggregation: what clients send is masked, and the server reads nothing but the sum.

Every message of the protocol is really made, encrypted, signed and parsed here, between state machines that share no
memory but those bytes. Masks cancel exactly, so the sum is a function of the messages alone.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.federation.availability import Answers
from fedjax_llm.federation.communication import travelling
from fedjax_llm.federation.plan import RoundPlan, SecureReport, Traffic
from fedjax_llm.federation.release import message_like
from fedjax_llm.federation.sampling import round_key, secret_round_key
from fedjax_llm.privacy.mechanism import Shares
from fedjax_llm.secure import encoding, ring, simulation
from fedjax_llm.secure.outcome import Abandoned, Outcome
from fedjax_llm.types import PyTree, RoundState, Sum


class Ended(NamedTuple):
    """What came of a round: the sum (``None``: it was abandoned), its report, and the protocol's bytes by client."""

    view: Sum | None
    report: SecureReport
    traffic: dict[str, Traffic]


@dataclass
class Exchange:
    """The protocol of one round, as far as it has come.

    Attributes:
      plan: of the rounds.
      number: of the round.
      attempt: at it.
      template: zeros like one client's message.
      live: which factors travel.
      session: of the protocol; ``None`` once it was abandoned.
      lost: why it was abandoned, and who was to blame; ``None`` while it goes on.
    """

    plan: RoundPlan
    number: int
    attempt: int
    template: PyTree
    live: dict[str, float] | None
    session: Any = None
    lost: Abandoned | None = None
    names: tuple[str, ...] = field(default=())


def begin(
    plan: RoundPlan,
    state: RoundState,
    answers: Answers,
    received: PyTree,
    live: dict[str, float] | None,
    attempt: int,
) -> Exchange | None:
    """Keys and shares among all who were selected; ``None`` without secure aggregation.

    Clients that never answer, or too late, are there until they should send their input: the worst time to leave.

    Args:
      plan: of the rounds.
      state: whose adapters are sent to the clients, each of which signs their hash.
      answers: who takes part.
      received: what is sent beside the adapters.
      live: which factors travel.
      attempt: at the round.
    """
    if plan.secure is None:
        return None
    number, template = int(state.round) + 1, message_like(plan, state)
    places = np.union1d(np.union1d(answers.cohort, answers.silent), answers.late).astype(int)
    exchange = Exchange(plan, number, attempt, template, live, names=tuple(plan.clients[i].name for i in places))
    values, bits = room(exchange)
    try:
        exchange.session = simulation.open_round(
            plan.secure.terms_of(len(places)),
            plan.secure.identities,
            exchange.names,
            session=os.urandom(16),
            round_number=number,
            model=digest_of(state.adapters, received),
            values=values,
            bits=bits,
        )
    except Abandoned as lost:
        exchange.lost = lost
    return exchange


def room(exchange: Exchange) -> tuple[int, int]:
    """How many integers a message is, and of how many bits."""
    size, shares = sum(leaf.size for leaf in _leaves(exchange.template, exchange.live)), _shares(exchange.plan)
    return (size + ring.EXTRA, 32) if shares is None else (encoding.encoded_length(size), shares.bits)


def add(exchange: Exchange, members: np.ndarray, messages: PyTree, weights: Array) -> None:
    """Masks and delivers the messages [C, ...] of a chunk, of which the first ``len(members)`` are real.

    Args:
      exchange: the protocol of the round.
      members: int, places of the clients.
      messages: what they send, leaves [C, ...].
      weights: f32 [C].
    """
    if exchange.session is None:
        return
    encoded = encoded_messages(exchange, members, messages, weights)
    for place, vector in zip(members, encoded, strict=True):
        exchange.session = simulation.submit(exchange.session, exchange.plan.clients[place].name, vector)


def encoded_messages(exchange: Exchange, members: np.ndarray, messages: PyTree, weights: Array) -> Sequence[np.ndarray]:
    """Messages [C, ...] as integers of the ring [P], with their shares of the noise where sites add some.

    Arguments as for :func:`add`.
    """
    plan, real = exchange.plan, len(members)
    vectors = _flat(_leaves(messages, exchange.live))[:real]
    shares = _shares(plan)
    if shares is None:
        assert plan.secure is not None
        return list(np.asarray(_quantised(vectors, jnp.asarray(weights)[:real], plan.secure.grid)))
    weighted = np.asarray(vectors) * np.asarray(weights)[:real, None]
    return [_blurred(exchange, shares, int(place), row) for place, row in zip(members, weighted, strict=True)]


def end(exchange: Exchange) -> Ended:
    """Survivors agree, their masks are opened, and the server reads the sum; or the round is abandoned."""
    try:
        if exchange.lost is not None:
            raise exchange.lost
        outcome = simulation.close(exchange.session)
    except Abandoned as lost:
        return abandoned(exchange, lost)
    return opened(exchange, outcome)


def abandoned(exchange: Exchange, lost: Abandoned) -> Ended:
    """The end of a round that released nothing."""
    report = SecureReport(len(exchange.names), 0, tuple(lost.dropped), 0, str(lost))
    return Ended(None, report, {name: Traffic(*both) for name, both in lost.traffic.items()})


def opened(exchange: Exchange, outcome: Outcome) -> Ended:
    """The sum of the survivors' messages, read from the integers that the protocol gave."""
    plan, shares = exchange.plan, _shares(exchange.plan)
    cut = 0
    if shares is None:
        assert plan.secure is not None
        values, weight, cut = ring.read(outcome.total, plan.secure.grid)
    else:
        size = sum(leaf.size for leaf in _leaves(exchange.template, exchange.live))
        key = _rotation(exchange)
        values, weight = encoding.decode(outcome.total, shares, rotation_key=key, values=size), 0.0
    dropped = tuple(name for name in exchange.names if name not in outcome.survivors)
    report = SecureReport(len(exchange.names), len(outcome.survivors), dropped, cut, None)
    total = _unflat(exchange.template, exchange.live, jnp.asarray(values))
    traffic = {name: Traffic(*both) for name, both in outcome.traffic.items()}
    return Ended(Sum(total, jnp.float32(weight)), report, traffic)


def _shares(plan: RoundPlan) -> Shares | None:
    """How sites encode messages with shares of the noise, if they do."""
    return None if plan.mechanism is None else plan.mechanism.shares


_quantised = jax.jit(ring.quantise, static_argnums=2)


def _blurred(exchange: Exchange, shares: Shares, place: int, vector: np.ndarray) -> np.ndarray:
    """One site's message as integers, with its share of the noise."""
    noise_key, rounding_key = (_site_secret(exchange, place, purpose) for purpose in ("sum noise", "rounding"))
    keys = {"noise_key": noise_key, "rounding_key": rounding_key, "rotation_key": _rotation(exchange)}
    return encoding.encode(vector, shares, **keys)


def _site_secret(exchange: Exchange, place: int, purpose: str) -> bytes:
    """32 bytes that no other site, round, attempt or purpose shares; of the run's secret key, or of the system."""
    plan = exchange.plan
    assert plan.secure is not None
    assert plan.secret_key is not None
    if plan.secure.fresh:
        return os.urandom(32)
    key = secret_round_key(plan.secret_key, exchange.number, exchange.attempt, purpose)
    material = np.asarray(jax.random.key_data(key)).tobytes() + plan.clients[place].name.encode()
    return hashlib.sha256(b"fedjax_llm site secret " + material).digest()


def _rotation(exchange: Exchange) -> bytes:
    """The round's rotation, which all may know."""
    key = round_key(exchange.plan.key, exchange.number, "rotation")
    return hashlib.sha256(b"fedjax_llm rotation " + np.asarray(jax.random.key_data(key)).tobytes()).digest()


def digest_of(*sent: PyTree) -> bytes:
    """SHA-256 of what the server sends to every client."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(sent):
        digest.update(f"{leaf.dtype} {leaf.shape} ".encode() + np.asarray(leaf).tobytes())
    return digest.digest()


def _leaves(message: PyTree, live: dict[str, float] | None) -> list[Any]:
    """The leaves that travel in the round."""
    return [leaf for _, leaf in travelling(message, live)]


@jax.jit
def _flat(leaves: list[Array]) -> Array:
    """Leaves [C, ...] as f32 [C, P]."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in leaves], axis=1)


def _unflat(template: PyTree, live: dict[str, float] | None, values: Array) -> PyTree:
    """A sum [P] as a tree like the template; what did not travel is zero."""
    found, first = [], 0
    for name, leaf in travelling(template):
        if live is not None and not live.get(name or "", 1.0):
            found.append(jnp.zeros(leaf.shape, jnp.float32))
            continue
        found.append(values[first : first + leaf.size].reshape(leaf.shape))
        first += leaf.size
    return jax.tree.structure(trees.zeros(template)).unflatten(found)
