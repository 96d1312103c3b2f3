"""Federates a loss function of one's own: these rounds, algorithms and guarantees, without a language model.

    for params, report in federate(loss, params, clients, aggregation=FedAdam(), privacy=Privacy(DpSgd(), ...)):
        ...

``loss(params, example)`` is of one example; what vectorises it over examples and clients is here. Algorithms and
mechanisms are the objects that a language model's run takes, and the rounds go through the same functions: who takes
part, what is clipped, where noise comes in, what the server sees.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.errors import UserError
from fedjax_llm.federation import own_rounds
from fedjax_llm.federation.clients import Client, clients_of, local_training_of
from fedjax_llm.federation.own_rounds import Job, Loss, Report
from fedjax_llm.federation.plan import Execution, Federation, RoundPlan
from fedjax_llm.federation.release import template
from fedjax_llm.federation.sampling import attendance
from fedjax_llm.privacy import guarantee, noise
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import Mechanism, Population, Regime
from fedjax_llm.training.client_update import LocalTraining, Trainer
from fedjax_llm.types import Adapters, Aggregation, Aggregator, PyTree, Stack, Sum


def federate(
    loss: Loss,
    params: PyTree,
    clients: Mapping[str, PyTree],
    *,
    federation: Federation = Federation(),  # noqa: B008
    training: LocalTraining = LocalTraining(),  # noqa: B008
    aggregation: Aggregator = FedAvg(),  # noqa: B008
    privacy: Privacy = Privacy(),  # noqa: B008
    clients_per_chunk: int = 16,
    seed: int = 0,
) -> Iterator[tuple[PyTree, Report]]:
    """Trains parameters over clients, round by round.

    Everything is checked, and noise is calibrated, before this returns; a round is computed when it is asked for. One
    example is one record: the unit ``record`` hides an example, the unit ``site`` a client.

    Args:
      loss: ``loss(params, example) -> scalar``, pure and deterministic (no dropout, no batch statistics).
      params: what is trained: any pytree of floating-point arrays, such as Flax's ``model.init(...)``.
      clients: name -> a pytree of arrays [n, ...], whose leading axis counts the client's examples.
      federation: rounds, cohort and weighting.
      training: of a client in a round: optimiser, batch size, steps or epochs.
      aggregation: the server's algorithm; those that take LoRA factors apart are refused.
      privacy: mechanism, unit and target; by default none. A budget below the target ends the rounds early.
      clients_per_chunk: clients whose parameters are held at a time.
      seed: of everything random.

    Returns:
      An iterator over the rounds: (the server's parameters, what happened).

    Raises:
      UserError: data, loss or settings do not fit each other, or the mechanism cannot protect them.
    """
    structure, modules = _modules(params)
    names, data, sizes, first = _joined(clients)
    wrapped = _checked(_once(_own_loss, loss, structure), modules, data)
    algorithm = _algorithm(aggregation)
    cohort = _checked_cohort(federation, training, len(names))
    key, local = jax.random.key(seed), local_training_of("federated", training, cohort)
    mechanism = _mechanism(privacy, federation, local, algorithm, modules, names, sizes, key)
    plan = RoundPlan(
        setting="federated",
        trainer=_trainer(local, algorithm, mechanism),
        aggregation=algorithm,
        federation=federation,
        local=local,
        execution=Execution(clients_per_chunk=clients_per_chunk),
        shapes=(),
        clients=_clients(names, sizes, private=mechanism is not None),
        cohort=cohort,
        key=key,
        mechanism=mechanism,
    )
    _check_cohort(plan, modules)
    if mechanism is not None:
        run = _identity(wrapped, modules, data, repr((names, sizes, federation, training, aggregation, privacy)))
        plan = plan._replace(secret_key=noise.run_key(privacy.randomness, seed, run))
    job = Job(plan, wrapped, jax.tree.map(jnp.asarray, data), jnp.asarray(first, jnp.int32), privacy)
    return ((structure.restore(found), report) for found, report in own_rounds.rounds(job, modules))


class _Structure(NamedTuple):
    """How parameters are taken apart into modules, and put together again.

    Attributes:
      tree: of the parameters.
      places: of each leaf: module, and name within it.
    """

    tree: Any
    places: tuple[tuple[str, str], ...]

    def restore(self, modules: Adapters) -> PyTree:
        """The parameters of these modules."""
        return jax.tree.unflatten(self.tree, [modules[module][name] for module, name in self.places])


def _modules(params: PyTree) -> tuple[_Structure, Adapters]:
    """Parameters as module -> name -> array, which is what algorithms and clipping by layers know."""
    leaves, tree = jax.tree.flatten_with_path(params)
    if not leaves:
        raise UserError("params holds no array: there is nothing to train")
    modules: Adapters = {}
    places = []
    for path, leaf in leaves:
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(
                f"params{jax.tree_util.keystr(path)} is of type {array.dtype}: what is trained must be floating-point. "
                "Keep other values out of params, for instance as constants of the loss"
            )
        module, name = jax.tree_util.keystr(path[:-1]), jax.tree_util.keystr(path[-1:])
        modules.setdefault(module, {})[name] = array
        places.append((module, name))
    return _Structure(tree, tuple(places)), modules


def _joined(clients: Mapping[str, PyTree]) -> tuple[list[str], PyTree, list[int], np.ndarray]:
    """The clients' names, their examples one after another, how many each holds, and where they begin."""
    if not clients:
        raise UserError("clients is empty: give at least one, name -> arrays [examples, ...]")
    names, sizes = list(clients), []
    shapes: dict[str, Any] = {}
    for name, data in clients.items():
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(data)]
        lengths = {array.shape[0] if array.ndim else None for array in arrays}
        if len(lengths) != 1 or None in lengths or lengths == {0}:
            raise UserError(
                f"client {name!r} holds arrays of shapes {[array.shape for array in arrays]}; all of them must "
                "count the same examples along their first axis, at least one"
            )
        sizes.append(arrays[0].shape[0])
        shapes[name] = (jax.tree.structure(data), [(array.shape[1:], array.dtype) for array in arrays])
        if shapes[name] != shapes[names[0]]:
            raise UserError(
                f"the clients {names[0]!r} and {name!r} hold examples of different structure, shape or type: "
                f"{shapes[names[0]]} and {shapes[name]}"
            )
    joined = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *clients.values())
    return names, joined, sizes, np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _clients(names: list[str], sizes: list[int], private: bool) -> tuple[Client, ...]:
    """Clients whose examples are numbers, and units of one example each."""
    examples = cast(Any, [(name, range(size)) for name, size in zip(names, sizes, strict=True)])
    found = clients_of("federated", examples)
    units = [tuple((place,) for place in client.examples) if private else () for client in found]
    return tuple(replace(client, units=cast(Any, own)) for client, own in zip(found, units, strict=True))


