"""Text that stays at its sites: the source of a job between real ones (``deployment/``)."""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from fedjax_llm.data.records import ChoiceQuestion, Dataset, Record, Site
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class AtSites:
    """Text that stays at the sites.

    Attributes:
      names: of all sites.
    """

    names: tuple[str, ...]
    held: InitVar[Mapping[str, Any] | None] = None

    def __post_init__(self, held: Mapping[str, Any] | None) -> None:
        """Keeps the sources that are held here, which are no part of the configuration."""
        if len(set(self.names)) < len(self.names) or not self.names:
            raise UserError(f"data.source.names is {self.names}; name every site once")
        object.__setattr__(self, "_sources", dict(held or {}))

    def load(self) -> Dataset:
        """All sites in the order of their names, those that are held elsewhere without a record.

        Raises:
          UserError: a site's own source cannot be read, or gives more than one site.
        """
        sources: dict[str, Any] = self._sources  # type: ignore[attr-defined]
        found = {name: source.load() for name, source in sources.items()}
        for name, dataset in found.items():
            if len(dataset.sites) != 1:
                names = ", ".join(site.name for site in dataset.sites)
                raise UserError(
                    f"the source of site {name!r} gives {len(dataset.sites)} sites ({names}); it must be one"
                )
        sites = {name: Site(name, dataset.sites[0].records) for name, dataset in found.items()}
        ask = any(dataset.questions is not None for dataset in found.values())

        def questions(site: Site, records: Sequence[Record], seed: int) -> tuple[ChoiceQuestion, ...]:
            make = found[site.name].questions
            return () if make is None else make(site, records, seed)

        return Dataset(
            tuple(sites.get(name, Site(name, ())) for name in sorted(self.names)),
            version=f"{len(self.names)} sites' own text",
            citation="Each site's own.",
            questions=questions if ask else None,
        )
