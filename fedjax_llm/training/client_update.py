"""One round of local training, for all clients of a chunk at once.

Local state is stacked over client slots [C]. A microbatch adds its rows' gradients to their clients' sums; when a
client's step is complete, its optimiser takes a step with the mean, and the others stand still. Under differential
privacy each unit's gradient is clipped on its way into the sum, and noise may be added to the sum before the step.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_llm import lora as low_rank
from fedjax_llm import mesh as meshes
from fedjax_llm import trees
from fedjax_llm.data.packing import Microbatch
from fedjax_llm.errors import UserError
from fedjax_llm.models import sharding
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.privacy import noise as noises
from fedjax_llm.privacy.clipping import Clip, clip_units
from fedjax_llm.training.optimizers import Optimizer, Schedule
from fedjax_llm.training.rows import Rows, example_gradients, rows_of
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Local, Params, PyTree


@dataclass(frozen=True)
class LocalTraining:
    """What a client does with the server's adapters in a round.

    Attributes:
      batch_size: examples a step.
      local_steps: optimiser steps a round; or
      local_epochs: passes over the client's data a round, which replaces ``local_steps``.
      optimizer: of the client.
      local_schedule: of the learning rate over a round's steps.
      round_schedule: of the learning rate over the rounds.
      proximal: FedProx's mu (Li et al. 2020, arXiv 1812.06127): the loss has ``mu / 2 |theta - theta_server|^2`` added.
      normalise: whether every ``example`` of a batch weighs alike, or every target ``token``.
      keep_optimizer: whether a client's optimiser state lasts over rounds (``auto``: only where the client is the same
        in every round, that is in the settings centralised and local).
    """

    batch_size: int = 8
    local_steps: int = 1
    local_epochs: int | None = None
    optimizer: Optimizer = Optimizer()
    local_schedule: Schedule = Schedule()
    round_schedule: Schedule = Schedule()
    proximal: float = 0.0
    normalise: Literal["example", "token"] = "example"
    keep_optimizer: Literal["auto", "yes", "no"] = "auto"

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("batch_size", "local_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        if self.local_epochs is not None and self.local_epochs < 1:
            raise UserError(f"training.local_epochs is {self.local_epochs}; it must be at least 1")
        if self.proximal < 0:
            raise UserError(f"training.proximal is {self.proximal}; it must not be negative")


class LocalState(NamedTuple):
    """Clients in the middle of a round. All leaves are [C, ...].

    Attributes:
      adapters: the clients' own.
      optimizer: the states of their optimisers.
      gradients: sums over the rows of the open step so far.
      loss: sums of the row losses so far.
      noise: state of the noise's correlation over the steps; empty where it is independent.
    """

    adapters: PyTree
    optimizer: PyTree
    gradients: PyTree
    loss: Array
    noise: PyTree = ()


class Trainer(NamedTuple):
    """The static half of local training: hashable, so that ``jit`` compiles once for it and every shape.

    Attributes:
      model: the frozen model, with its dropout rate.
      scaling: alpha / rank.
      optimizer: the optax transformation.
      proximal: FedProx's mu.
      clip: of each unit's gradient; ``None``: not clipped.
      grouped: whether a unit may have several rows in a microbatch.
      noisy: whether noise is added to each step's sum.
      mix: ``mix(noise, state) -> (noise, state)`` correlates a step's noise with that of the steps before; ``None``:
        independent noise.
      correct: ``correct(gradient, adapters, local) -> gradient`` changes a client's mean gradient of a step
        (``ClientRule.gradient``); ``None``: it stays.
      mesh: of devices, over which the clients and the weights are spread; ``None``: one device.
    """

    model: CausalLM
    scaling: float
    optimizer: optax.GradientTransformation
    proximal: float = 0.0
    clip: Clip | None = None
    grouped: bool = False
    noisy: bool = False
    mix: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    correct: Callable[[PyTree, PyTree, Local], PyTree] | None = None
    mesh: Mesh | None = None


class Secrets(NamedTuple):
    """What only the sites know of a round.

    Attributes:
      keys: typed keys [C] of each client's noise in this round.
      stddev: f32 [C], the standard deviation of the noise on each step's sum.
    """

    keys: Array
    stddev: Array


def start(trainer: Trainer, adapters: PyTree, optimizer: PyTree | None = None, noise: PyTree = ()) -> LocalState:
    """Clients at the beginning of a round.

    Args:
      trainer: the static half.
      adapters: what each client starts from, leaves [C, ...].
      optimizer: the clients' optimiser states [C, ...]; ``None`` makes fresh ones.
      noise: the states of their correlated noise [C, ...], which last over the rounds.
    """
    if optimizer is None:
        optimizer = _fresh(trainer.optimizer.init, adapters)
    clients = jax.tree.leaves(adapters)[0].shape[0]
    state = LocalState(adapters, optimizer, trees.zeros(adapters), jnp.zeros(clients), noise)
    return meshes.place(trainer.mesh, state, meshes.CLIENTS)


@partial(jax.jit, static_argnums=0)
def _fresh(init: Callable[[PyTree], PyTree], adapters: PyTree) -> PyTree:
    """Optimiser states [C, ...]."""
    return jax.vmap(init)(adapters)


def run(
    trainer: Trainer,
    params: Params,
    state: LocalState,
    microbatches: Iterable[Microbatch],
    client_keys: Array,
    learning_rates: np.ndarray,
    frozen: Adapters | None = None,
    secrets: Secrets | None = None,
    trunk: TrunkCache | None = None,
    *,
    local: Local | None = None,
    live: Mapping[str, float] | None = None,
) -> LocalState:
    """Runs a round's microbatches in order.

    Args:
      trainer: the static half.
      params: the frozen weights.
      state: from :func:`start`.
      microbatches: from ``data.packing.pack``, in as many bins as the mesh has places for rows.
      client_keys: typed keys [C] of this round.
      learning_rates: [C, S] factors of the base learning rate, for every client and local step.
      frozen: factors that are not trained, leaves [...].
      secrets: of the noise, where ``trainer.noisy``.
      trunk: the hidden states below the adapters, where they are kept.
      local: what the clients know, leaves [C, ...]; of ``start`` FedProx stays near. Without it, the adapters of
        ``state`` and nothing else.
      live: factor -> 1 if it is trained, else 0; ``None``: all are.
    """
    if local is None:
        local = Local(state.adapters, (), (), jnp.zeros(client_keys.shape[0], jnp.int32))
    on = None if live is None else {name: jnp.float32(value) for name, value in live.items()}
    for batch in microbatches:
        state = accumulate(trainer, params, state, rows_of(batch, trunk), client_keys, frozen, on)
        if batch.finished.any():
            rates = learning_rates[np.arange(len(batch.finished)), batch.finished_step].astype(np.float32)
            steps = (batch.finished, batch.denominator, rates)
            state = step(trainer, state, local, *steps, batch.finished_step, secrets, on)
    return state


def probe(
    trainer: Trainer,
    params: Params,
    adapters: PyTree,
    microbatches: Iterable[Microbatch],
    client_keys: Array,
    frozen: Adapters | None = None,
    trunk: TrunkCache | None = None,
) -> tuple[Array, PyTree]:
    """Loss and gradient where the clients stand, without a step.

    Args:
      trainer: the static half.
      params: the frozen weights.
      adapters: leaves [C, ...].
      microbatches: one step of each client, from ``data.packing.pack``.
      client_keys: typed keys [C].
      frozen: factors that are not trained.
      trunk: the hidden states below the adapters.

    Returns:
      (f32 [C], leaves [C, ...] in f32): means over the clients' units of loss and gradient; zero where there are none.
    """
    state = start(trainer, adapters, optimizer=())
    divide = np.ones(client_keys.shape[0], np.float32)
    for batch in microbatches:
        state = accumulate(trainer, params, state, rows_of(batch, trunk), client_keys, frozen)
        divide = np.where(batch.finished, batch.denominator, divide)
    return state.loss / divide, jax.tree.map(lambda g: jax.vmap(jnp.divide)(g, jnp.asarray(divide)), state.gradients)


def accumulate(
    trainer: Trainer,
    params: Params,
    state: LocalState,
    rows: Rows,
    client_keys: Array,
    frozen: Adapters | None = None,
    live: Mapping[str, Array] | None = None,
) -> LocalState:
    """Adds the (clipped) gradients and the losses of a microbatch to its clients' sums."""
    rows = meshes.place(trainer.mesh, rows, meshes.ROWS)
    gradients, loss = _accumulate(*_arguments(trainer, params, state, rows, client_keys, frozen, live))
    return state._replace(gradients=gradients, loss=loss)


