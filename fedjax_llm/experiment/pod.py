"""A private federated round of a large model, compiled ahead of time for devices that are not there.

The programs are those that a run would run: the gradients of a microbatch, the clients' optimiser step with its noise,
and the sum over clients with the server's step. Weights, adapters and rows are shapes only, so no memory is needed but
the compiler's own.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_llm import lora as low_rank
from fedjax_llm import mesh as meshes
from fedjax_llm import trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Experiment, regime_of
from fedjax_llm.errors import UserError, nearest
from fedjax_llm.experiment import synthetic
from fedjax_llm.experiment.collectives import Collective, collectives
from fedjax_llm.experiment.planning import trainer_of
from fedjax_llm.federation import release
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models import sharding
from fedjax_llm.models.causal_lm import CausalLM, layer_weights
from fedjax_llm.models.family import family_of, weight_tree
from fedjax_llm.models.shapes import SHAPES
from fedjax_llm.privacy import guarantee
from fedjax_llm.privacy.mechanism import Population
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalState, Secrets, Trainer
from fedjax_llm.training.rows import Rows
from fedjax_llm.types import Local, Params, PyTree

_EVERYWHERE = PartitionSpec()


class Pod(NamedTuple):
    """What is compiled: shapes that tell where they lie.

    Attributes:
      trainer: the static half of local training, mesh included.
      params: the base weights.
      adapters: of the clients, leaves [C, ...].
      rows: a microbatch.
      slots: C, over all devices.
    """

    trainer: Trainer
    params: Params
    adapters: PyTree
    rows: Rows
    slots: int


@dataclass(frozen=True)
class Program:
    """A compiled program, in bytes and operations of one device.

    Attributes:
      name: what it does.
      arguments: bytes of its inputs.
      temporaries: bytes that it needs besides, at its peak, results included.
      exchanges: what devices send each other.
      accessed: bytes of memory that are read and written, as the compiler counts.
      seconds: that compiling took.
    """

    name: str
    arguments: int
    temporaries: int
    exchanges: Counter[Collective]
    accessed: float
    seconds: float


def model_of(experiment: Experiment, layers: int | None = None) -> CausalLM:
    """The model of an experiment by its shape alone; with only the first of its layers, if so asked.

    Raises:
      UserError: its shape is not known.
    """
    name = experiment.model.name
    if name not in SHAPES:
        raise UserError(f"the shape of the model {name!r} is not known{nearest(name, SHAPES)}; see models/shapes.py")
    raw = SHAPES[name]
    family = family_of(raw)
    config = family.config_from_hf(raw if layers is None else {**raw, "num_hidden_layers": layers})
    return CausalLM(family, config, experiment.lora.dropout, experiment.execution.remat)


def pod_of(experiment: Experiment, devices: Any, layers: int | None = None) -> Pod:
    """The shapes of an experiment on a mesh of given devices.

    Args:
      experiment: ``execution.mesh`` says how devices are laid out, ``execution.tokens_per_microbatch`` and
        ``data.max_length`` how many rows one of them holds. Half of a row's positions are targets.
      devices: at least as many as the mesh has.
      layers: of the model; ``None``: all.

    Raises:
      UserError: the mesh does not fit the model or the devices, or the mechanism refuses.
    """
    if experiment.model.quantise != "none":
        raise UserError("slices are planned for bf16 or f32 weights; set model.quantise to 'none'")
    shape, execution, model = experiment.execution.mesh, experiment.execution, model_of(experiment, layers)
    meshes.check_fits(model, shape)
    if shape.size == 1:
        raise UserError("a pod has more than one device; set execution.mesh, or --topology")
    mesh = meshes.make(shape, devices)
    assert mesh is not None
    slots = meshes.slots(shape, execution.clients_per_chunk)
    population = Population(tuple(f"site-{c}" for c in range(slots)), (1000,) * slots, (1,) * slots, (1,) * slots)
    mechanism = guarantee.build(experiment.privacy, regime_of(experiment), population)
    trainer = trainer_of(model, experiment.lora.scaling, experiment.training, 0.0, mechanism)._replace(mesh=mesh)
    fresh = functools.partial(low_rank.init, jax.random.key(0), experiment.lora, model)
    adapters = jax.eval_shape(lambda: trees.repeat(fresh(), slots))
    adapters = _placed(mesh, adapters, meshes.CLIENTS)
    params = _weights(model, mesh, jnp.dtype(experiment.model.dtype))
    length = experiment.data.max_length
    rows, bins = max(1, execution.tokens_per_microbatch // length), shape.bins.count
    return Pod(trainer, params, adapters, _rows(mesh, rows * bins, length, rows * length // 2 * bins), slots)


def compiled(pod: Pod, options: Mapping[str, str] | None = None) -> list[Program]:
    """The programs of a round, compiled; ``options`` of the compiler are for the first, which is the large one."""
    return [_compiled("gradients of a microbatch", _gradients(pod), pod, options), *compiled_ends(pod)]


def compiled_ends(pod: Pod) -> list[Program]:
    """Of these, what runs once a local step and once a round."""
    return [_compiled("local step", _local_step(pod), pod), _compiled("end of a round", _round_end(pod), pod)]


def argument_bytes(pod: Pod) -> dict[str, int]:
    """Bytes that one device holds while it trains: its part of the weights; its clients' states, and their start."""
    return {"weights": _held(pod.params), "clients": _held((_started(pod), pod.adapters))}


