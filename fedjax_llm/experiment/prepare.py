"""From an experiment to everything that its rounds need: model, adapters, tokens, plan."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm import peft, trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.data.chat import LengthReport, encode_records
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.partition import partitioned
from fedjax_llm.data.records import Dataset, EncodedExample
from fedjax_llm.data.splits import SplitSite, split_site
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.evaluate import HeldOut, hold_out
from fedjax_llm.experiment.protection import protection, seed_keys
from fedjax_llm.federation import release
from fedjax_llm.federation.clients import clients_of, local_training_of
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import CausalLM, lowest_adapted
from fedjax_llm.models.loading import BaseModel, BaseType, load
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.ledger import config_hash
from fedjax_llm.privacy.mechanism import Mechanism, Population
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Aggregation, Stack

Load = Callable[[str, BaseType], BaseModel]
"""Name and dtype -> the base model."""


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
    """

    experiment: Experiment
    base: BaseModel
    lora: Lora
    adapters: Adapters
    frozen: Adapters
    dataset: Dataset
    sites: tuple[SplitSite, ...]
    train: tuple[tuple[str, tuple[EncodedExample, ...]], ...]
    lengths: dict[str, LengthReport]
    held_out: HeldOut
    plan: RoundPlan | None
    population: Population | None = None
    fingerprint: str = ""


def prepare(experiment: Experiment, progress: RunProgress, load_model: Load = load) -> Prepared:
    """Loads the text and the model, and lays out the rounds.

    Args:
      experiment: the configuration.
      progress: shows the phases.
      load_model: gives the base model; a process with several runs can give the same one to all.

    Raises:
      UserError: whatever cannot work is found here, before any training.
    """
    # What is wrong with these is told before the downloads, and whom nothing can protect before the model is loaded.
    experiment.training.optimizer.make()
    for part in (experiment.aggregation, experiment.compression, experiment.attack):
        if part is not None:
            part.make()
    with progress.phase("Reading the text"):
        dataset = load_dataset(experiment)
    sites = split_sites(experiment, dataset)
    protected = _protection(experiment, sites, progress)
    with progress.phase(f"Loading the model {experiment.model.name}"):
        base = load_model(experiment.model.name, experiment.model.dtype)
        base = replace(base, model=replace(base.model, remat=experiment.execution.remat))
    if experiment.data.max_length > base.model.config.context:
        raise UserError(
            f"data.max_length is {experiment.data.max_length}, but {base.name} was made for at most "
            f"{base.model.config.context} tokens"
        )
    init_key, run_key = seed_keys(experiment)
    lora, whole = _adapters(experiment, base, init_key)
    adapters, frozen = low_rank.split(whole, lora.train)
    train, lengths = _encode(experiment, base, sites, progress)
    held_out = hold_out(
        experiment.evaluation,
        dataset,
        sites,
        base,
        encode(experiment, base),
        system=experiment.data.system,
        seed=experiment.seed,
        tokens_per_microbatch=experiment.execution.tokens_per_microbatch,
        buckets=experiment.execution.evaluation_buckets,
    )
    mechanism, population = protected or (None, None)
    fingerprint = _fingerprint(base, dataset, train, held_out.test)
    plan = None
    if experiment.setting != "base":
        plan = _plan(experiment, base, lora, frozen, train, run_key, mechanism)
        if mechanism is not None:
            plan = plan._replace(secret_key=_secret_key(experiment, fingerprint))
        _check_personal(experiment, plan, adapters)
        _check_cohort(plan, adapters)
        if experiment.start_from is None:
            plan = plan._replace(offset=low_rank.remainder(whole, lora))
        plan = plan._replace(trunk=_trunk(experiment, base, adapters, train, held_out))
    parts = (dataset, sites, train, lengths, held_out, plan, population, fingerprint)
    return Prepared(experiment, base, lora, adapters, frozen, *parts)


