"""Partitioners: how records without sites are dealt to simulated ones.

All of them promise the same: every record goes to exactly one site, no site is empty, and records of one owner stay
together (a record without an owner is its own). Where a partitioner looks at a label or a field, it takes that of the
owner's first record by id. The result is a function of the records and the generator, not of the records' order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedjax_llm.data.records import Dataset, Record, Site
from fedjax_llm.errors import UserError, nearest

Group = tuple[Record, ...]
"""The records of one owner, by id."""


class Partitioner(Protocol):
    """Deals records to sites."""

    def split(self, records: Sequence[Record], rng: np.random.Generator) -> tuple[Site, ...]:
        """Deals all ``records`` to sites.

        Raises:
          UserError: the records do not admit this partition.
        """
        ...


def partitioned(dataset: Dataset, partitioner: Partitioner, rng: np.random.Generator) -> Dataset:
    """The dataset with all its records dealt anew; questions then draw their distractors from the new sites."""
    records = [record for site in dataset.sites for record in site.records]
    return replace(dataset, sites=partitioner.split(records, rng))


@dataclass(frozen=True)
class Iid:
    """``sites`` sites of (nearly) equal numbers of owners, drawn at random.

    Examples:
      >>> records = [Record(f"r{number}", examples=(), owner=f"patient {number // 2}") for number in range(12)]
      >>> [len(site.records) for site in Iid(sites=3).split(records, np.random.default_rng(0))]
      [4, 4, 4]
    """

    sites: int

    def __post_init__(self):
        _check_sites(self.sites)

    def split(self, records: Sequence[Record], rng: np.random.Generator) -> tuple[Site, ...]:
        """See :class:`Partitioner`."""
        groups = _groups(records, self.sites)
        return _numbered(
            [[groups[i] for i in part] for part in np.array_split(rng.permutation(len(groups)), self.sites)]
        )


@dataclass(frozen=True)
class DirichletByLabel:
    """Label skew: each label is dealt to the sites in shares drawn from Dirichlet(alpha, ..., alpha).

    After Yurochkin et al. 2019 (arXiv:1905.12022). Drawn anew until every site has ``min_records`` records.

    Attributes:
      sites: how many.
      alpha: the smaller, the more skewed; large values come near IID.
      min_records: the fewest records of a site.
    """

    sites: int
    alpha: float
    min_records: int = 1

    def __post_init__(self):
        _check_sites(self.sites)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(
                f"alpha is {self.alpha}; it must be a positive number (0.1 is strong skew, 100 nearly none)"
            )
        if self.min_records < 1:
            raise UserError(f"min_records is {self.min_records}; it must be at least 1")

    def split(self, records: Sequence[Record], rng: np.random.Generator) -> tuple[Site, ...]:
        """See :class:`Partitioner`."""
        groups = _groups(records, self.sites)
        if self.sites * self.min_records > len(records):
            raise UserError(
                f"{self.sites} sites of min_records={self.min_records} want more than {len(records)} records"
            )
        by_label: dict[str, list[Group]] = {}
        for group in groups:
            by_label.setdefault(_label(group), []).append(group)
        tries = 1000
        for _ in range(tries):
            parts: list[list[Group]] = [[] for _ in range(self.sites)]
            for label in sorted(by_label):
                for site, dealt in zip(parts, self._deal(by_label[label], rng), strict=True):
                    site.extend(dealt)
            if min(sum(map(len, part)) for part in parts) >= self.min_records:
                return _numbered(parts)
        raise UserError(
            f"no draw in {tries} gave each of {self.sites} sites min_records={self.min_records} of {len(records)} "
            f"records at alpha={self.alpha}; raise alpha, or take fewer sites"
        )

    def _deal(self, groups: Sequence[Group], rng: np.random.Generator) -> list[list[Group]]:
        """One label's owners, cut at random into shares drawn from the Dirichlet."""
        ends = np.cumsum(rng.dirichlet(np.full(self.sites, self.alpha)))[:-1]
        cuts = np.round(ends * len(groups)).astype(int)
        return [[groups[i] for i in part] for part in np.split(rng.permutation(len(groups)), cuts)]


