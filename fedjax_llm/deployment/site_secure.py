"""A site in secure aggregation: five requests, five answers, and an input that leaves it under masks alone."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedjax_llm.deployment.messages import Said
from fedjax_llm.deployment.site import Site
from fedjax_llm.errors import UserError
from fedjax_llm.federation import secured
from fedjax_llm.federation.apart import OwnPart
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.release import message_like
from fedjax_llm.federation.secured import Exchange
from fedjax_llm.secure import client as clients
from fedjax_llm.secure.messages import Meeting, ProtocolError
from fedjax_llm.secure.simulation import Identities
from fedjax_llm.types import RoundState


class SecureSite:
    """The protocol's state at a site.

    Args:
      site: its settings.
      plan: of the rounds.
      place: of the site among those of the run.
    """

    def __init__(self, site: Site, plan: RoundPlan, place: int) -> None:
        assert plan.secure is not None
        identities = read_identities(site)
        missing = sorted(client.name for client in plan.clients if client.name not in identities.directory)
        if missing:
            raise UserError(f"{site.directory} has no public key of {', '.join(missing)}; get the newest directory")
        self.name, self.place = site.name, place
        self.plan = plan._replace(secure=plan.secure._replace(identities=identities))
        self.sent = Said("")
        self._client: clients.Client | None = None
        self._met: set[bytes] = set()

    def answer(self, request: Said, read: Callable[[Said], RoundState], train: Callable[[], OwnPart]) -> Said:
        """The answer in one stage.

        Args:
          request: of the server: the first holds what is to be trained.
          read: gives the state that a request holds.
          train: this site's training, charged before.

        Raises:
          UserError: the server breaks the protocol, or its terms are not the job's.
        """
        stage, data = int(request.values["stage"]), request.values.get("data", b"")
        if stage == 0:
            return self._advertise(request, read(request))
        if self._client is None or self._client.done != stage:
            raise UserError(f"the server asks for stage {stage} of a round that this site is not in")
        try:
            if stage == 2:
                return self._mask(data, read(self.sent), train())
            step = {1: clients.share, 3: clients.confirm, 4: clients.unmask}[stage]
            self._client, answer = step(self._client, data)
        except ProtocolError:
            self._client = None
            raise
        return Said("stage", {"data": answer})

    def _advertise(self, request: Said, state: RoundState) -> Said:
        """Fresh keys, on the job's own terms."""
        secure, asked = self.plan.secure, request.values["meeting"]
        assert secure is not None
        exchange = self._exchange(request, state)
        values, bits = secured.room(exchange)
        terms = secure.terms_of(int(asked["clients"]))
        meeting = Meeting(terms, asked["session"], int(request.values["round"]), values, bits)
        if meeting.session in self._met or not 2 <= terms.clients <= len(self.plan.clients):
            raise UserError("the server's session was met before, or is of another number of clients than the job has")
        self._met.add(meeting.session)
        self.sent = request
        own = secure.identities
        model = secured.digest_of(state.adapters, self._received(state))
        parts = (meeting, self.name, own.keys[self.name], own.directory, model)
        self._client, answer = clients.advertise(*parts)
        return Said("stage", {"data": answer})

    def _mask(self, data: bytes, state: RoundState, own: OwnPart) -> Said:
        """The message of this round, as integers under masks; and a report that says no more than that it took part."""
        assert self._client is not None
        members = np.array([self.place])
        vector = secured.encoded_messages(self._exchange(self.sent, state), members, own.messages, own.weights)[0]
        self._client, answer = clients.mask(self._client, data, vector)
        (report,) = own.part.reports
        silent = replace(report, loss=None, tokens=0, examples=0, update_norm=0.0, included=True)
        return Said("stage", {"data": answer, "report": asdict(silent)})

    def _exchange(self, request: Said, state: RoundState) -> Exchange:
        """What the round's encoding rests on."""
        number, attempt = int(request.values["round"]), int(request.values["attempt"])
        live = None if self.plan.aggregation.live is None else self.plan.aggregation.live(number)
        return Exchange(self.plan, number, attempt, message_like(self.plan, state), live)

    def _received(self, state: RoundState) -> object:
        """What is sent beside the adapters."""
        broadcast = self.plan.aggregation.broadcast
        return () if broadcast is None else broadcast(state.server_state)


def read_identities(site: Site) -> Identities:
    """This site's signing key, and everybody's public half.

    Raises:
      UserError: a file is missing, or is not what it should be.
    """
    if site.signing_key is None or site.directory is None:
        raise UserError(f"the job has secure aggregation: set signing_key and directory of site {site.name!r}")
    try:
        key = load_pem_private_key(Path(site.signing_key).read_bytes(), None)
        directory = {name: bytes.fromhex(own) for name, own in json.loads(Path(site.directory).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise UserError(f"the signing key or the directory of site {site.name!r} cannot be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{site.signing_key} is no Ed25519 key")
    return Identities({site.name: key}, directory)


def leaves_like(plan: RoundPlan, state: RoundState) -> list[np.ndarray]:
    """Zeros like the arrays of one client's message."""
    return [np.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(message_like(plan, state))]
