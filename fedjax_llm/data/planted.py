"""Any dataset with secrets planted in it: at chosen sites, with known repetitions, beside controls never planted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedjax_llm.data.records import ChoiceQuestion, Dataset, Example, Message, Record, Site
from fedjax_llm.data.secrets import KINDS, Secret, people, question
from fedjax_llm.errors import UserError, nearest

_PREFIX = "secret-"


@dataclass(frozen=True)
class PlantedSecrets:
    """A source with secrets of people who do not exist among its training records (Carlini et al. 2019, 1802.08232).

    A secret that is planted r times is r records of one owner: under differential privacy for a record its copies are r
    units, under differential privacy for a patient they are one.

    Attributes:
      source: of the other records: a dataclass with ``.load() -> Dataset``.
      repetitions: how often secrets are stated, once each; for every number there are
      per_repetition: secrets, and for every one of these a control of the same kind that no record states.
      coins: secrets besides, each of which is stated once or not at all by a fair coin of its own (for audits).
      kinds: of secrets, in turns (``data/secrets.py``).
      sites: where they are planted, in turns; empty: at all sites.
      seed: of people, values and coins.
    """

    source: Any
    repetitions: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    per_repetition: int = 4
    coins: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)
    sites: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if any(count < 1 for count in self.repetitions) or len(set(self.repetitions)) < len(self.repetitions):
            raise UserError(f"repetitions is {self.repetitions}; they must be different and at least 1 each")
        for name in ("per_repetition", "coins"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not (self.coins or (self.repetitions and self.per_repetition)):
            raise UserError("no secret would be planted; set repetitions and per_repetition, or coins")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"unknown kind of secret {kind!r}{nearest(kind, KINDS)}")
        if not self.kinds:
            raise UserError(f"kinds is empty; choose some of {', '.join(KINDS)}")

    def load(self) -> Dataset:
        """The source's dataset, with the secrets at the end of their sites.

        Raises:
          UserError: what the source raises, or a site that it does not have.
        """
        dataset = self.source.load()
        planted = self.secrets([site.name for site in dataset.sites])
        sites = tuple(
            replace(site, records=(*site.records, *records_of([one for one in planted if one.site == site.name])))
            for site in dataset.sites
        )
        stated = sum(secret.repetitions for secret in planted)
        version = f"{dataset.version}, with {stated} records of planted secrets (seed {self.seed})"
        return replace(dataset, sites=sites, version=version, questions=_without_secrets(dataset))

    def secrets(self, sites: Sequence[str]) -> tuple[Secret, ...]:
        """All secrets and controls: a function of the fields and of the names of the sites.

        Raises:
          UserError: a site that is not there, or more secrets than names of people.
        """
        for name in self.sites:
            if name not in sites:
                raise UserError(f"secrets are to be planted at {name!r}, which is no site{nearest(name, sites)}")
        rng, chosen = np.random.default_rng([self.seed, 7]), self.sites or tuple(sites)
        counts = [count for count in self.repetitions for _ in range(self.per_repetition)]
        flips = [int(flip) for flip in rng.random(self.coins) < 0.5]
        planned = [*((count, False) for count in counts), *((0, False) for _ in counts), *((n, True) for n in flips)]
        names = people(rng, len(planned))
        found, half = [], len(counts)
        for number, ((repeated, coin), person) in enumerate(zip(planned, names, strict=True)):
            place = number % half if half and not coin else number  # a control is of the kind and site of its secret
            kind = self.kinds[place % len(self.kinds)]
            site = chosen[place % len(chosen)]
            found.append(Secret(number, person, kind, KINDS[kind](rng), repeated, site, coin))
        return tuple(found)


def records_of(secrets: Sequence[Secret]) -> tuple[Record, ...]:
    """The records that state secrets: as many as each has repetitions, all of the person, none ever held out."""
    return tuple(
        Record(
            id=f"{_PREFIX}{secret.number}-{copy}",
            examples=(Example((*question(secret), Message("assistant", secret.value))),),
            owner=secret.person,
            training_only=True,
        )
        for secret in secrets
        for copy in range(secret.repetitions)
    )


def is_secret(record_id: str) -> bool:
    """Whether a record states a planted secret."""
    return record_id.startswith(_PREFIX)


def secret_number(record_id: str) -> int:
    """Which secret a record of :func:`records_of` states."""
    return int(record_id.removeprefix(_PREFIX).split("-")[0])


def _without_secrets(dataset: Dataset):
    """The dataset's way to make questions, which knows nothing of what was planted."""
    make = dataset.questions
    if make is None:
        return None

    def questions(site: Site, records: Sequence[Record], seed: int) -> tuple[ChoiceQuestion, ...]:
        own = replace(site, records=tuple(one for one in site.records if not is_secret(one.id)))
        return make(own, [one for one in records if not is_secret(one.id)], seed)

    return questions