@dataclass(frozen=True)
class ByField:
    """One site for each value of a field, named by it."""

    field: str

    def split(self, records: Sequence[Record], rng: np.random.Generator) -> tuple[Site, ...]:
        """See :class:`Partitioner`; nothing is drawn from ``rng``."""
        del rng
        known = {name for record in records for name in record.fields}
        if self.field not in known:
            raise UserError(f"the records have no field {self.field!r}{nearest(self.field, known)}")
        by_value: dict[str, list[Group]] = {}
        for group in _groups(records, 1):
            value = group[0].fields.get(self.field, "")
            if not value:
                raise UserError(
                    f"record {group[0].id!r} has no value for the field {self.field!r}; fill it in or drop it"
                )
            by_value.setdefault(value, []).append(group)
        return tuple(_site(value, by_value[value]) for value in sorted(by_value))


@dataclass(frozen=True)
class Shards:
    """Sorted by label and cut into equal shards; each site gets some at random (McMahan et al. 2017).

    With ``shards_per_site=2`` most sites see at most two or three labels.
    """

    sites: int
    shards_per_site: int = 2

    def __post_init__(self):
        _check_sites(self.sites)
        if self.shards_per_site < 1:
            raise UserError(f"shards_per_site is {self.shards_per_site}; it must be at least 1")

    def split(self, records: Sequence[Record], rng: np.random.Generator) -> tuple[Site, ...]:
        """See :class:`Partitioner`."""
        count = self.sites * self.shards_per_site
        groups = _groups(records, count)
        shuffled = [groups[i] for i in rng.permutation(len(groups))]
        shards = np.array_split(np.array(sorted(range(len(shuffled)), key=lambda i: _label(shuffled[i]))), count)
        dealt = rng.permutation(count).reshape(self.sites, self.shards_per_site)
        return _numbered([[shuffled[i] for shard in row for i in shards[shard]] for row in dealt])


@dataclass(frozen=True)
class PowerLawSizes:
    """Quantity skew: the k-th of ``sites`` sites gets a number of owners in proportion to ``k ** -exponent``.

    Every site has at least one; ``exponent=0`` gives equal sizes.
    """

    sites: int
    exponent: float

    def __post_init__(self):
        _check_sites(self.sites)
        if not (self.exponent >= 0 and math.isfinite(self.exponent)):
            raise UserError(f"exponent is {self.exponent}; it must be 0 (equal sizes) or more, e.g. 1.0")

    def split(self, records: Sequence[Record], rng: np.random.Generator) -> tuple[Site, ...]:
        """See :class:`Partitioner`."""
        groups = _groups(records, self.sites)
        shares = np.arange(1, self.sites + 1) ** -float(self.exponent)
        # One owner each, and the cuts of the rest rounded as a cumulative sum: sizes add up and never increase by much.
        rest = np.round(np.cumsum(shares / shares.sum()) * (len(groups) - self.sites)).astype(int)
        cuts = (rest + np.arange(1, self.sites + 1))[:-1]
        return _numbered([[groups[i] for i in part] for part in np.split(rng.permutation(len(groups)), cuts)])


def _check_sites(sites: int) -> None:
    """Refuses a number of sites below one."""
    if sites < 1:
        raise UserError(f"sites is {sites}; it must be at least 1")


def _groups(records: Sequence[Record], wanted: int) -> list[Group]:
    """The records by owner, in an order that is not the file's; at least ``wanted`` owners."""
    by_owner: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.id):
        by_owner.setdefault(record.owner or record.id, []).append(record)
    if len(by_owner) < wanted:
        raise UserError(
            f"{wanted} parts are wanted, but {len(records)} records of {len(by_owner)} owners cannot fill them ("
            "records of one owner stay together); take fewer sites"
        )
    return [tuple(by_owner[owner]) for owner in sorted(by_owner)]


def _label(group: Group) -> str:
    """The label of an owner's first record."""
    label = group[0].label
    if label is None:
        raise UserError(f"record {group[0].id!r} has no label, and this partition goes by label; name a label column")
    return label


def _numbered(parts: Sequence[Sequence[Group]]) -> tuple[Site, ...]:
    """Sites named ``site-01``, ``site-02``, ..."""
    digits = max(2, len(str(len(parts))))
    return tuple(_site(f"site-{number:0{digits}d}", part) for number, part in enumerate(parts, start=1))


def _site(name: str, groups: Sequence[Group]) -> Site:
    """One site with its records by id."""
    return Site(name, tuple(sorted((record for group in groups for record in group), key=lambda record: record.id)))