@functools.lru_cache(maxsize=64)  # another call with the same loss then compiles nothing anew
def _own_loss(loss: Loss, structure: _Structure) -> Loss:
    """The loss as a function of modules."""
    return lambda modules, example: loss(structure.restore(modules), example)


def _checked(loss: Loss, modules: Adapters, data: PyTree) -> Loss:
    """The loss, if tracing it gives a number."""
    found = jax.eval_shape(loss, modules, jax.tree.map(lambda leaf: leaf[0], data))
    shapes = [leaf.shape for leaf in jax.tree.leaves(found)]
    if shapes != [()] or not jnp.issubdtype(jax.tree.leaves(found)[0].dtype, jnp.floating):
        raise UserError(
            f"loss(params, example) gives {found} for one example; it must be one floating-point number. The example "
            "has no batch axis: a model that wants one gets x[None], and the loss is the mean over it"
        )
    return loss


def _algorithm(aggregation: Aggregator) -> Aggregation:
    """The algorithm, if it is about parameters of any kind."""
    found, name = _once(_made, aggregation), type(aggregation).__name__
    for asked, why in {
        found.whole or found.residual is not None: "works on the products of LoRA factors",
        found.live is not None: "trains LoRA factors in turn",
        found.personal is not None: "leaves LoRA factors at the clients",
        found.own is not None: "trains parameters of each client's own besides",
    }.items():
        if asked:
            raise UserError(
                f"{name} {why}, which is for language models with adapters. Choose an aggregation of deltas (such as "
                "FedAvg, FedAdam, Scaffold or Krum)"
            )
    return found


def _once(cached: Any, *arguments: Any) -> Any:
    """What a cached function gives; where an argument cannot be hashed, without its cache."""
    try:
        hash(arguments)
    except TypeError:
        return cached.__wrapped__(*arguments)
    return cached(*arguments)


@functools.lru_cache(maxsize=64)
def _made(aggregation: Aggregator) -> Aggregation:
    """The algorithm, made once, so that what is compiled for it serves equal ones."""
    return aggregation.make()


