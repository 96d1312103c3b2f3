"""Programs of a large model's round: on virtual devices they need what their arrays say, and send what they must."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from small_pod import (
    HEADS,
    INNER,
    KV_HEADS,
    LAYERS,
    NAME,
    VOCABULARY,
    WIDTH,
    devices,
    on_virtual_devices,
    small_experiment,
)

from fedjax_llm import mesh as meshes
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import pod
from fedjax_llm.experiment.collectives import in_rows
from fedjax_llm.experiment.pod import Pod, Program
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models.shapes import SHAPES
from fedjax_llm.training import client_update

LENGTH, ROWS, TARGETS = 8, 2, 8  # of a device


@pytest.fixture(scope="module", autouse=True)
def virtual() -> Iterator[None]:
    with on_virtual_devices():
        yield


@cache
def pod_at(layers: int | None = None, mesh: MeshShape = MeshShape(2, 4), dtype: str = "float32") -> Pod:  # noqa: B008
    return pod.pod_of(small_experiment(mesh, dtype), devices("v5e:2x4"), layers)


@cache
def programs(layers: int) -> list[Program]:
    return pod.compiled(pod_at(layers))


def adapter_bytes(layers: int) -> int:
    """Of one client: rank 1 on q."""
    return 4 * layers * (WIDTH + WIDTH)


def real_params(dtype: str) -> dict:
    """Zeros in the place of the weights."""
    shapes = pod._weights(pod_at().trainer.model, pod._mesh(pod_at()), jnp.dtype(dtype))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [MeshShape(2, 4), MeshShape(8, 1), MeshShape(1, 4, 2), MeshShape(1, 2, 2)])
def test_weights_take_what_placed_ones_take(dtype, mesh):
    one = pod_at(mesh=mesh, dtype=dtype)
    placed = meshes.place_params(one.trainer.model, pod._mesh(one), real_params(dtype))
    held = dict.fromkeys(pod._mesh(one).devices.flat, 0)
    for leaf in jax.tree.leaves(placed):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {pod.argument_bytes(one)["weights"]}


def test_clients_take_what_started_ones_take():
    one = pod_at()
    assert (one.slots, pod._mesh(one).shape["clients"]) == (8, 2)
    adapters = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one.adapters)
    adapters = meshes.place(one.trainer.mesh, adapters, meshes.CLIENTS)
    started = client_update.start(one.trainer, adapters)
    first = jax.devices("cpu")[0]
    shards = [shard for leaf in jax.tree.leaves((started, adapters)) for shard in leaf.addressable_shards]
    expected = sum(shard.data.nbytes for shard in shards if shard.device == first)
    assert pod.argument_bytes(one)["clients"] == expected
    # The start, where it is, two moments of Adam with a counter, a sum of gradients, and one of losses.
    assert expected == 4 * (5 * adapter_bytes(LAYERS) + 4 + 4)


def test_more_clients_than_groups_are_dealt_out():
    for clients, slots in ((1, 2), (2, 2), (3, 4), (8, 8)):
        experiment = small_experiment(clients_per_chunk=clients)
        assert pod.pod_of(experiment, devices("v5e:2x4")).slots == slots


@pytest.mark.parametrize("layers", [1, 2])
def test_arguments_of_compiled_programs_are_those_bytes(layers):
    held, (gradients, step, end) = pod.argument_bytes(pod_at(layers)), programs(layers)
    clients, own = 4, adapter_bytes(layers)
    # A row's tokens and client, a target's row, position, token and weight; nothing else is used.
    rows = 4 * (ROWS * LENGTH + ROWS + 4 * TARGETS)
    assert gradients.arguments == held["weights"] + clients * (2 * own + 4) + rows
    # Besides the states: whether it is finished, three numbers, a key and the noise's scale. The start is not needed.
    assert step.arguments == held["clients"] - clients * own + clients * (1 + 3 * 4 + 8 + 4)
    assert end.arguments == clients * (2 * own + 4) + own
    for program, least in ((gradients, clients * own), (step, clients * 4 * own), (end, own)):
        assert program.temporaries >= least
        assert program.accessed > program.arguments


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_gather_weights_and_sum_adapters_over_fsdp_alone(layers):
    gradients, _, _ = programs(layers)
    assert {one.axes for one in gradients.exchanges} == {("fsdp",)}
    (gathered, summed) = sorted(in_rows(gradients.exchanges))
    head, kv = WIDTH // HEADS, KV_HEADS * WIDTH // HEADS
    layer = WIDTH * (HEADS * head + 2 * kv) + HEADS * head * WIDTH + 3 * WIDTH * INNER
    # Embeddings and output layer are gathered once, layers twice, unless the CPU's compiler keeps what it has.
    expected = {4 * (times * layers * layer + 2 * VOCABULARY * WIDTH): 7 * times * layers + 2 for times in (1, 2)}
    kind, axes, count, size = gathered
    assert (kind, axes, count) == ("all-gather", "fsdp", expected[size])
    assert summed == ("all-reduce", "fsdp", 1, 4 * (adapter_bytes(layers) + 4))


@pytest.mark.parametrize("layers", [1, 2])
def test_only_a_sum_of_adapters_travels_over_clients(layers):
    _, step, end = programs(layers)
    assert not step.exchanges
    ((kind, axes, count, size),) = in_rows(end.exchanges)
    assert (kind, count) == ("all-reduce", 1)
    assert "clients" in axes
    assert adapter_bytes(layers) <= size <= adapter_bytes(layers) + 16  # and a sum of weights


def by_hand(layers: int, remat: str) -> float:
    """Operations of the products with base weights, matrix by matrix."""
    head = WIDTH // HEADS
    sizes = [(WIDTH, HEADS * head), *[(WIDTH, KV_HEADS * head)] * 2, (HEADS * head, WIDTH)]
    sizes += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    passes = 3 if remat == "blocks" else 2  # forward, perhaps again, and backward to what went in
    total = 0
    for one, other in sizes * layers:
        total += passes * (2 * one * other) * ROWS * LENGTH
    return total + 2 * (2 * WIDTH * VOCABULARY) * TARGETS


@pytest.mark.parametrize("remat", ["none", "matmuls", "blocks"])
@pytest.mark.parametrize("layers", [1, 3])
def test_operations_are_those_of_a_count_by_hand(layers, remat):
    one = pod.pod_of(small_experiment(remat=remat), devices("v5e:2x4"), layers)
    assert pod.training_flops(one) == by_hand(layers, remat)


@pytest.mark.parametrize("mesh", [MeshShape(1, 4, 2), MeshShape(4, 1, 2)])
def test_tensor_parallel_chips_share_a_rows_operations(mesh):
    assert pod.training_flops(pod_at(mesh=mesh)) == by_hand(LAYERS, "blocks") / 2


def test_a_layer_more_has_the_operations_that_the_compiler_counts():
    counts = [pod._gradients(pod_at(layers)).compile().cost_analysis()["flops"] for layers in (1, 2)]
    layer = by_hand(2, "blocks") - by_hand(1, "blocks")
    assert layer <= counts[1] - counts[0] <= 1.2 * layer  # attention, adapters and norms besides


def test_lengths_and_microbatches_need_not_be_round():
    experiment = small_experiment()
    experiment = replace(experiment, data=replace(experiment.data, max_length=9))
    for tokens, rows in ((1, 1), (17, 1), (27, 3)):
        execution = replace(experiment.execution, tokens_per_microbatch=tokens)
        one = pod.pod_of(replace(experiment, execution=execution), devices("v5e:2x4"))
        assert one.rows.tokens.shape == (8 * rows, 9)
        for leaf in jax.tree.leaves(one.rows):
            assert leaf.sharding.shard_shape(leaf.shape)[0] * 8 == leaf.shape[0]


def test_fewer_layers_are_the_same_model_but_for_its_depth():
    whole, short = pod_at(), pod_at(1)
    assert len(whole.params["layers"]) == LAYERS
    assert jax.tree.structure(short.params["layers"]) == jax.tree.structure(whole.params["layers"][:1])
    assert {**short.params, "layers": ()} == {**whole.params, "layers": ()}


# What does not fit is told.


def test_chips_are_dealt_out():
    experiment = small_experiment(MeshShape(1, 2, 2))
    assert pod.on(experiment, 16).execution.mesh == MeshShape(4, 2, 2)
    assert pod.on(experiment, 16, fsdp=8).execution.mesh == MeshShape(1, 8, 2)
    with pytest.raises(UserError, match=r"8 chips cannot be dealt out.*fsdp x tensor is 6; choose a divisor"):
        pod.on(experiment, 8, fsdp=3)


def test_a_model_of_unknown_shape_is_named_with_those_near():
    experiment = small_experiment()
    unknown = replace(experiment, model=replace(experiment.model, name="meta-llama/Llama-3.1-9B"))
    with pytest.raises(UserError, match=r"Llama-3.1-9B' is not known; did you mean 'meta-llama/Llama-3.1-8B'"):
        pod.model_of(unknown)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshShape(), "more than one device"),
        (MeshShape(4, 4), "16 devices, but there are 8"),
        (MeshShape(1, 3), "does not divide the 32"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        pod.pod_of(small_experiment(mesh), devices("v5e:2x4"))


PARAMETERS = {
    "smollm2-135m-instruct": 134_515_008,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}
"""As their publishers count them."""


def test_well_known_models_have_as_many_parameters_as_is_known():
    counted = {}
    for name in PARAMETERS:
        experiment = small_experiment(MeshShape(1, 4))
        experiment = replace(experiment, model=replace(experiment.model, name=name, dtype="bfloat16"))
        one = pod.pod_of(experiment, devices("v5e:2x2"))
        counted[name] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(one.params))
        assert counted[name] / 2 <= pod.argument_bytes(one)["weights"] < 1.001 * counted[name] / 2
    assert counted == PARAMETERS
    assert set(PARAMETERS) == set(SHAPES) - {NAME}