def lower(trainer: Trainer, params: Params, state: LocalState, rows: Rows, client_keys: Array) -> jax.stages.Lowered:
    """:func:`accumulate` of shapes instead of arrays, for compiling ahead of time."""
    return _accumulate.lower(*_arguments(trainer, params, state, rows, client_keys, None, None))


def _arguments(trainer, params, state, rows, client_keys, frozen, live) -> tuple:
    """Of :func:`_accumulate`: what is static, then arrays."""
    static = (trainer.model, trainer.scaling, trainer.clip, trainer.grouped, trainer.mesh)
    return (*static, params, state.adapters, frozen or {}, (state.gradients, state.loss), rows, client_keys, live)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _accumulate(
    model: CausalLM,
    scaling: float,
    clip: Clip | None,
    grouped: bool,
    mesh: Mesh | None,
    params: Params,
    adapters: PyTree,
    frozen: PyTree,
    sums: PyTree,
    rows: Rows,
    client_keys: Array,
    live: PyTree = None,
) -> PyTree:
    """The new sums of (gradients, losses). It knows no optimiser, so that another one compiles no new backward pass."""
    if mesh is None:
        added = _summed(model, scaling, clip, grouped, params, adapters, frozen, rows, client_keys, live)
    else:
        added = _summed_on(mesh, model, scaling, clip, grouped, params, adapters, frozen, rows, client_keys, live)
    total = jax.tree.map(jnp.add, sums, added)
    # However the compiler would cut them: the next microbatch then finds what this one was compiled for.
    return total if mesh is None else jax.lax.with_sharding_constraint(total, NamedSharding(mesh, meshes.CLIENTS))