def _protection(
    experiment: Experiment, sites: tuple[SplitSite, ...], progress: RunProgress
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

        return protection(experiment, sites, tell)


def _plan(
    experiment: Experiment,
    base: BaseModel,
    lora: Lora,
    frozen: Adapters,
    train: tuple[tuple[str, tuple[EncodedExample, ...]], ...],
    key: jax.Array,
    mechanism: Mechanism | None,
) -> RoundPlan:
    """The rounds of an experiment."""
    privacy = experiment.privacy
    cohort = cohort_size(experiment, len(train))
    clients = clients_of(experiment.setting, train, privacy.unit if mechanism is not None else None)
    local = local_training_of(experiment.setting, experiment.training, cohort)
    # Without a federation there is plain training: no algorithm comes on top of the client's own optimiser.
    federated = experiment.setting == "federated"
    aggregation = algorithm_of(experiment.aggregation if federated else FedAvg())
    return RoundPlan(
        setting=experiment.setting,
        trainer=trainer_of(
            replace(base.model, dropout=lora.dropout),
            lora.scaling,
            local,
            # Only where there is a server to stay close to.
            local.proximal if experiment.setting == "federated" else 0.0,
            mechanism,
            aggregation.client.gradient,
        ),
        aggregation=aggregation,
        federation=experiment.federation,
        local=local,
        execution=experiment.execution,
        shapes=choose_shapes(
            [example for client in clients for example in client.examples],
            tokens_per_microbatch=experiment.execution.tokens_per_microbatch,
            buckets=experiment.execution.buckets,
            rows_of_unit=1 if mechanism is None else mechanism.examples_per_unit,
        ),
        clients=clients,
        cohort=1 if experiment.setting == "centralised" else cohort,
        key=key,
        frozen=frozen,
        mechanism=mechanism,
        ranks=tuple(lora.ranks[i % len(lora.ranks)] for i in range(len(clients))) if lora.ranks and federated else (),
        measure_error=experiment.output.aggregation_error,
        codec=experiment.compression.make() if experiment.compression is not None and federated else None,
        malicious=malicious_sites(experiment, len(clients)),
        corrupt=experiment.attack.make().corrupt if experiment.attack is not None and federated else None,
    )


def algorithm_of(aggregator: Any) -> Aggregation:
    """What an aggregator makes. Equal ones get the same functions, so that what is compiled for one serves the next."""
    try:
        hash(aggregator)
    except TypeError:  # one of its fields is a dictionary
        return aggregator.make()
    return _made(aggregator)


@functools.lru_cache(maxsize=64)
def _made(aggregator: Any) -> Aggregation:
    """The algorithm, made once."""
    return aggregator.make()


def _check_personal(experiment: Experiment, plan: RoundPlan, adapters: Adapters) -> None:
    """Refuses an algorithm with personal factors of which there are none here, or none but these."""
    own, shared = low_rank.partition(adapters, plan.aggregation.personal)
    if plan.aggregation.personal is not None and not (own and shared):
        kept = "all trained factors of the adapters" if own else "no trained factor of the adapters"
        raise UserError(
            f"{type(experiment.aggregation).__name__} would leave {kept} at the sites: change its fields, lora.layers "
            f"or lora.train, or choose {'the setting local' if own else 'FedAvg'}"
        )


def _check_cohort(plan: RoundPlan, adapters: Adapters) -> None:
    """Traces the server's update on a whole cohort, where rules that need more clients refuse it."""
    if plan.setting != "federated" or plan.aggregation.view is not Stack:
        return
    _, shared = low_rank.partition(adapters, plan.aggregation.personal)
    message = release.template(plan, adapters)
    stack = jax.eval_shape(lambda one: Stack(trees.repeat(one, plan.cohort), jnp.ones(plan.cohort)), message)
    jax.eval_shape(plan.aggregation.update, stack, plan.aggregation.init(shared), shared)


def malicious_sites(experiment: Experiment, sites: int) -> tuple[bool, ...]:
    """Which of the sites are malicious: a share of them, drawn by the seed; none where nothing is federated."""
    if experiment.attack is None or experiment.setting != "federated":
        return (False,) * sites
    rng = np.random.default_rng([experiment.seed, 2])
    count = math.floor(Fraction(str(experiment.malicious)) * sites)
    if not count:
        raise UserError(f"malicious is {experiment.malicious}, which of {sites} sites is none; raise it")
    chosen = set(rng.permutation(sites)[:count].tolist())
    return tuple(site in chosen for site in range(sites))


def _secret_key(experiment: Experiment, fingerprint: str) -> jax.Array:
    """The key of who is sampled and of the noise; runs that differ in anything but their layout share none."""
    run = f"{config_hash(to_json(experiment), MAY_CHANGE)} {fingerprint}"
    return noise.run_key(experiment.privacy.randomness, experiment.seed, run)


def _fingerprint(
    base: BaseModel,
    dataset: Dataset,
    train: tuple[tuple[str, tuple[EncodedExample, ...]], ...],
    test: Mapping[str, tuple[EncodedExample, ...]],
) -> str:
    """Tells whether a checkpoint belongs to this model and this text."""
    digest = hashlib.sha256(f"{base.fingerprint} {dataset.version}".encode())
    for sites in (dict(train), test):
        for name, examples in sites.items():
            digest.update(f"{name} {len(examples)}".encode())
            for example in examples:
                owner = f"{example.record_id} {example.owner} {example.prompt_length} "
                digest.update(owner.encode() + example.tokens.tobytes())
    return digest.hexdigest()


def _trunk(
    experiment: Experiment,
    base: BaseModel,
    adapters: Adapters,
    train: tuple[tuple[str, tuple[EncodedExample, ...]], ...],
    held_out: HeldOut,
) -> TrunkCache | None:
    """Keeps the hidden states below the adapters, where there are layers below them."""
    layers, execution = lowest_adapted(adapters), experiment.execution
    if not layers or not execution.trunk_megabytes:
        return None
    parts = [dict(train), held_out.test, held_out.validation]
    every = [example for part in parts for examples in part.values() for example in examples]
    shapes = choose_shapes(every, tokens_per_microbatch=execution.tokens_per_microbatch, buckets=execution.buckets)
    return TrunkCache(base.model, base.params, layers, shapes, execution.trunk_megabytes * 2**20)


def trainer_of(
    model: CausalLM,
    scaling: float,
    local: LocalTraining,
    proximal: float,
    mechanism: Mechanism | None,
    correct: Callable[..., Any] | None = None,
) -> Trainer:
    """The static half of local training, with what a privacy mechanism and an algorithm ask of it."""
    if mechanism is None:
        return Trainer(model, scaling, local.optimizer.make(), proximal, correct=correct)
    noisy = mechanism.noised == "steps"
    return Trainer(
        model=model,
        scaling=scaling,
        optimizer=local.optimizer.make(),
        proximal=proximal,
        clip=mechanism.clip if mechanism.clipped == "gradients" else None,
        grouped=mechanism.examples_per_unit > 1,
        noisy=noisy,
        mix=mechanism.correlated.mix if noisy and mechanism.correlated is not None else None,
        correct=correct,
    )


def _adapters(experiment: Experiment, base: BaseModel, key: jax.Array) -> tuple[Lora, Adapters]:
    """Fresh adapters, or those of ``start_from`` with their own rank, alpha and targets."""
    if experiment.start_from is None:
        return experiment.lora, low_rank.init(key, experiment.lora, base.model, base.params)
    lora, adapters = peft.read_adapter_for(Path(experiment.start_from), base.model)
    if experiment.lora.train == "core":
        adapters = low_rank.cored(adapters)
    lora = replace(lora, dropout=experiment.lora.dropout, train=experiment.lora.train, ranks=experiment.lora.ranks)
    replace(experiment, lora=lora)  # what does not go together is refused for what the adapter really is
    return lora, adapters


def load_dataset(experiment: Experiment) -> Dataset:
    """The dataset of an experiment, dealt out to simulated sites where it asks for that."""
    dataset = experiment.data.source.load()
    if experiment.data.partition is None:
        return dataset
    return partitioned(dataset, experiment.data.partition, np.random.default_rng([experiment.seed, 1]))


def split_sites(experiment: Experiment, dataset: Dataset) -> tuple[SplitSite, ...]:
    """Training, validation and test records by a hash of their owner. Which records are held out depends on no seed.

    Raises:
      UserError: a site has no training record, or no test record where every site must have one, or none has any.
    """
    data = experiment.data
    require = ("train", "test") if data.fractions.test and data.test_every_site else ("train",)
    sites = tuple(split_site(site, data.fractions, 0, require) for site in dataset.sites)
    if data.fractions.test and not any(site.test for site in sites):
        raise UserError(f"not one site has a test record; data.fractions.test is {data.fractions.test}, raise it")
    return sites


def _encode(
    experiment: Experiment, base: BaseModel, sites: tuple[SplitSite, ...], progress: RunProgress
) -> tuple[tuple[tuple[str, tuple[EncodedExample, ...]], ...], dict[str, LengthReport]]:
    """The training examples of every site as tokens."""
    train, lengths = [], {}
    total = sum(len(site.train) for site in sites)
    poison = None if experiment.attack is None else experiment.attack.make().poison
    malicious = malicious_sites(experiment, len(sites))
    with progress.phase("Tokenising", total, "records") as advance:
        for number, site in enumerate(sites):
            records = site.train
            if poison is not None and malicious[number]:
                records = poison(records, np.random.default_rng([experiment.seed, 3, number]))
            examples, lengths[site.name] = encode(experiment, base)(records)
            train.append((site.name, examples))
            advance(len(site.train))
    return tuple(train), lengths


def encode(experiment: Experiment, base: BaseModel) -> Callable[[Any], tuple[tuple[EncodedExample, ...], LengthReport]]:
    """The experiment's way from records to tokens."""
    data = experiment.data
    return lambda records: encode_records(records, base.tokenizer, data.max_length, data.too_long, data.system)


def cohort_size(experiment: Experiment, sites: int) -> int:
    """How many clients take part in a round.

    Raises:
      UserError: more than there are sites.
    """
    size = experiment.federation.cohort
    if size is not None and size > sites:
        raise UserError(f"federation.cohort is {size}, but there are only {sites} sites")
    return sites if size is None else size
