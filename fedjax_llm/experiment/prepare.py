"""From an experiment to everything that its rounds need: model, adapters, tokens, plan."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm import mesh as meshes
from fedjax_llm import peft
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.data.chat import LengthReport, encode_records
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.partition import partitioned
from fedjax_llm.data.records import Dataset, EncodedExample
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.data.splits import SplitSite, split_site
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.evaluate import HeldOut, check_validation, hold_out
from fedjax_llm.experiment.known_sites import check_hosts, counted, protected_sites, tokens_counted
from fedjax_llm.experiment.planning import Train, check_cohort, check_personal, check_terms, malicious_sites, plan_of
from fedjax_llm.experiment.protection import depends_on_values, protection, seed_keys
from fedjax_llm.federation.hosts import ALONE, Hosts, here
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import lowest_adapted
from fedjax_llm.models.loading import BaseModel, BaseType, Quantise, load
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.ledger import config_hash
from fedjax_llm.privacy.mechanism import Mechanism, Population
from fedjax_llm.runs import encryption
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters

Load = Callable[[str, BaseType, Quantise], BaseModel]
"""Name, dtype and how matrices are stored -> the base model."""
Trunks = dict[tuple, TrunkCache]
"""Trunks by all that their states depend on, for the runs of one process."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that is ready to begin.

    Attributes:
      experiment: the configuration.
      base: the frozen model.
      lora: the adapters' kind (of ``start_from``, where that is given).
      adapters: what the run starts from: the factors that are trained.
      frozen: the other factors, which are the same everywhere and never travel.
      dataset: as its source gave it, partitioned.
      sites: split into training, validation and test records.
      train: the sites' training examples as tokens.
      lengths: what was kept, truncated and dropped, by site.
      held_out: what is evaluated.
      plan: the rounds; ``None`` in the setting base.
      population: whom the privacy mechanism protects; ``None`` without differential privacy.
      fingerprint: of the model and the text.
      hosts: that share the sites; of another host's site only numbers are known here.
    """

    experiment: Experiment
    base: BaseModel
    lora: Lora
    adapters: Adapters
    frozen: Adapters
    dataset: Dataset
    sites: tuple[SplitSite, ...]
    train: Train
    lengths: dict[str, LengthReport]
    held_out: HeldOut
    plan: RoundPlan | None
    population: Population | None = None
    fingerprint: str = ""
    hosts: Hosts = ALONE

    def joined(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Values of this host's sites, with those of the other hosts' sites, in the order of all."""
        return self.hosts.merge(own, [site.name for site in self.sites])


def prepare(
    experiment: Experiment,
    progress: RunProgress,
    load_model: Load = load,
    trunks: Trunks | None = None,
    hosts: Hosts = ALONE,
) -> Prepared:
    """Loads the text and the model, and lays out the rounds.

    Args:
      experiment: the configuration.
      progress: shows the phases.
      load_model: gives the base model; a process with several runs can give the same one to all.
      trunks: of the runs before in this process; those that fit are used again, and a new one is added.
      hosts: that share the sites; all must call this.

    Raises:
      UserError: whatever cannot work is found here, before any training.
    """
    # What is wrong with these is told before the downloads, and whom nothing can protect before the model is loaded.
    experiment.training.optimizer.make()
    for part in (experiment.aggregation, experiment.compression, experiment.attack):
        if part is not None:
            part.make()
    check_hosts(experiment, hosts)
    with progress.phase("Reading the text"):
        dataset = load_dataset(experiment, hosts)
    sites = split_sites(experiment, dataset, hosts)
    check_terms(experiment, len(sites))
    units = protected_sites(experiment, sites, hosts)
    protected = None if depends_on_values(experiment) else _protection(experiment, units, progress)
    base = _base(experiment, progress, load_model)
    init_key, run_key = seed_keys(experiment)
    lora, whole = _adapters(experiment, base, init_key)
    adapters, frozen = low_rank.split(whole, lora.train)
    if depends_on_values(experiment):
        protected = _protection(experiment, units, progress, low_rank.size(adapters))
    train, lengths = _encode(experiment, base, sites, progress, hosts)
    held_out = _held_out(experiment, dataset, sites, base, hosts)
    mechanism, population = protected or (None, None)
    fingerprint = _fingerprint(base, dataset, train, held_out.test, hosts)
    plan = None
    if experiment.setting != "base":
        plan = plan_of(experiment, base, lora, frozen, train, run_key, mechanism)
        if mechanism is not None:
            plan = plan._replace(secret_key=hosts.tree_from_first(_secret_key(experiment, fingerprint)))
        check_personal(experiment, plan, adapters)
        check_cohort(plan, adapters)
        if experiment.start_from is None:
            plan = plan._replace(offset=low_rank.remainder(whole, lora))
        plan = plan._replace(trunk=_trunk(experiment, base, adapters, train, held_out, trunks))
    parts = (dataset, sites, train, lengths, held_out, plan, population, fingerprint)
    return Prepared(experiment, base, lora, adapters, frozen, *parts, hosts)


