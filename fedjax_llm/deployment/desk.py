"""The server's side of a job, as far as it talks to sites: who is there, and what the rounds bring from them."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.deployment.messages import FAILED, REFUSED, STRANGER, Said, Transport, check_arrays
from fedjax_llm.deployment.secure_round import secure_round
from fedjax_llm.deployment.site_budget import BudgetSpent
from fedjax_llm.deployment.worker import sent_of
from fedjax_llm.errors import UserError
from fedjax_llm.federation.apart import put_together
from fedjax_llm.federation.hosts import Hosts
from fedjax_llm.federation.joining import Part
from fedjax_llm.federation.local_work import weights
from fedjax_llm.federation.plan import ClientReport, RoundPlan
from fedjax_llm.federation.release import message_like
from fedjax_llm.federation.secured import Ended
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.types import RoundState, Stack


@dataclass(frozen=True)
class Rules:
    """How long the server waits for sites, and how many it needs.

    Attributes:
      deadline: seconds after which a round goes on without the sites that have not answered; ``None``: it waits.
      at_least: sites that a round needs; with fewer it waits on.
      join: seconds in which sites must have joined; ``None``: it waits for all.
      tries: how often a site may fail at one request before the round goes on without it.
      pause: seconds before a site that failed is asked again.
    """

    deadline: float | None = None
    at_least: int = 1
    join: float | None = None
    tries: int = 5
    pause: float = 3.0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("at_least", "tries"):
            if getattr(self, name) < 1:
                raise UserError(f"rules.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("deadline", "join"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"rules.{name} is {value}; it must be positive, or None")


@dataclass
class Desk:
    """Who of the sites is there, and what they have told.

    Attributes:
      transport: reaches them.
      rules: of waiting.
      run: the run's id.
      progress: shows what happens.
      folder: of the run, whose ``sites.jsonl`` says which site was late, failed or refused, and why.
      names: of the sites of the run.
      log: what all said in the preparation, by exchange: the server first.
      gone: sites that will not take part again, and why.
      unwritten: lines for ``sites.jsonl``, while there is no folder.
    """

    transport: Transport
    rules: Rules
    run: str
    progress: RunProgress
    folder: Path | None = None
    names: tuple[str, ...] = ()
    log: list[list[bytes]] = field(default_factory=list)
    gone: dict[str, str] = field(default_factory=dict)
    unwritten: list[str] = field(default_factory=list)

    def greet(self, names: Sequence[str], about: Mapping[str, str]) -> tuple[str, ...]:
        """The sites that are there and mean the same as the server; it says why others are not.

        Args:
          names: of all sites of the job.
          about: hashes that both sides must have in common.

        Raises:
          UserError: too few are left.
        """
        answers = self.ask(dict.fromkeys(names, Said("hello", about)), self.rules.join)
        for name in names:
            if name not in answers:
                self.note(0, name, "absent", "it did not join in time")
            elif answers[name].word == REFUSED:
                self.note(0, name, "refused", answers[name].why)
        joined = tuple(name for name in names if name in answers and answers[name].word == "hello")
        if len(joined) < self.rules.at_least:
            raise UserError(f"{len(joined)} of {len(names)} sites have joined, and the job needs {self.rules.at_least}")
        return joined

    def preparing(self) -> Hosts:
        """The server among the sites, while all tell each other what the preparation needs."""
        heard = 0

        def exchange(data: bytes) -> list[bytes]:
            nonlocal heard
            if heard == len(self.log):
                answers = self.ask(dict.fromkeys(self.names, self._preparation()), None)
                refusals = [f"{name}: {said.why}" for name, said in answers.items() if said.word != "says"]
                if refusals or len(answers) < len(self.names):
                    raise UserError(f"the run cannot be prepared; {'; '.join(refusals) or 'a site has failed'}")
                self.log.append([data, *(answers[name].values["data"] for name in self.names)])
            elif self.log[heard][0] != data:
                raise UserError("the model or the settings are not those that the run was started with; restore them")
            heard += 1
            return self.log[heard - 1]

        return Hosts(0, len(self.names) + 1, exchange, clients=())

    def all_ready(self) -> None:
        """Lets all sites end their preparation; who refuses now takes no part in the rounds."""
        for name, said in self.ask(dict.fromkeys(self.names, self._preparation()), self.rules.join).items():
            if said.word != "ready":
                self.gone[name] = said.why
                self.note(0, name, "refused", said.why)

    def train(self, plan: RoundPlan, state: RoundState, cohort: np.ndarray, attempt: int) -> tuple[Part, Ended | None]:
        """What comes of a round's clients (``Hosts.train``).

        Raises:
          UserError: too few of them answer, and no more are to be waited for.
        """
        values, arrays = sent_of(plan, state)
        values |= {"run": self.run, "attempt": attempt}
        places = {plan.clients[int(place)].name: int(place) for place in cohort}
        asked = [name for name in places if name not in self.gone]
        if plan.secure is not None:
            return secure_round(self, plan, state, {name: places[name] for name in asked}, (values, arrays))
        request = Said("train", values, arrays)
        found: dict[str, dict[str, Any]] = {}
        refused: dict[str, str] = {}
        while True:
            left = [name for name in asked if name not in found and name not in refused]
            answers = self.ask(dict.fromkeys(left, request), self.rules.deadline)
            for name, said in answers.items():
                try:
                    found[name] = checked_part(plan, state, places[name], said)
                except UserError as error:
                    refused[name] = str(error)
                    self.refused(values["round"], name, said, str(error))
            missing = [name for name in left if name not in answers]
            for name in missing:
                self.note(values["round"], name, "late", "it did not answer in time")
            if len(found) >= min(self.rules.at_least, len(cohort)) or not len(cohort):
                break
            if not missing:
                reasons = "; ".join(f"{name}: {why}" for name, why in (self.gone | refused).items())
                raise UserError(f"round {values['round']}: {len(found)} updates are left ({reasons})")
        return put_together(plan, state, [found[name] for name in places if name in found]), None

    def figures(self, word: str, plan: RoundPlan, state: RoundState) -> Hosts:
        """The server among sites that have evaluated a state (``evaluate`` or ``validate``): it hears their figures."""
        values, arrays = sent_of(plan, state)
        request = Said(word, values | {"run": self.run}, arrays)
        asked = [name for name in self.names if name not in self.gone]
        answers = self.ask(dict.fromkeys(asked, request), self.rules.deadline)
        for name in asked:
            if name not in answers or answers[name].word != "figures":
                why = answers[name].why if name in answers else "it did not answer in time"
                self.note(values["round"] - 1, name, "without figures", why)
        said = [answers[name].values["said"] for name in asked if name in answers and answers[name].word == "figures"]
        heard = iter(range(10**6))

        def exchange(data: bytes) -> list[bytes]:
            place = next(heard)
            return [data, *(own[place] for own in said)]

        return Hosts(0, len(said) + 1, exchange, clients=()) if said else Hosts(clients=())

    def ask(self, requests: Mapping[str, Said], deadline: float | None) -> dict[str, Said]:
        """What sites answer; one that has been restarted is told the run so far, one that fails is asked again."""
        began, waiting, found, failures = time.monotonic(), dict(requests), dict[str, Said](), dict[str, int]()
        while waiting:
            left = None if deadline is None else deadline - (time.monotonic() - began)
            if left is not None and left <= 0:
                break
            answers = self.transport.ask(waiting, left)
            for name, said in answers.items():
                if said.word == FAILED:
                    failures[name] = failures.get(name, 0) + 1
                    self.note(int(waiting[name].values.get("round", 0)), name, "failed", said.why)
                elif said.word != STRANGER:
                    found[name] = said
                if said.word not in (FAILED, STRANGER) or failures.get(name, 0) >= self.rules.tries:
                    del waiting[name]
            strangers = [name for name in answers if name in waiting and answers[name].word == STRANGER]
            if strangers:
                again = self.transport.ask(dict.fromkeys(strangers, self._preparation()), left)
                refused = {name: said for name, said in again.items() if said.word == REFUSED}
                found |= refused
                waiting = {name: request for name, request in waiting.items() if name not in refused}
            elif waiting and answers:
                time.sleep(self.rules.pause)
        return found

    def refused(self, number: int, name: str, said: Said, why: str) -> None:
        """Takes down that a site's answer is not used; one whose budget is spent is not asked again."""
        self.note(number, name, "refused", why)
        if said.values.get("kind") == BudgetSpent.__name__:
            self.gone[name] = why

    def note(self, number: int, name: str, what: str, why: str) -> None:
        """Shows and takes down what became of a site."""
        self.progress.say(f"round {number}: site {name} {what}: {why}" if number else f"site {name} {what}: {why}")
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "round": number, "site": name}
        self.unwritten.append(json.dumps(line | {"what": what, "why": why}) + "\n")
        if self.folder is not None:
            self.keep_in(self.folder)

    def keep_in(self, folder: Path) -> None:
        """Takes everything down in a run's folder, from the first greeting on."""
        self.folder = folder
        if self.unwritten:
            with open(folder / "sites.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(self.unwritten))
            self.unwritten.clear()

    def _preparation(self) -> Said:
        """The request that brings a site as far as the others are."""
        return Said("prepare", {"run": self.run, "sites": list(self.names), "log": self.log})


def checked_part(plan: RoundPlan, state: RoundState, place: int, said: Said) -> dict[str, Any]:
    """What a site told of its round, if it can be used.

    Raises:
      UserError: the site refused, or its update is not one of this run's: the message says what is wrong with it.
    """
    client = plan.clients[place]
    if said.word != "trained":
        raise UserError(said.why)
    message, weight = message_like(plan, state), jnp.float32(0)
    kind = plan.aggregation.view
    like = [np.asarray(leaf) for leaf in jax.tree.leaves(kind(message, weight))]
    if kind is Stack:
        like = [leaf[None] for leaf in like]
    whose = f"the update of {client.name}"
    check_arrays(said.arrays, like, whose)
    given, agreed = float(np.sum(said.arrays[-1])), float(weights(plan, [client], 1)[0])
    if given not in (0.0, agreed):
        raise UserError(f"{whose} has the weight {given:g}, and {agreed:g} is the site's")
    try:
        (report,) = said.values["reports"]
        ClientReport(**report)
        right = report["name"] == client.name and said.values["members"].tolist() == [place] and not said.values["kept"]
        bound = abs(float(said.values["below_clip"])) <= 0.5
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{whose} comes without its report: {error}") from error
    if not right or not bound:
        raise UserError(f"{whose} speaks of another site, or of more than one client")
    return dict(said.values) | {"view": list(said.arrays), "ideal": None}
