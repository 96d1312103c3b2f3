"""The server's side of a round under secure aggregation: five exchanges of bytes, and one sum."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from fedjax_llm.deployment.messages import Said
from fedjax_llm.errors import UserError
from fedjax_llm.federation import secured
from fedjax_llm.federation.apart import put_together
from fedjax_llm.federation.joining import Part
from fedjax_llm.federation.plan import ClientReport, RoundPlan
from fedjax_llm.federation.release import message_like
from fedjax_llm.federation.secured import Ended, Exchange
from fedjax_llm.secure import server as servers
from fedjax_llm.secure.client import STAGES
from fedjax_llm.secure.messages import Meeting
from fedjax_llm.secure.outcome import Abandoned
from fedjax_llm.types import RoundState


class Asks(Protocol):
    """Who reaches the sites (``desk.Desk``)."""

    rules: Any

    def ask(self, requests: Mapping[str, Said], deadline: float | None) -> dict[str, Said]:
        """Requests by site -> answers."""
        ...

    def note(self, number: int, name: str, what: str, why: str) -> None:
        """Takes down what became of a site."""
        ...

    def refused(self, number: int, name: str, said: Said, why: str) -> None:
        """Takes down that a site's answer is not used."""
        ...


def secure_round(
    desk: Asks,
    plan: RoundPlan,
    state: RoundState,
    places: Mapping[str, int],
    sent: tuple[dict[str, Any], Sequence[np.ndarray]],
) -> tuple[Part, Ended]:
    """A round whose sum alone is read; it is abandoned, and releases nothing, if too few sites stay.

    Args:
      desk: reaches the sites.
      plan: of the rounds.
      state: that the round begins with.
      places: of the sites that are asked, by name.
      sent: values and arrays that they are to train from.
    """
    (values, arrays), names = sent, tuple(sorted(places))
    live = None if plan.aggregation.live is None else plan.aggregation.live(values["round"])
    exchange = Exchange(plan, values["round"], values["attempt"], message_like(plan, state), live, names=names)
    broadcast = plan.aggregation.broadcast
    model = secured.digest_of(state.adapters, () if broadcast is None else broadcast(state.server_state))
    reports: dict[str, dict[str, Any]] = {}
    try:
        meeting, directory = _meeting(plan, exchange, names)
        server = servers.begin(meeting, directory, names, model)
        asked = values | {"stage": 0, "meeting": {"clients": len(names), "session": meeting.session}}
        requests = dict.fromkeys(names, Said("secure", asked, arrays))
        traffic = dict.fromkeys(names, (0, 0))
        for stage in range(len(STAGES)):
            answers = desk.ask(requests, desk.rules.deadline)
            for name in requests:
                if name not in answers:
                    desk.note(values["round"], name, "late", f"it did not answer {STAGES[stage]} in time")
                elif answers[name].word != "stage":
                    desk.refused(values["round"], name, answers[name], answers[name].why)
                else:
                    data = answers[name].values["data"]
                    traffic[name] = (traffic[name][0], traffic[name][1] + len(data))
                    server = servers.receive(server, name, data)
                    if stage == 2:
                        reports[name] = answers[name].values["report"]
            server, replies = servers.close(server)
            requests = {}
            for name, data in replies.items():
                traffic[name] = (traffic[name][0] + len(data), traffic[name][1])
                about = {"run": values["run"], "round": values["round"], "stage": stage + 1, "data": data}
                requests[name] = Said("secure", about)
        outcome = servers.result(server)._replace(traffic=traffic)
    except Abandoned as lost:
        lost.traffic = lost.traffic or dict.fromkeys(names, (0, 0))
        return put_together(plan, state, []), secured.abandoned(exchange, lost)
    told = [_told(places[name], name, reports) for name in places if name in outcome.survivors]
    return put_together(plan, state, told), secured.opened(exchange, outcome)


def _meeting(plan: RoundPlan, exchange: Exchange, names: Sequence[str]) -> tuple[Meeting, Mapping[str, bytes]]:
    """What all parties of the round know."""
    assert plan.secure is not None
    size, bits = secured.room(exchange)
    directory = plan.secure.identities.directory
    missing = sorted(set(names) - set(directory))
    if missing:
        raise UserError(f"the directory of signing keys has none of {', '.join(missing)}")
    meeting = Meeting(plan.secure.terms_of(len(names)), os.urandom(16), exchange.number, size, bits)
    return meeting, directory


def _told(place: int, name: str, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A survivor's part: that it took part, and the bytes that it was sent; its message is in nobody's hands."""
    about = reports.get(name, {})
    sizes = {key: int(about.get(key, 0)) for key in ("download_bytes", "upload_bytes")}
    report = ClientReport(name=name, loss=None, tokens=0, examples=0, update_norm=0.0, included=True, **sizes)
    return {
        "members": np.array([place]), "view": None, "ideal": None, "kept": {}, "below_clip": 0.0,
        "reports": [asdict(report)], "padded_tokens": 0,
    }  # fmt: skip
