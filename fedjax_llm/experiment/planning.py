"""From an experiment, its model and its text to the plan of its rounds."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm import mesh as meshes
from fedjax_llm import trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Experiment
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.protection import selected
from fedjax_llm.federation import release
from fedjax_llm.federation.clients import clients_of, local_training_of
from fedjax_llm.federation.local_work import weights
from fedjax_llm.federation.plan import RoundPlan, Secure, shapes_for
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.privacy.mechanism import Mechanism
from fedjax_llm.secure.ring import grid
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.secure.simulation import identities
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.types import Adapters, Aggregation, Stack

Train = tuple[tuple[str, Sequence[EncodedExample]], ...]
"""Training examples by site."""


def plan_of(
    experiment: Experiment,
    base: BaseModel,
    lora: Lora,
    frozen: Adapters,
    train: Train,
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
    plan = RoundPlan(
        setting=experiment.setting,
        trainer=trainer_of(
            replace(base.model, dropout=lora.dropout),
            lora.scaling,
            local,
            # Only where there is a server to stay close to.
            local.proximal if experiment.setting == "federated" else 0.0,
            mechanism,
            aggregation.client.gradient,
        )._replace(mesh=meshes.make(experiment.execution.mesh)),
        aggregation=aggregation,
        federation=experiment.federation,
        local=local,
        execution=experiment.execution,
        shapes=(),
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
    plan = plan._replace(shapes=shapes_for(plan))
    if experiment.secured is None:
        return plan
    return plan._replace(secure=secure_of(experiment.secured, experiment, plan), measure_error=False)


def check_terms(experiment: Experiment, sites: int) -> None:
    """Refuses secure aggregation whose terms the rounds of so many sites cannot meet."""
    if experiment.secured is not None:
        experiment.secured.make(selected(experiment, sites))


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


def secure_of(secure: SecAgg, experiment: Experiment, plan: RoundPlan) -> Secure:
    """Secure aggregation of a plan's rounds: the grid on which no sum of any cohort can overflow, and signing keys.

    Args:
      secure: how.
      experiment: with the cohort and the randomness.
      plan: of the rounds.

    Raises:
      UserError: weights leave no room for the numbers.
    """
    sites = len(plan.clients)
    clients = selected(experiment, sites)
    largest = np.sort(weights(plan, plan.clients, sites))[-clients:]
    return Secure(
        terms_of=secure.make,
        identities=identities([client.name for client in plan.clients]),
        grid=grid(secure.bound, clients, float(largest.sum())),
        fresh=experiment.privacy.randomness == "secret",
    )


def check_personal(experiment: Experiment, plan: RoundPlan, adapters: Adapters) -> None:
    """Refuses an algorithm with personal factors of which there are none here, or none but these."""
    own, shared = low_rank.partition(adapters, plan.aggregation.personal)
    if plan.aggregation.personal is not None and not (own and shared):
        kept = "all trained factors of the adapters" if own else "no trained factor of the adapters"
        raise UserError(
            f"{type(experiment.aggregation).__name__} would leave {kept} at the sites: change its fields, lora.layers "
            f"or lora.train, or choose {'the setting local' if own else 'FedAvg'}"
        )


def check_cohort(plan: RoundPlan, adapters: Adapters) -> None:
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


def cohort_size(experiment: Experiment, sites: int) -> int:
    """How many clients take part in a round.

    Raises:
      UserError: more than there are sites.
    """
    size = experiment.federation.cohort
    if size is not None and size > sites:
        raise UserError(f"federation.cohort is {size}, but there are only {sites} sites")
    return sites if size is None else size
