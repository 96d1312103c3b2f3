"""Messages over Flower: as its records, to its nodes. This file and the two apps alone know Flower's API."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedjax_llm.deployment.messages import FAILED, STRANGER, Said
from fedjax_llm.errors import UserError
from fedjax_llm.federation.hosts import packed, unpacked

KINDS = {"train": "train", "secure": "train", "evaluate": "evaluate", "validate": "evaluate"}
"""Flower's types of messages for words; ``query`` for all others."""


def to_records(said: Said) -> Any:
    """A message as Flower's ``RecordDict``: arrays as arrays, the word and the values as a configuration."""
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    about = ConfigRecord({"word": said.word, "values": packed(dict(said.values))})
    return RecordDict({"arrays": ArrayRecord([np.asarray(array) for array in said.arrays]), "about": about})


def from_records(records: Any) -> Said:
    """The message of :func:`to_records`.

    Raises:
      UserError: it is none.
    """
    try:
        about = records["about"]
        return Said(str(about["word"]), unpacked(about["values"]), records["arrays"].to_numpy_ndarrays())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"what was received over Flower is no message of a job: {error}") from error


@dataclass
class FlowerSites:
    """Sites as nodes of a Flower federation (``messages.Transport``).

    Attributes:
      grid: Flower's way to its nodes.
      nodes: their numbers by site, as the SuperLink gave them for the sites' registered keys.
      resend: seconds without an answer after which a request is sent again: a node that was killed has lost it.
      pause: seconds between looks for answers.
    """

    grid: Any
    nodes: Mapping[str, int]
    resend: float = 300.0
    pause: float = 0.5
    _open: dict[str, tuple[str, Said]] = field(init=False, default_factory=dict)

    def ask(self, requests: Mapping[str, Said], deadline: float | None) -> Mapping[str, Said]:
        """What sites answer in time; it comes back when all have answered, or as soon as one has failed.

        A request that was sent before and is not answered yet is not sent again before ``resend``.
        """
        strangers = sorted(set(requests) - set(self.nodes))
        if strangers:
            raise UserError(f"no key is registered for {', '.join(strangers)}")
        began, found = time.monotonic(), dict[str, Said]()
        self._open = {key: (name, said) for key, (name, said) in self._open.items() if requests.get(name) is said}
        waiting = {name for name, _ in self._open.values()}
        self._push({name: said for name, said in requests.items() if name not in waiting})
        sent = began
        while True:
            for reply in self.grid.pull_messages(list(self._open)):
                name, _ = self._open.get(reply.metadata.reply_to_message_id, (None, None))
                if name is not None:
                    found[name] = self._read(name, reply)
            self._open = {key: (name, said) for key, (name, said) in self._open.items() if name not in found}
            now = time.monotonic()
            failed = any(said.word in (FAILED, STRANGER) for said in found.values())
            if len(found) == len(requests) or failed or (deadline is not None and now - began > deadline):
                return found
            if now - sent > self.resend:
                self._push({name: request for name, request in requests.items() if name not in found})
                sent = now
            time.sleep(self.pause)

    def _push(self, requests: Mapping[str, Said]) -> None:
        """Sends requests."""
        from flwr.app import Message

        messages = [
            Message(to_records(said), self.nodes[name], KINDS.get(said.word, "query"), group_id=_round(said))
            for name, said in requests.items()
        ]
        numbers = list(self.grid.push_messages(messages)) if messages else []
        for number, (name, said) in zip(numbers, requests.items(), strict=False):
            if number:
                self._open[number] = (name, said)

    def _read(self, name: str, reply: Any) -> Said:
        """An answer, which must come from the node that the site's key belongs to."""
        if reply.has_error():
            return Said(FAILED, {"why": str(reply.error.reason or "the site's node reports an error")[:300]})
        if reply.metadata.src_node_id != self.nodes[name]:
            return Said(FAILED, {"why": "the answer comes from another node than the one with the site's key"})
        try:
            return from_records(reply.content)
        except UserError as error:
            return Said(FAILED, {"why": str(error)})


def _round(said: Said) -> str:
    """The round that Flower shows beside a message."""
    return str(said.values.get("round", 0))