def _held_out(
    experiment: Experiment, dataset: Dataset, sites: tuple[SplitSite, ...], base: BaseModel, hosts: Hosts
) -> HeldOut:
    """What this host evaluates: its own sites. The answers in full are host 0's, since no text leaves a host."""
    evaluation, names = experiment.evaluation, [site.name for site in sites]
    own = [site for place, site in enumerate(sites) if hosts.owns(place)]
    found = hold_out(
        evaluation if hosts.first else replace(evaluation, generations=0),
        dataset,
        own,
        base,
        encode(experiment, base),
        system=experiment.data.system,
        seed=experiment.seed,
        tokens_per_microbatch=experiment.execution.tokens_per_microbatch,
        buckets=experiment.execution.evaluation_buckets,
        whole=False,
    )
    check_validation(evaluation, len(hosts.merge(dict.fromkeys(found.validation), names)))
    told = hosts.merge({name: astuple(report) for name, report in found.lengths.items()}, names)
    return replace(found, lengths={name: LengthReport(*numbers) for name, numbers in told.items()})


def _base(experiment: Experiment, progress: RunProgress, load_model: Load) -> BaseModel:
    """The model, whose context must hold the longest example."""
    with progress.phase(f"Loading the model {experiment.model.name}"):
        base = load_model(experiment.model.name, experiment.model.dtype, experiment.model.quantise)
        base = replace(base, model=replace(base.model, remat=experiment.execution.remat))
        mesh = meshes.make(experiment.execution.mesh)
        if mesh is not None:
            meshes.check_fits(base.model, experiment.execution.mesh)
            base = replace(base, params=meshes.place_params(base.model, mesh, base.params))
    if experiment.data.max_length > base.model.config.context:
        raise UserError(
            f"data.max_length is {experiment.data.max_length}, but {base.name} was made for at most "
            f"{base.model.config.context} tokens"
        )
    return base


def _protection(
    experiment: Experiment, sites: tuple[SplitSite, ...], progress: RunProgress, values: int = 0
) -> tuple[Mechanism, Population] | None:
    """The privacy mechanism with its noise, and whom it protects."""
    if experiment.privacy.mechanism is None or experiment.setting == "base":
        return None
    with progress.phase("Calibrating noise", len(sites), "sites") as advance:
        done = 0

        def tell(now: int, total: int) -> None:
            nonlocal done
            advance(round(len(sites) * now / max(total, 1)) - done)
            done = round(len(sites) * now / max(total, 1))

        return protection(experiment, sites, tell, values)


def _secret_key(experiment: Experiment, fingerprint: str) -> jax.Array:
    """The key of who is sampled and of the noise; runs that differ in anything but their layout share none."""
    run = f"{config_hash(to_json(experiment), MAY_CHANGE)} {fingerprint}"
    return noise.run_key(experiment.privacy.randomness, experiment.seed, run)


def _fingerprint(
    base: BaseModel,
    dataset: Dataset,
    train: Train,
    test: Mapping[str, tuple[EncodedExample, ...]],
    hosts: Hosts,
) -> str:
    """Tells whether a checkpoint belongs to this model and this text, however the sites are dealt to hosts."""
    names = [name for name, _ in train]
    own = {name: [_digest(examples), _digest(test.get(name, ()))] for name, examples in train if here(examples)}
    told = [f"{name} {' '.join(digests)}" for name, digests in hosts.merge(own, names).items()]
    return hashlib.sha256("\n".join([base.fingerprint, dataset.version, *told]).encode()).hexdigest()


def _digest(examples: Sequence[EncodedExample]) -> str:
    """Of a site's tokens."""
    digest = hashlib.sha256(f"{len(examples)}".encode())
    for example in examples:
        owner = f"{example.record_id} {example.owner} {example.prompt_length} "
        digest.update(owner.encode() + example.tokens.tobytes())
    return digest.hexdigest()


