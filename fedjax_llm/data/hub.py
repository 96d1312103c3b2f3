"""Any dataset of the Hugging Face hub, by name, where the hub can be reached (extra ``hub``)."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedjax_llm.data.records import Dataset
from fedjax_llm.data.table import Columns, Row, scalar, sites_of
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the hub, or in the hub's local cache.

    Attributes:
      name: e.g. ``"owner/name"``, or a local folder that the ``datasets`` package can read.
      subset: the dataset's configuration, where it has several.
      split: which of the dataset's own splits to take; what is held out is decided anew, by hash.
      revision: a commit, tag or branch; ``None``: the newest. Name a commit for runs that can be repeated.
      site_column: column with the site's name; ``None``: one site named ``all``, to be partitioned.
      id_column: names a record; rows with the same id are one record. ``None``: a hash of the row.
      label_column: a class, for label-skewed partitions.
      owner_column: whose record it is.
      prompt_column: the question, where there is no column of messages.
      answer_column: the answer, where there is no column of messages.
      messages_column: chat messages, a list of ``{"role": ..., "content": ...}``.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    site_column: str | None = None
    id_column: str | None = None
    label_column: str | None = None
    owner_column: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    messages_column: str = "messages"

    def load(self) -> Dataset:
        """Downloads (or finds in the cache) and reads the split.

        Raises:
          UserError: the ``datasets`` package is not installed, the hub cannot be reached, there is no such dataset or
            split, the split is empty, or a row cannot be read.
        """
        columns = Columns(
            self.prompt_column,
            self.answer_column,
            self.messages_column,
            self.id_column,
            self.label_column,
            self.owner_column,
        )
        sites = sites_of(self._rows(self.table()), columns)
        if not sites:
            raise UserError(f"{self.name}: the split {self.split!r} holds no rows; choose another split")
        citation = f"dataset {self.name} of the Hugging Face hub; its card has the citation and the licence"
        return Dataset(sites, f"{self.name}@{self.revision or 'main'}:{self.split}", citation)

    def table(self) -> Any:
        """The split, as the ``datasets`` package gives it."""
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise UserError(
                f"the dataset {self.name!r} wants the package 'datasets': pip install datasets, or save the "
                "data as JSON Lines and use SiteFiles"
            ) from None
        try:
            return datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
        # The package lets errors of several network and file libraries through; all are about the name or the network.
        except Exception as error:
            raise UserError(
                f"cannot load the split {self.split!r} of the dataset {self.name!r}: {type(error).__name__}: {error}\n"
                "Check the name, subset, split and revision; without a network, a dataset in the hub's cache loads "
                "with HF_HUB_OFFLINE=1, and files of your own load with SiteFiles"
            ) from error

    def _rows(self, table: Any) -> Iterator[tuple[str, str, Row]]:
        """(site, place, row), one at a time."""
        for number, row in enumerate(table):
            where = f"{self.name}[{self.split}] row {number}"
            site = scalar(where, row, self.site_column) if self.site_column else "all"
            if site is None:
                raise UserError(f"{where}: the site column {self.site_column!r} is empty; every row belongs to a site")
            yield site, where, row
