"""What a host knows of the sites of others: names and numbers, of which privacy and the rounds need some."""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.data.chat import LengthReport
from fedjax_llm.data.records import EncodedExample, Record, Site, unit_name, units_of
from fedjax_llm.data.splits import SplitSite
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.planning import Train
from fedjax_llm.federation.hosts import Elsewhere, Hosts, here
from fedjax_llm.privacy.ledger import config_hash
from fedjax_llm.types import Unit


def check_hosts(experiment: Experiment, hosts: Hosts) -> None:
    """Refuses what several hosts cannot do together.

    Raises:
      UserError: the reason, and the way out; or the hosts were started with different experiments.
    """
    if hosts.count == 1:
        return
    if experiment.setting == "centralised":
        raise UserError("the setting centralised has one client, which one host trains: leave out --hosts.count")
    if experiment.secured is not None and hosts.clients is None:
        raise UserError(
            "secure aggregation is simulated in one process, which holds the secrets of all clients; hosts would have "
            "to tell each other those. Set secure to None, or leave out --hosts.count"
        )
    if experiment.attack is not None:
        raise UserError(
            "attack: malicious clients see the messages and the text of others, which stay with their hosts. Set "
            "attack to None, or leave out --hosts.count"
        )
    configs = hosts.gather(config_hash(to_json(experiment), MAY_CHANGE))
    for index, config in enumerate(configs):
        if config != configs[0]:
            raise UserError(f"host {index} was started with other settings than host 0; start all with the same")


def counted(own: Sequence[SplitSite], every: Sequence[Site], hosts: Hosts) -> tuple[SplitSite, ...]:
    """All sites in their order: this host's as they are, of the others' the numbers of records.

    Raises:
      UserError: there are fewer sites than hosts.
    """
    if hosts.count == 1:
        return tuple(own)
    if hosts.clients is None and len(every) < hosts.count:
        raise UserError(f"hosts.count is {hosts.count}, but there are only {len(every)} sites; each host needs one")
    mine = {site.name: site for site in own}
    numbers = {name: [len(site.train), len(site.validation), len(site.test)] for name, site in mine.items()}
    told = hosts.merge(numbers, [site.name for site in every])
    return tuple(
        mine[name] if name in mine else SplitSite(name, *(Elsewhere(count) for count in counts))
        for name, counts in told.items()
    )


def protected_sites(experiment: Experiment, sites: tuple[SplitSite, ...], hosts: Hosts) -> tuple[SplitSite, ...]:
    """The sites with a stand-in for every training record of other hosts, from which privacy units are counted.

    Where the unit is the patient, hosts tell each other digests of the owners' names: which patients several sites
    share decides the guarantee.
    """
    if hosts.count == 1 or experiment.privacy.mechanism is None:
        return sites
    if experiment.privacy.unit != "patient":
        return tuple(
            site if here(site.train) else replace(site, train=tuple(_stand_in(i) for i in range(len(site.train))))
            for site in sites
        )
    own = {site.name: [_owner_digest(record) for record in site.train] for site in sites if here(site.train)}
    told = hosts.merge(own, [site.name for site in sites])
    return tuple(
        replace(site, train=tuple(_stand_in(name, owned) for name, owned in told[site.name])) for site in sites
    )


def tokens_counted(
    train: Sequence[tuple[str, Sequence[EncodedExample]]],
    lengths: dict[str, LengthReport],
    names: Sequence[str],
    unit: Unit | None,
    hosts: Hosts,
) -> tuple[Train, dict[str, LengthReport]]:
    """All sites' training examples, of other hosts' sites their number, and what became of them.

    Args:
      train: this host's examples by site.
      lengths: of these sites.
      names: of all sites, in order.
      unit: of privacy, where there is a mechanism.
      hosts: all of which must call this.
    """
    if hosts.count == 1:
        return tuple(train), lengths
    mine = dict(train)
    own: dict[str, Any] = {}
    for name, examples in train:
        units = len(units_of(examples, unit)) if unit else 0
        own[name] = [len(examples), units, *astuple(lengths[name])]
    told = hosts.merge(own, names)
    every = tuple((name, mine.get(name, Elsewhere(*numbers[:2]))) for name, numbers in told.items())
    return every, {name: LengthReport(*numbers[2:]) for name, numbers in told.items()}


def _stand_in(name: Any, owned: bool = False) -> Record:
    """A record of which only the privacy unit is known."""
    return Record(str(name), (), owner=str(name) if owned else None)


def _owner_digest(record: Record) -> tuple[str, bool]:
    """A training record's unit without its name, and whether that is an owner's."""
    kind, name = unit_name(record.id, record.owner, "patient")
    return hashlib.sha256(f"{kind} {name}".encode()).hexdigest()[:32], kind == "owner"