def _held(tree: PyTree) -> int:
    """Bytes of a tree's parts on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def training_flops(pod: Pod) -> float:
    """Operations of a microbatch on one device: as a run's, and what is computed again."""
    model, positions = pod.trainer.model, math.prod(pod.rows.tokens.shape)
    total = synthetic.training_flops(model, positions, pod.rows.target_row.shape[0])
    # Whole blocks that are computed again are one more forward pass of the layers.
    again = 2.0 * layer_weights(model) * positions if model.remat == "blocks" else 0.0
    return (total + again) / _mesh(pod).size


def _mesh(pod: Pod) -> Mesh:
    """Its devices."""
    assert pod.trainer.mesh is not None
    return pod.trainer.mesh


def _weights(model: CausalLM, mesh: Mesh, dtype: Any) -> Params:
    """The shapes of the base weights, and where their parts lie."""
    sizes = weight_tree(model.family, model.config, lambda one, _: jax.ShapeDtypeStruct(sharding.size_of(one), dtype))
    places = meshes.param_shardings(model, mesh)
    return jax.tree.map(lambda one, at: jax.ShapeDtypeStruct(one.shape, dtype, sharding=at), sizes, places)


def _rows(mesh: Mesh, rows: int, length: int, targets: int) -> Rows:
    """The shapes of a microbatch."""

    def of(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, meshes.ROWS))

    return Rows(
        tokens=of(rows, length),
        client=of(rows),
        step=of(rows),
        index=of(rows),
        unit=of(rows),
        target_row=of(targets),
        target_position=of(targets),
        target_token=of(targets),
        target_weight=of(targets, dtype=jnp.float32),
    )


def _placed(mesh: Mesh, tree: PyTree, spec: PartitionSpec) -> PyTree:
    """Shapes, with where they lie."""
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def _keys(pod: Pod) -> Any:
    """A key for each client."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), pod.slots))
    return _placed(_mesh(pod), keys, meshes.CLIENTS)


def _started(pod: Pod) -> LocalState:
    """The clients at the beginning of a round."""
    state = jax.eval_shape(lambda a: client_update.start(pod.trainer, a), pod.adapters)
    return _placed(_mesh(pod), state, meshes.CLIENTS)


def _gradients(pod: Pod) -> Any:
    """The lowered gradients of a microbatch."""
    state = _started(pod)
    return client_update.lower(pod.trainer, pod.params, state, pod.rows, _keys(pod))


def _of_clients(pod: Pod, dtype: Any) -> Any:
    """A number for each client, [C]."""
    return _placed(_mesh(pod), jax.ShapeDtypeStruct((pod.slots,), dtype), meshes.CLIENTS)


def _local(pod: Pod) -> Local:
    """What clients know while they train."""
    return Local(pod.adapters, (), (), _of_clients(pod, jnp.int32))


def _local_step(pod: Pod) -> Any:
    """The lowered optimiser step of all clients."""
    numbers, whole = _of_clients(pod, jnp.float32), _of_clients(pod, jnp.int32)
    finished = _of_clients(pod, jnp.bool_)
    secrets = Secrets(_keys(pod), numbers) if pod.trainer.noisy else None
    arguments = (_started(pod), _local(pod), finished, numbers, numbers, whole, secrets, None)
    return client_update.step.lower(pod.trainer, *arguments)


def _round_end(pod: Pod) -> Any:
    """The lowered sum over clients, and the server's step."""
    algorithm = FedAvg().make()
    server = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), pod.adapters)

    def end(ended: PyTree, start: PyTree, weights: Any, adapters: PyTree) -> PyTree:
        deltas = jax.tree.map(jnp.subtract, ended, start)
        view = release.join(None, algorithm.view, deltas, weights, pod.slots)
        return algorithm.update(view, algorithm.init(adapters), adapters)[0]

    place = NamedSharding(_mesh(pod), _EVERYWHERE)
    numbers, whole = _of_clients(pod, jnp.float32), _placed(_mesh(pod), server, _EVERYWHERE)
    return jax.jit(end, out_shardings=place).lower(pod.adapters, pod.adapters, numbers, whole)


def _compiled(name: str, lowered: Any, pod: Pod, options: Mapping[str, str] | None = None) -> Program:
    """Compiles a program, and reads what there is to know of it."""
    began = time.perf_counter()
    program = lowered.compile(compiler_options=dict(options) if options else None)
    memory, cost = program.memory_analysis(), program.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        exchanges=collectives(program.as_text(), _mesh(pod)),
        accessed=float(cost.get("bytes accessed", 0.0)),
        seconds=time.perf_counter() - began,
    )


def on(experiment: Experiment, chips: int, fsdp: int | None = None) -> Experiment:
    """The experiment on so many chips: as many groups of clients as there is room for beside the model's axes.

    Raises:
      UserError: the chips are no multiple of what the model takes.
    """
    shape = experiment.execution.mesh
    parts = (fsdp or shape.fsdp) * shape.tensor
    if chips % parts:
        raise UserError(f"{chips} chips cannot be dealt out: execution.mesh.fsdp x tensor is {parts}; choose a divisor")
    mesh = MeshShape(chips // parts, fsdp or shape.fsdp, shape.tensor)
    return replace(experiment, execution=replace(experiment.execution, mesh=mesh))
