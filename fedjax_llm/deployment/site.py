"""What a site says of itself, in a file of its own that no one else reads: ``get_site() -> Site``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.config import from_file
from fedjax_llm.errors import UserError
from fedjax_llm.types import Unit


@dataclass(frozen=True)
class Budget:
    """What a site lets all runs together spend.

    Attributes:
      epsilon: at most.
      delta: of the guarantee.
      unit: whose presence is hidden.
    """

    epsilon: float
    delta: float = 1e-5
    unit: Unit = "record"


@dataclass(frozen=True)
class Site:
    """A site.

    Attributes:
      name: as the job calls it.
      data: its own source of text, a dataclass with ``.load() -> Dataset`` of one site.
      job: the configuration file that it agreed to.
      folder: where it keeps its budget's ledger, its secrets and its socket.
      budget: its own limit, whatever the server says; ``None``: it takes part in jobs without privacy too.
      server: ``HOST:PORT`` of the server.
      root_certificate: of the authority that signed the server's certificate (PEM).
      private_key: by which the server knows the site (OpenSSH format).
      signing_key: for secure aggregation (PEM).
      directory: all sites' public signing keys, from a source that is not the server: JSON, name -> hexadecimal.
    """

    name: str
    data: Any
    job: str
    folder: str = "site"
    budget: Budget | None = None
    server: str = "127.0.0.1:8000"
    root_certificate: str | None = None
    private_key: str | None = None
    signing_key: str | None = None
    directory: str | None = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not hasattr(self.data, "load"):
            raise UserError(
                f"the data of site {self.name!r} is {self.data!r}; it must be a source, such as SiteFiles(...)"
            )

    @property
    def budget_path(self) -> Path:
        """The ledger of the budget."""
        return Path(self.folder) / "budget.jsonl"

    @property
    def socket_path(self) -> Path:
        """Where the process that holds the text listens; see ``relay.py``."""
        return Path(self.folder) / "worker.sock"


def read_site(path: str | Path) -> Site:
    """The site of a settings file.

    Raises:
      UserError: no such file, no ``get_site``, or a field that does not exist.
    """
    return from_file(path, "get_site", Site)