def _checked_cohort(federation: Federation, training: LocalTraining, sites: int) -> int:
    """How many clients take part in a round; refuses settings that are for runs of language models alone."""
    if federation.cohort is not None and federation.cohort > sites:
        raise UserError(f"federation.cohort is {federation.cohort}, but there are only {sites} clients")
    for name in ("availability", "asynchronous"):
        if getattr(federation, name) is not None:
            raise UserError(f"federation.{name} is for runs of language models; set it to None")
    if federation.finetune_rounds:
        raise UserError(f"federation.finetune_rounds is {federation.finetune_rounds}; here it must be 0")
    if training.normalise != "example":
        raise UserError(f"training.normalise is {training.normalise!r}, but here are no tokens; set it to 'example'")
    return sites if federation.cohort is None else federation.cohort


def _mechanism(
    privacy: Privacy,
    federation: Federation,
    local: LocalTraining,
    algorithm: Aggregation,
    modules: Adapters,
    names: list[str],
    sizes: list[int],
    key: Array,
) -> Mechanism | None:
    """The mechanism with its noise, told what it must know of these rounds and clients."""
    if privacy.unit == "patient" and privacy.mechanism is not None:
        raise UserError(
            "privacy.unit is 'patient', but arrays do not tell whose an example is: choose 'record' (one example) or "
            "'site' (all of a client)"
        )
    optimizer, types = local.optimizer, {str(leaf.dtype) for leaf in jax.tree.leaves(modules)}
    regime = Regime(
        setting="federated",
        unit=privacy.unit,
        rounds=federation.rounds,
        cohort=federation.cohort,
        weighting=federation.weighting,
        batch_size=local.batch_size,
        local_steps=local.local_steps,
        local_epochs=local.local_epochs,
        normalise=local.normalise,
        optimizer=optimizer.name + (f" with {dict(optimizer.options)}" if optimizer.options else ""),
        learning_rate=optimizer.learning_rate,
        constant_rate=local.round_schedule.shape == local.local_schedule.shape == "constant",
        proximal=local.proximal,
        adapter_dtype=max(types, key=lambda name: name != "float32"),
        server_view="Sum" if algorithm.view is Sum else "Stack",
        messages="deltas" if algorithm.client.report is None else "other",
        probes=algorithm.client.probe,
    )
    fixed = None if privacy.draws_cohorts else federation.cohort
    present = attendance(key, federation.rounds, len(names), fixed)
    population = Population(
        sites=tuple(names),
        units=tuple(sizes) if privacy.unit == "record" else (1,) * len(names),
        participations=tuple(int(count) for count in present.sum(axis=0)),
        min_separation=tuple(_separation(column, federation.rounds) for column in present.T),
    )
    mechanism = guarantee.build(privacy, regime, population)
    if mechanism is not None and mechanism.correlated is not None and mechanism.correlated.cyclic > 1:
        raise UserError(
            "the mechanism's noise is amplified by groups of records that take turns, and which group a record belongs "
            "to goes by its name; examples in arrays have none. Set the noise's amplified to False"
        )
    return mechanism


def _separation(present: np.ndarray, rounds: int) -> int:
    """The least distance of two rounds in which a client is present; all rounds where there are no two."""
    numbers = np.flatnonzero(present)
    return int(np.diff(numbers).min()) if len(numbers) > 1 else rounds


def _trainer(local: LocalTraining, algorithm: Aggregation, mechanism: Mechanism | None) -> Trainer:
    """The static half of a local step, which reads no model."""
    trainer = Trainer(
        model=cast(Any, None),
        scaling=1.0,
        optimizer=local.optimizer.make(),
        proximal=local.proximal,
        correct=algorithm.client.gradient,
    )
    if mechanism is None:
        return trainer
    noisy = mechanism.noised == "steps"
    return trainer._replace(
        clip=mechanism.clip if mechanism.clipped == "gradients" else None,
        noisy=noisy,
        mix=mechanism.correlated.mix if noisy and mechanism.correlated is not None else None,
    )


def _check_cohort(plan: RoundPlan, modules: Adapters) -> None:
    """Traces the server's update on a whole cohort, where rules that need more clients refuse it."""
    if plan.aggregation.view is Stack:
        message = template(plan, modules)
        stack = jax.eval_shape(lambda one: Stack(trees.repeat(one, plan.cohort), jnp.ones(plan.cohort)), message)
        jax.eval_shape(plan.aggregation.update, stack, plan.aggregation.init(modules), modules)


def _identity(loss: Loss, modules: Adapters, data: PyTree, told: str) -> str:
    """A hash of all that decides what is released: runs that differ in any of it share no noise."""
    closed = jax.make_jaxpr(loss)(modules, jax.tree.map(lambda leaf: leaf[0], data))
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(closed)).encode())  # functions print with their addresses
    digest.update(told.encode())
    for leaf in jax.tree.leaves((modules, data, closed.consts)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
