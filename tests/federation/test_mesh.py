"""Rounds on eight virtual devices against the same rounds on one: every algorithm, setting and part of a state."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from toy_mesh import (
    CUBE,
    ROUNDING,
    Played,
    apart,
    assert_told_alike,
    everywhere_the_same,
    on_mesh,
    play_from,
    states_apart,
)
from toy_private import toy_base
from toy_rounds import toy_model, toy_plan, toy_trainer

from fedjax_llm import aggregation, lora
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.hetlora import HetLora
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.catalogue import makers
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.rotated import Rotated
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.data.packing import Microbatch, Shape, pack
from fedjax_llm.federation import rounds
from fedjax_llm.federation.availability import Asynchronous, Availability
from fedjax_llm.federation.plan import Federation, RoundPlan
from fedjax_llm.mesh import MeshShape
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Schedule
from fedjax_llm.training.rows import Rows
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Aggregation, Params

BINNED = tuple(name for name in Rows._fields if name not in ("below", "position", "branch"))
STEPS = LocalTraining(batch_size=3, local_steps=2)
every = pytest.mark.parametrize("algorithm", makers(aggregation), ids=lambda algorithm: algorithm.__name__)


class Case(NamedTuple):
    """A plan for one device, and what it begins with."""

    plan: RoundPlan
    params: Params
    adapters: Adapters


@cache
def made(algorithm: Any) -> Aggregation:
    """Cached, since every other update compiles anew."""
    return algorithm.make()


def case_of(algorithm: Any = FedAvg(), local: LocalTraining = STEPS, trainer: Any = None, **options: Any) -> Case:  # noqa: B008
    """All five sites, of which a chunk holds two on one device and four on the mesh."""
    aggregation, trainer = made(algorithm), trainer or toy_trainer("sgd", 0.03)
    trainer = trainer._replace(correct=aggregation.client.gradient)
    plan = toy_plan(trainer, local, **{"layout": "in pairs", "cohort": 5, "aggregation": aggregation} | options)
    return Case(plan, *toy_model(trainer.model.dropout)[1:])


def played(case: Case, shape: MeshShape | None = None, number: int = 2) -> Played:
    """On one device, or on a mesh."""
    plan = case.plan if shape is None else on_mesh(case.plan, shape)
    return play_from(plan, case.params, case.adapters, number)


def check(case: Case, shape: MeshShape = CUBE) -> Played:
    """The same numbers as on one device, after going somewhere; gives what the mesh gave."""
    # Control variates are changes over the learning rate, and so is their rounding.
    tolerance = ROUNDING if case.plan.aggregation.client.gradient is None else 10 * ROUNDING
    (one, told), (other, again) = played(case), played(case, shape)
    assert states_apart(one, other) < tolerance
    assert_told_alike(told, again)
    assert everywhere_the_same((other.adapters, other.server_state))
    assert max(client.update_norm for report in told for client in report.clients) > 1e-2
    return other, again


@every
def test_every_algorithm_takes_the_steps_of_one_device(algorithm):
    state, _ = check(case_of(algorithm()))
    kept = made(algorithm()).client.init is not None or made(algorithm()).own is not None
    assert not kept or apart(state.client_state, jax.tree.map(np.zeros_like, state.client_state)) > 1e-3


def test_both_views_are_walked():
    assert len({made(algorithm()).view for algorithm in makers(aggregation)}) == 2


def trunk_case() -> Case:
    """Adapters above a layer whose states are kept."""
    base = toy_base("upper")
    case = case_of(trainer=toy_trainer("sgd", 0.03)._replace(model=base.model))
    trunk = TrunkCache(base.model, base.params, 1, case.plan.shapes, 2**20)
    return Case(case.plan._replace(trunk=trunk), base.params, base.adapters)


def frozen_case() -> Case:
    """One factor trained, the other not."""
    plan, params, adapters = case_of()
    trained, frozen = lora.split(adapters, "b")
    return Case(plan._replace(frozen=frozen), params, trained)


def offset_case() -> Case:
    """Something added to the frozen weights of adapted modules."""
    plan, params, adapters = case_of()
    products = lora.products(jax.tree.map(lambda leaf: 0.3 * leaf[::-1], adapters))
    return Case(plan._replace(offset=products), params, adapters)


def shared_case() -> Case:
    """Several examples in a row."""
    case = case_of()
    execution = replace(case.plan.execution, shared_row=32)
    return with_(case, execution=execution, shapes=(Shape(2, 32, 48),))


def with_(case: Case, **fields: Any) -> Case:
    """The case with fields of its plan replaced."""
    return case._replace(plan=case.plan._replace(**fields))


ADAM = {"trainer": toy_trainer("adamw", 0.01), "local": replace(STEPS, keep_optimizer="yes")}
SCHEDULED = LocalTraining(batch_size=2, local_epochs=1, normalise="token", local_schedule=Schedule("linear", 0.3))
SLOW = Federation(rounds=2, cohort=3, asynchronous=Asynchronous(concurrency=4))
CASES: dict[str, Callable[[], Case]] = {
    "optimiser kept": lambda: case_of(**ADAM),
    "local": lambda: case_of(**ADAM, setting="local", cohort=3),
    "centralised": lambda: case_of(setting="centralised"),
    "fewer clients than groups have slots": lambda: case_of(cohort=1),
    "proximal": lambda: case_of(trainer=toy_trainer("sgd", 0.03, proximal=0.5)),
    "epochs, per token, schedule": lambda: case_of(local=SCHEDULED),
    "dropout": lambda: case_of(trainer=toy_trainer("sgd", 0.03, dropout=0.4)),
    "one factor frozen": frozen_case,
    "kept trunk": trunk_case,
    "weights moved": offset_case,
    "examples that share rows": shared_case,
    "silent clients": lambda: case_of(federation=Federation(availability=Availability(dropout=0.3))),
    "asynchronous": lambda: case_of(federation=SLOW, cohort=3),
    "ranks": lambda: with_(case_of(FlexLora()), ranks=(1, 3, 2, 1, 2)),
    "ranks that shrink": lambda: with_(case_of(HetLora(gamma=0.5, penalty=2.0)), ranks=(3,) * 5),
    "attacked": lambda: with_(
        case_of(Krum(byzantine=1)), malicious=(False, True) + (False,) * 3, corrupt=SignFlip().make().corrupt
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_round_is_that_of_one_device(name):
    check(CASES[name]())


@pytest.mark.parametrize("codec", [Rotated(Quantise(8)), TopK(0.1, values=Quantise(8))], ids=lambda c: type(c).__name__)
def test_compressed_messages_are_those_of_one_device(codec):
    case = with_(case_of(), codec=codec.make())
    (one, told), (other, again) = played(case), played(case, CUBE)
    assert [r.clients[0].upload_bytes for r in told] == [r.clients[0].upload_bytes for r in again]
    differences = [np.abs(np.asarray(a) - np.asarray(b)) for a, b in zip(
        *map(jax.tree.leaves, (one.adapters, other.adapters)), strict=True)]  # fmt: skip
    # Sums of another order may put single values on the other side of a rounding.
    assert sum(int((d > ROUNDING).sum()) for d in differences) <= 0.01 * sum(d.size for d in differences)


SHAPES = [MeshShape(8, 1, 1), MeshShape(1, 4, 1), MeshShape(1, 1, 2), MeshShape(2, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_shapes_of_the_mesh(shape):
    check(case_of(Scaffold()), shape)


# What must not go unnoticed.


def wrong(case: Case, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any) -> float:
    """How far a mesh with a function replaced is from one device."""
    one, _ = played(case, None, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, value)
        client_update._accumulate.clear_cache()
        other, _ = played(case, CUBE, 1)
    client_update._accumulate.clear_cache()
    return states_apart(one, other)


def test_rows_that_are_not_summed_up_are_noticed(monkeypatch):
    assert wrong(case_of(), monkeypatch, jax.lax, "psum", lambda tree, axis: tree) > 100 * ROUNDING


def test_rows_in_the_bin_of_another_group_are_noticed(monkeypatch):
    def astray(work: Any, shapes: Any, **options: Any) -> Iterator[Microbatch]:
        for batch in pack(work, shapes, **options):
            turned = {name: np.roll(getattr(batch, name), len(getattr(batch, name)) // 2, 0) for name in BINNED}
            yield replace(batch, **turned)

    assert wrong(case_of(), monkeypatch, rounds, "pack", astray) > 100 * ROUNDING
