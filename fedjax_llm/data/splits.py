"""Train, validation and test by a hash: who is held out depends on no other record, and on no order."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from fedjax_llm.data.records import Record, Site
from fedjax_llm.errors import UserError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Fractions:
    """The expected shares of owners that are held out, for validation and for the test; the rest is for training."""

    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self):
        for name, value in (("validation", self.validation), ("test", self.test)):
            if not 0 <= value < 1:
                raise UserError(f"the {name} fraction is {value}; it must be at least 0 and below 1")
        if self.validation + self.test >= 1:
            raise UserError(f"validation {self.validation} and test {self.test} leave nothing to train on")


@dataclass(frozen=True)
class SplitSite:
    """A site's records by split; each keeps the site's order."""

    name: str
    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]


def split_of(record: Record, fractions: Fractions, salt: int) -> Split:
    """The split of a record: a hash of its owner (or of its id, where it has none) and the salt.

    All records of an owner are in one split, at every site; a record for training only is never held out.
    """
    if record.training_only:
        return "train"
    digest = hashlib.sha256(f"{salt}:{record.owner or record.id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < fractions.test:
        return "test"
    return "validation" if place < fractions.test + fractions.validation else "train"


def split_site(site: Site, fractions: Fractions, salt: int, require: Collection[Split] = ("train",)) -> SplitSite:
    """Splits a site's records.

    Args:
      site: the site.
      fractions: the expected shares.
      salt: another salt gives another split.
      require: the splits that must not be empty.

    Raises:
      UserError: a required split is empty.
    """
    parts: dict[Split, list[Record]] = {"train": [], "validation": [], "test": []}
    for record in site.records:
        parts[split_of(record, fractions, salt)].append(record)
    for name in parts:
        if name in require and not parts[name]:
            owners = len({record.owner or record.id for record in site.records})
            raise UserError(
                f"site {site.name!r} has no {name} record: {len(site.records)} records of {owners} owners, of which "
                f"validation={fractions.validation} and test={fractions.test} are held out; give the site more "
                "records, change data.fractions, or leave the site out"
            )
    return SplitSite(site.name, tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]))
