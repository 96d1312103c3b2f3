"""Canaries through the code that trains: their gradients, what clipping makes of them, and the other rows."""

from dataclasses import replace
from io import StringIO
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_private import private
from small_run import write_small
from tiny import tiny_adapters, tiny_model

from fedjax_llm import config, lora
from fedjax_llm.data.packing import Shape, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.prepare import Prepared, prepare
from fedjax_llm.federation.plan import Execution, RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.leakage import gradient_canaries
from fedjax_llm.leakage.gradient_canaries import CanaryModel, direction, evidence, example_of, projections, watched
from fedjax_llm.lora import Lora
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models.causal_lm import lowest_adapted
from fedjax_llm.models.loading import load
from fedjax_llm.privacy.clipping import Clip, clip_units
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training.rows import example_gradients, rows_of
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Aggregation, Sum

SCALING, SHAPES = 4.0, (Shape(6, 8, 32), Shape(4, 16, 64))


def text(seed: int, length: int) -> EncodedExample:
    """An ordinary example of random tokens."""
    return EncodedExample(f"text-{seed}", np.random.default_rng(seed).integers(1, 97, length, np.int32), length // 2)


def flat(tree: Any) -> np.ndarray:
    """[M, d] of leaves [M, ...]."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], 1)


def vector(tree: Any) -> np.ndarray:
    """[d] of all leaves."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


_gradients = jax.jit(example_gradients, static_argnums=(0, 1))


def gradients_of(
    examples: list[EncodedExample], train: Any = "b", wrap: bool = True, trunk: bool = False, seed: int = 1
) -> tuple[dict[str, tuple[float, Adapters]], Adapters]:
    """By record (loss, gradient as leaves [1, ...]), by the function that trains; and the trained factors."""
    model, params = tiny_model()
    every = tiny_adapters(model, seed=seed, targets=("v_proj", "down_proj"))
    whole = {path: own for path, own in every.items() if path.startswith("layers.1.")}
    trained, frozen = lora.split(whole, train)
    names = tuple(sorted({name for own in trained.values() for name in own}))
    used: Any = CanaryModel(model, names, SCALING) if wrap else model
    cache = TrunkCache(used, params, lowest_adapted(whole), SHAPES, 2**20) if trunk else None
    stacked, keys = jax.tree.map(lambda leaf: leaf[None], trained), jax.random.split(jax.random.key(0), 1)
    found = {}
    for batch in pack([[examples]], SHAPES, clients=1):
        rows = rows_of(batch, cache)
        losses, grads = _gradients(used, SCALING, params, stacked, rows, keys, frozen)
        for row, example in enumerate(batch.examples):
            found[example.record_id] = float(losses[row]), jax.tree.map(lambda leaf, r=row: leaf[r : r + 1], grads)
    return found, trained


@pytest.mark.parametrize("train", ["b", "both"])
def test_a_canary_has_a_large_gradient_along_its_direction_wherever_the_adapters_are(train):
    for seed in (1, 2):
        found, trained = gradients_of([example_of(number) for number in range(3)], train, seed=seed)
        for number in range(3):
            loss, gradient = found[f"canary-{number}"]
            assert loss == pytest.approx(np.log(2), abs=1e-6)
            wanted = 1e4 * vector(direction(number, trained))
            np.testing.assert_allclose(flat(gradient)[0], wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("scope", ["flat", "layers"])
def test_clipping_leaves_a_canary_exactly_the_clip_norm(scope):
    found, trained = gradients_of([example_of(7)])
    clipped = flat(clip_units(found["canary-7"][1], Clip(0.3, scope)))[0]
    assert np.linalg.norm(clipped) == pytest.approx(0.3, rel=1e-5)
    if scope == "flat":
        np.testing.assert_allclose(clipped, 0.3 * vector(direction(7, trained)), rtol=1e-4, atol=1e-7)


def test_other_rows_are_the_models_own_whatever_they_are_packed_with():
    ordinary = [text(0, 6), text(1, 12), text(2, 7), text(3, 16)]
    alone, _ = gradients_of(ordinary, wrap=False)
    mixed, trained = gradients_of([example_of(4), *ordinary, example_of(2)], trunk=True)
    for example in ordinary:
        loss, gradient = mixed[example.record_id]
        assert loss == pytest.approx(alone[example.record_id][0], rel=1e-5)
        np.testing.assert_allclose(flat(gradient), flat(alone[example.record_id][1]), rtol=1e-3, atol=1e-3)
    for number in (2, 4):
        gradient = flat(mixed[f"canary-{number}"][1])[0]
        np.testing.assert_allclose(gradient, 1e4 * vector(direction(number, trained)), rtol=1e-5, atol=1e-3)


def like(size: int) -> Adapters:
    """Factors of so many numbers altogether."""
    return {"one": {"b": jnp.zeros((size // 4, 2))}, "two": {"b": jnp.zeros((2, size // 4))}}


def test_directions_are_nearly_orthogonal_unit_vectors():
    size, canaries = 4096, 200
    units = np.stack([vector(direction(number, like(size))) for number in range(canaries)])
    gram = units @ units.T
    np.testing.assert_allclose(np.diag(gram), 1, rtol=1e-5)
    crossed = gram[~np.eye(canaries, dtype=bool)]
    assert np.abs(crossed).max() < 7 / np.sqrt(size)  # 20,000 of N(0, 1 / size): above by chance with 5e-8
    assert crossed.std() == pytest.approx(1 / np.sqrt(size), rel=0.1)


@given(weights=st.lists(st.floats(-5, 5), min_size=3, max_size=3))
@settings(max_examples=10, deadline=None)
def test_projections_are_inner_products_downhill(weights):
    shape, rng = like(64), np.random.default_rng(0)
    released = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape)), jnp.float32), shape)
    released = jax.tree.map(lambda leaf: leaf * jnp.asarray(weights, jnp.float32)[:, None, None], released)
    wanted = [[-vector(direction(k, shape)) @ row for k in range(5)] for row in flat(released)]
    np.testing.assert_allclose(projections(released, 5), wanted, atol=1e-4)


def test_evidence_is_the_log_likelihood_ratio():
    moved, probability, deviation = np.array([[0.9, -0.2], [0.1, 1.4]]), np.array([0.25, 1.0]), np.array([0.5, 2.0])
    wanted = np.zeros(2)
    for row, sd in zip(moved, deviation, strict=True):
        there, gone = (np.exp(-0.5 * ((row - shift) / sd) ** 2) for shift in (1.0, 0.0))
        wanted += np.log((1 - probability) + probability * there / gone)
    np.testing.assert_allclose(evidence(moved, probability, deviation), wanted, rtol=1e-12)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The miniature, without a mechanism."""
    return config.load(write_small(tmp_path_factory.mktemp("small")))


def prepared_of(small: Any, name: str, **fields: Any) -> Prepared:
    """The miniature with a mechanism, ready."""
    few = Lora(rank=2, alpha=4.0, targets=("v_proj",), layers=(-1,))
    experiment = private(small, name, lora=few, **fields)
    return prepare(experiment, RunProgress(1, Console(file=StringIO())), load)


def silent(plan: RoundPlan) -> RoundPlan:
    """Without noise, and with everybody in every round."""
    mechanism = plan.mechanism
    assert mechanism is not None
    mechanism = mechanism._replace(stddev=0 * mechanism.stddev, sampling=mechanism.sampling)
    if mechanism.sampling is not None:
        mechanism = mechanism._replace(sampling=np.ones_like(mechanism.sampling))
    if mechanism.cohort_probability is not None:
        mechanism = mechanism._replace(cohort_probability=1.0)
    return plan._replace(mechanism=mechanism)


def released(plan: RoundPlan, prepared: Prepared) -> np.ndarray:
    """The first round's sum, as the server's algorithm is shown it."""
    state, _ = run_round(plan, prepared.base.params, initial_state(plan, prepared.adapters))
    return vector(state.server_state[1])


def test_a_canary_adds_the_clip_norm_to_a_rounds_sum_whatever_the_chunks_and_the_buckets(small):
    prepared = prepared_of(small, "DpFedSgd", federation__cohort=None)
    plan, numbers = silent(prepared.plan), [0, 1, 5]
    planted = gradient_canaries.with_canaries(plan, prepared.adapters, numbers)
    with_all = released(planted, prepared)
    without = released(gradient_canaries.with_canaries(plan, prepared.adapters, []), prepared)
    norm = plan.mechanism.clip.norm
    wanted = -norm * sum(vector(direction(number, prepared.adapters)) for number in numbers)
    np.testing.assert_allclose(with_all - without, wanted, atol=2e-4 * norm)
    long = tuple(shape for shape in planted.shapes if shape.length > 8)
    other = planted._replace(execution=Execution(clients_per_chunk=1), shapes=long)
    np.testing.assert_allclose(released(other, prepared), with_all, atol=2e-4 * norm)


def test_a_canary_client_adds_the_clip_norm_along_its_direction(small):
    fields = {"training__optimizer__name": "sgd", "training__optimizer__learning_rate": 0.1}
    prepared = prepared_of(small, "DpFedAvg", **fields)
    plan = silent(prepared.plan)
    numbers = [0, 3]
    with_both = released(gradient_canaries.with_canary_clients(plan, prepared.adapters, numbers), prepared)
    without = released(gradient_canaries.with_canary_clients(plan, prepared.adapters, []), prepared)
    norm = plan.mechanism.clip.norm
    wanted = -norm * sum(vector(direction(number, prepared.adapters)) for number in numbers)
    np.testing.assert_allclose(with_both - without, wanted, atol=2e-3 * norm)


def test_the_claim_and_the_algorithm_stay_as_they_were(small):
    prepared = prepared_of(small, "DpFedSgd")
    plan = gradient_canaries.with_canaries(prepared.plan, prepared.adapters, list(range(50)))
    assert plan.mechanism is prepared.plan.mechanism
    assert sum(len(client.units) for client in plan.clients) == sum(len(c.units) for c in prepared.plan.clients) + 50
    more = gradient_canaries.with_canaries(prepared.plan, prepared.adapters, [7, 9])
    homes = [client.name for client in more.clients if any(u[0].record_id == "canary-7" for u in client.units)]
    assert homes == [c.name for c in plan.clients if any(u[0].record_id == "canary-7" for u in c.units)]


def test_a_watched_algorithm_does_what_it_did_and_keeps_what_it_saw():
    def update(view: Sum, state: Any, adapters: Any) -> tuple[Any, Any]:
        return adapters + view.total, state + 1

    plain = Aggregation(lambda adapters: 0, update, Sum, broadcast=lambda state: ("sent", state))
    algorithm, start = watched(plain), jnp.zeros(3)
    adapters, state = algorithm.update(Sum(jnp.arange(3.0), jnp.float32(1)), algorithm.init(start), start)
    np.testing.assert_array_equal(adapters, [0, 1, 2])
    np.testing.assert_array_equal(state[1], [0, 1, 2])
    assert state[0] == 1
    assert algorithm.broadcast is not None
    assert algorithm.broadcast(state) == ("sent", 1)
    assert algorithm.residual is None


def test_runs_that_cannot_be_audited_are_refused(small):
    prepared = prepared_of(small, "DpFedAvg")
    with pytest.raises(UserError, match="clips gradients"):
        gradient_canaries.with_canaries(prepared.plan, prepared.adapters, [0])
    other = prepared_of(small, "DpFedSgd")
    with pytest.raises(UserError, match="need DpFedAvg"):
        gradient_canaries.with_canary_clients(other.plan, other.adapters, [0])
    core = {"layers.0.x": {"c": jnp.zeros((2, 2))}}
    with pytest.raises(UserError, match="'core'"):
        gradient_canaries.with_canaries(other.plan, core, [0])
    spread = replace(other.plan.execution, mesh=MeshShape(fsdp=2))
    with pytest.raises(UserError, match=r"mesh\.fsdp"):
        gradient_canaries.with_canaries(other.plan._replace(execution=spread), other.adapters, [0])
    weighted = prepared.plan._replace(mechanism=prepared.plan.mechanism._replace(site_weights=lambda examples: 1.0))
    with pytest.raises(UserError, match="weighting"):
        gradient_canaries.with_canary_clients(weighted, prepared.adapters, [0])