def _trunk(
    experiment: Experiment,
    base: BaseModel,
    adapters: Adapters,
    train: Train,
    held_out: HeldOut,
    trunks: Trunks | None,
) -> TrunkCache | None:
    """Keeps the hidden states below the adapters, where there are layers below them."""
    layers, execution = lowest_adapted(adapters), experiment.execution
    if not layers or not execution.trunk_megabytes:
        return None
    parts = [dict(train), held_out.test, held_out.validation]
    every = [example for part in parts for examples in part.values() for example in here(examples)]
    shapes = choose_shapes(every, tokens_per_microbatch=execution.tokens_per_microbatch, buckets=execution.buckets)
    key = (base.fingerprint, experiment.model.dtype, layers, shapes, execution.trunk_megabytes)
    known = {} if trunks is None else trunks
    if key not in known:
        known[key] = TrunkCache(base.model, base.params, layers, shapes, execution.trunk_megabytes * 2**20)
    return known[key]


def _adapters(experiment: Experiment, base: BaseModel, key: jax.Array) -> tuple[Lora, Adapters]:
    """Fresh adapters, or those of ``start_from`` with their own rank, alpha and targets."""
    if experiment.start_from is None:
        return experiment.lora, low_rank.init(key, experiment.lora, base.model, base.params)
    lora, adapters = peft.read_adapter_for(Path(experiment.start_from), base.model, encryption.read)
    if experiment.lora.train == "core":
        adapters = low_rank.cored(adapters)
    lora = replace(lora, dropout=experiment.lora.dropout, train=experiment.lora.train, ranks=experiment.lora.ranks)
    replace(experiment, lora=lora)  # what does not go together is refused for what the adapter really is
    return lora, adapters


def trained_values(experiment: Experiment, base: BaseModel) -> int:
    """How many numbers a client trains, and sends."""
    lora, whole = _adapters(experiment, base, seed_keys(experiment)[0])
    return low_rank.size(low_rank.split(whole, lora.train)[0])


def load_dataset(experiment: Experiment, hosts: Hosts = ALONE) -> Dataset:
    """The dataset of an experiment, dealt out to simulated sites where it asks for that.

    Of several hosts each reads only the files of its own sites, where every file is a site; else all read all.
    """
    source, partition = experiment.data.source, experiment.data.partition
    if hosts.count > 1 and partition is None and isinstance(source, SiteFiles) and source.apart:
        return source.load(hosts.index, hosts.count, hosts.gather)
    dataset = source.load()
    if partition is None:
        return dataset
    return partitioned(dataset, experiment.data.partition, np.random.default_rng([experiment.seed, 1]))


def split_sites(experiment: Experiment, dataset: Dataset, hosts: Hosts = ALONE) -> tuple[SplitSite, ...]:
    """Training, validation and test records by a hash of their owner. Which records are held out depends on no seed.

    Raises:
      UserError: a site has no training record, or no test record where every site must have one, or none has any.
    """
    data = experiment.data
    require = ("train", "test") if data.fractions.test and data.test_every_site else ("train",)
    own = [site for place, site in enumerate(dataset.sites) if hosts.owns(place)]
    sites = counted([split_site(site, data.fractions, 0, require) for site in own], dataset.sites, hosts)
    if data.fractions.test and not any(site.test for site in sites):
        raise UserError(f"not one site has a test record; data.fractions.test is {data.fractions.test}, raise it")
    return sites


def _encode(
    experiment: Experiment, base: BaseModel, sites: tuple[SplitSite, ...], progress: RunProgress, hosts: Hosts
) -> tuple[Train, dict[str, LengthReport]]:
    """The training examples of this host's sites as tokens, and how many the others have."""
    train, lengths = [], {}
    total = sum(len(here(site.train)) for site in sites)
    poison = None if experiment.attack is None else experiment.attack.make().poison
    malicious = malicious_sites(experiment, len(sites))
    with progress.phase("Tokenising", total, "records") as advance:
        for number, site in enumerate(sites):
            if not hosts.owns(number):
                continue
            records = site.train
            if poison is not None and malicious[number]:
                records = poison(records, np.random.default_rng([experiment.seed, 3, number]))
            examples, lengths[site.name] = encode(experiment, base)(records)
            train.append((site.name, examples))
            advance(len(site.train))
    unit = experiment.privacy.unit if experiment.privacy.mechanism is not None else None
    return tokens_counted(train, lengths, [site.name for site in sites], unit, hosts)


def encode(experiment: Experiment, base: BaseModel) -> Callable[[Any], tuple[tuple[EncodedExample, ...], LengthReport]]:
    """The experiment's way from records to tokens."""
    data = experiment.data
    return lambda records: encode_records(records, base.tokenizer, data.max_length, data.too_long, data.system)