def _summed_on(mesh, model, scaling, clip, grouped, params, adapters, frozen, rows, client_keys, live) -> PyTree:
    """:func:`_summed`, by each device for the rows of its bin; what travels are weights, and sums of its group."""
    spread, everywhere = mesh.shape["fsdp"] > 1, PartitionSpec()

    def one_device(params, adapters, frozen, rows, client_keys, live):
        rows = rows._replace(client=rows.client % client_keys.shape[0])  # slots of this group, in equal parts
        own = model
        if spread:
            own = replace(model, gathered_over="fsdp")
            params = sharding.gather_outer(model.family, model.config, params, "fsdp")
        summed = _summed(own, scaling, clip, grouped, params, adapters, frozen, rows, client_keys, live)
        return jax.lax.psum(summed, "fsdp") if spread else summed

    specs = (meshes.manual_specs(model, mesh), meshes.CLIENTS, everywhere, meshes.ROWS, meshes.CLIENTS, everywhere)
    axes = {"axis_names": {"clients", "fsdp"}, "check_vma": False}
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=meshes.CLIENTS, **axes)
    return mapped(params, adapters, frozen, rows, client_keys, live)


def _summed(model, scaling, clip, grouped, params, adapters, frozen, rows, client_keys, live) -> PyTree:
    """What a microbatch adds to its clients' sums of (gradients, losses), leaves [C, ...]."""
    losses, gradients = example_gradients(model, scaling, params, adapters, rows, client_keys, frozen)
    clients, owner = client_keys.shape[0], rows.client
    if live is not None:  # before clipping: what is not trained takes no room under the clip norm
        gradients = low_rank.masked(gradients, live)
    if clip is not None:
        if grouped:
            gradients = trees.segment_sum(gradients, rows.unit, rows.unit.shape[0])
            owner = jax.ops.segment_max(rows.client, rows.unit, rows.unit.shape[0])
            owner = jnp.clip(owner, 0)  # numbers without rows: their sums are zero
        gradients = clip_units(gradients, clip)
    return trees.segment_sum(gradients, owner, clients), trees.segment_sum(losses, rows.client, clients)


