"""Sites in the same process, reached by the very messages that would travel: for trials of a job without a network."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedjax_llm.deployment.messages import Said, from_bytes, to_bytes
from fedjax_llm.deployment.worker import Worker


@dataclass(frozen=True)
class InMemory:
    """Carries messages, as bytes, to workers one after the other.

    Attributes:
      workers: by site.
    """

    workers: Mapping[str, Worker]

    def ask(self, requests: Mapping[str, Said], deadline: float | None) -> Mapping[str, Said]:
        """What all sites answer; no time passes."""
        return {name: self._one(name, request) for name, request in requests.items() if name in self.workers}

    def _one(self, name: str, request: Said) -> Said:
        """One site's answer."""
        return from_bytes(to_bytes(self.workers[name].answer(from_bytes(to_bytes(request)))))
