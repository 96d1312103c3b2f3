"""Who the clients of a run are, by setting: the same data and the same steps, with other bookkeeping."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedjax_llm.data.records import EncodedExample, units_of
from fedjax_llm.errors import UserError
from fedjax_llm.federation.hosts import Elsewhere
from fedjax_llm.federation.sampling import client_id
from fedjax_llm.privacy.mechanism import EVERY_SITE
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.types import Setting, Unit


@dataclass(frozen=True, eq=False)
class Client:
    """A holder of training examples.

    Attributes:
      name: of the site, or ``all`` for the one client of the setting centralised.
      id: stable over rounds, cohorts and runs; see ``sampling.client_id``.
      examples: at least one; of another host's client only their number is known.
      units: the examples by privacy unit; empty in a run without differential privacy.
    """

    name: str
    id: int
    examples: Sequence[EncodedExample]
    units: Sequence[tuple[EncodedExample, ...]] = ()


def clients_of(
    setting: Setting, sites: Sequence[tuple[str, Sequence[EncodedExample]]], unit: Unit | None = None
) -> tuple[Client, ...]:
    """The clients of a setting: the sites, or one that holds everything.

    Args:
      setting: of the run.
      sites: names and training examples.
      unit: of privacy, ``None`` without.

    Raises:
      UserError: two sites have one name, or one number; a name cannot name a folder, or a site has no training example.
    """
    names = [name for name, _ in sites]
    owners: dict[int, str] = {}
    for name, examples in sites:
        if not examples:
            raise UserError(
                f"site {name!r} has no training example left; give it more records, a smaller held-out share, "
                "a larger data.max_length, or leave it out"
            )
        if name in (".", "..") or not name.strip() or set(name) & set("/\\\0\n"):
            raise UserError(f"a site is called {name!r}; names must not be empty, nor hold slashes or line breaks")
        if name == EVERY_SITE:
            raise UserError(f"a site is called {name!r}, which stands for all sites in a ledger; rename it")
        if names.count(name) > 1:
            raise UserError(f"two sites are called {name!r}; site names must be unique")
        other = owners.setdefault(client_id(name), name)
        if other != name:
            raise UserError(
                f"the sites {other!r} and {name!r} have names with the same hash, and would draw the same random "
                "numbers; rename one of them"
            )
    if setting == "centralised":
        sites = [("all", tuple(example for _, examples in sites for example in examples))]
    return tuple(_client(name, examples, unit) for name, examples in sites)


def _client(name: str, examples: Sequence[EncodedExample], unit: Unit | None) -> Client:
    """A client, of this host or of another."""
    if isinstance(examples, Elsewhere):
        return Client(name, client_id(name), examples, Elsewhere(examples.units))
    return Client(name, client_id(name), tuple(examples), units_of(examples, unit) if unit else ())


def local_training_of(setting: Setting, local: LocalTraining, cohort: int) -> LocalTraining:
    """Local training that spends as many examples a round in every setting.

    The one client of the setting centralised does the steps of the whole cohort, one after another. With
    ``local_epochs`` it passes over the examples of all sites, which are as many only where every site takes part in
    every round. Where a client is the same in every round, its optimiser lasts over the rounds unless the experiment
    says otherwise.
    """
    if local.keep_optimizer == "auto":
        local = replace(local, keep_optimizer="no" if setting == "federated" else "yes")
    if setting == "centralised":
        local = replace(local, local_steps=local.local_steps * cohort)
    return local