@partial(jax.jit, static_argnums=0)
def step(
    trainer: Trainer,
    state: LocalState,
    local: Local,
    finished: Array,
    denominator: Array,
    rates: Array,
    number: Array | None = None,
    secrets: Secrets | None = None,
    live: Mapping[str, Array] | None = None,
) -> LocalState:
    """One optimiser step of the clients that are ``finished`` [C] with a batch; the others stay as they are.

    Args:
      trainer: the static half.
      state: with the summed gradients.
      local: what the clients know, leaves [C, ...].
      finished: bool [C].
      denominator: f32 [C], what the (noised) sums are divided by.
      rates: f32 [C], factors of the base learning rate.
      number: int32 [C], which step of the round that is; needed where ``trainer.noisy``, as are
      secrets: of the noise.
      live: factor -> 1 if it is trained, else 0; ``None``: all are.
    """

    def one(adapters, optimizer, gradients, local, denominator, rate):
        mean = jax.tree.map(lambda g, a: (g / denominator).astype(a.dtype), gradients, adapters)
        if trainer.proximal:
            mean = jax.tree.map(lambda g, a, o: g + trainer.proximal * (a - o), mean, adapters, local.start)
        if trainer.correct is not None:
            corrected = trainer.correct(mean, adapters, local)
            mean = jax.tree.map(lambda g, a: g.astype(a.dtype), corrected, adapters)
        updates, optimizer = trainer.optimizer.update(mean, optimizer, adapters)
        updates = jax.tree.map(lambda u: (u * rate).astype(u.dtype), updates)
        if live is not None:
            updates = low_rank.masked(updates, live)
        return optax.apply_updates(adapters, updates), optimizer

    gradients, mixed = _noised(trainer, state, number, secrets)
    if live is not None:  # an optimiser that lasts must not gather noise for factors that rest
        gradients = low_rank.masked(gradients, live)
    adapters, optimizer = jax.vmap(one)(state.adapters, state.optimizer, gradients, local, denominator, rates)
    zeros = jax.tree.map(jnp.zeros_like, state.gradients)
    return LocalState(
        adapters=trees.select(finished, adapters, state.adapters),
        optimizer=trees.select(finished, optimizer, state.optimizer),
        gradients=trees.select(finished, zeros, state.gradients),
        loss=state.loss,
        noise=trees.select(finished, mixed, state.noise),
    )


def _noised(
    trainer: Trainer, state: LocalState, number: Array | None, secrets: Secrets | None
) -> tuple[PyTree, PyTree]:
    """The clients' sums with the noise of their step ``number`` [C], and the states of the noise after it."""
    if not trainer.noisy:
        return state.gradients, state.noise
    assert secrets is not None, "a noisy trainer needs keys"
    assert number is not None, "a noisy trainer needs the steps' numbers"
    keys = jax.vmap(noises.step_key)(secrets.keys, number)
    noise = jax.vmap(noises.gaussian)(keys, state.gradients, secrets.stddev)
    mixed = state.noise
    if trainer.mix is not None:
        noise, mixed = jax.vmap(trainer.mix)(noise, mixed)
    return jax.tree.map(jnp.add, state.gradients, noise), mixed
