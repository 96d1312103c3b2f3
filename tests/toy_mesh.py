"""Toy plans moved onto a mesh of virtual CPU devices, and how far apart what came of two runs is."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fedjax_llm import mesh as meshes
from fedjax_llm.data.packing import Shape
from fedjax_llm.federation.plan import RoundPlan, RoundReport
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.types import Adapters, Params, RoundState

CUBE = MeshShape(2, 2, 2)
ROUNDING = 1e-5
"""By how much sums of f32 in another order may differ after the toy rounds; every mutation does more."""
COUNTED = ("name", "tokens", "examples", "included", "download_bytes", "upload_bytes", "rank", "staleness")
Played = tuple[RoundState, list[RoundReport]]


_PLACED: dict[tuple[int, MeshShape], tuple[Params, Params]] = {}
"""Weights on a mesh by those of one device, which are held too, so that their ``id`` stays theirs."""


def placed(model: CausalLM, params: Params, shape: MeshShape) -> Params:
    """The weights on a mesh of this shape, always the same arrays."""
    mesh, key = meshes.make(shape), (id(params), shape)
    if mesh is None:
        return params
    if key not in _PLACED:
        _PLACED[key] = (params, meshes.place_params(model, mesh, params))
    return _PLACED[key][1]


def on_mesh(plan: RoundPlan, shape: MeshShape = CUBE) -> RoundPlan:
    """The plan as an experiment with ``execution.mesh`` makes it: a bin for each device that holds rows."""
    bins = shape.bins.count
    return plan._replace(
        trainer=plan.trainer._replace(mesh=meshes.make(shape)),
        execution=replace(plan.execution, mesh=shape, clients_per_chunk=4),
        shapes=tuple(Shape(one.rows * bins, one.length, one.targets * bins) for one in plan.shapes),
    )


def play_from(plan: RoundPlan, params: Params, adapters: Adapters, rounds: int = 2, attempt: int = 0) -> Played:
    """Plays rounds, with the weights where the plan wants them."""
    params = placed(plan.trainer.model, params, plan.execution.mesh)
    state, reports = initial_state(plan, adapters), []
    for _ in range(rounds):
        state, report = run_round(plan, params, state, attempt)
        reports.append(report)
    return state, reports


def apart(one: Any, other: Any) -> float:
    """The largest difference of two numbers in the same place, relative to the largest number there if that is > 1."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return max((_apart(np.asarray(a), np.asarray(b)) for a, b in pairs), default=0.0)


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Of two arrays."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if not one.size:
        return 0.0
    return float(np.abs(one.astype(np.float64) - other).max() / max(1.0, np.abs(one).max()))


def states_apart(one: RoundState, other: RoundState) -> float:
    """The same of all parts of two states."""
    assert int(one.round) == int(other.round)
    parts = ("adapters", "server_state", "client_state", "privacy_state")
    return max(apart(getattr(one, part), getattr(other, part)) for part in parts)


def everywhere_the_same(tree: Any) -> bool:
    """Whether all devices that hold the same part of an array hold the same bits."""
    for leaf in jax.tree.leaves(tree):
        first: dict[str, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            here = np.asarray(shard.data)
            if not np.array_equal(first.setdefault(str(shard.index), here), here):
                return False
    return True


def assert_told_alike(ones: list[RoundReport], others: list[RoundReport]) -> None:
    """Reports of the same clients, with the same counts and, but for rounding, the same figures."""
    for one, other in zip(ones, others, strict=True):
        assert (one.tokens, one.silent, one.late, one.wasted) == (other.tokens, other.silent, other.late, other.wasted)
        assert near(one.update_norm, other.update_norm, 1e-4)
        assert near(one.clip_norm, other.clip_norm, 1e-5)
        assert near(one.aggregation_error, other.aggregation_error, 1e-2)
        for client, again in zip(one.clients, other.clients, strict=True):
            assert [getattr(client, name) for name in COUNTED] == [getattr(again, name) for name in COUNTED]
            assert near(client.update_norm, again.update_norm, 1e-4)
            assert near(client.loss, again.loss, 1e-5)


def near(one: float | None, other: float | None, relative: float) -> bool:
    """Whether two figures are the same but for rounding, or both are missing."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=relative, abs_tol=ROUNDING)
