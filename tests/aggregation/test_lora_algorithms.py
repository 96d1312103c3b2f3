"""The servers of the algorithms made for adapters, against plain NumPy over several rounds."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same, tiny_model

from fedjax_llm import lora
from fedjax_llm.aggregation.fedex import FedExLora
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.flora import FLora
from fedjax_llm.aggregation.hetlora import HetLora
from fedjax_llm.aggregation.lora_fair import LoraFair
from fedjax_llm.aggregation.products import principal
from fedjax_llm.aggregation.rolora import RoLora
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora
from fedjax_llm.types import Local, Stack

C, R, ROUNDS = 3, 3, 3
SIZES = {"q": (7, 5), "v": (4, 6)}
SHARE = np.array([0.5, 0.2, 0.3])


def factors_of(seed: int, *leading: int, rank: int = R):
    rng = np.random.default_rng(seed)
    return {
        path: {"a": rng.normal(size=(*leading, fan_in, rank)), "b": rng.normal(size=(*leading, rank, fan_out))}
        for path, (fan_in, fan_out) in SIZES.items()
    }


def on_device(tree, dtype=jnp.float32):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


@cache
def updating(algorithm):
    aggregation = algorithm.make()
    return aggregation, jax.jit(aggregation.update)


def after(algorithm, seeds=range(1, ROUNDS + 1), start=None):
    """Adapters and state after rounds in which the clients ended with ``factors_of(seed, C)``."""
    aggregation, update = updating(algorithm)
    adapters = on_device(factors_of(0)) if start is None else start
    state = aggregation.init(adapters)
    for seed in seeds:
        messages = on_device(factors_of(seed, C))
        if aggregation.client.report is None:
            messages = jax.tree.map(lambda end, a: end - a.astype(jnp.float32), messages, adapters)
        adapters, state = update(Stack(messages, jnp.asarray(7 * SHARE, jnp.float32)), state, adapters)
    return adapters, state


def mean(leaf, share=SHARE):
    return np.tensordot(share, leaf, 1)


def mean_product(factors, share=SHARE):
    return np.einsum("c,cir,cro->io", share, factors["a"], factors["b"])


def cut(matrix, rank: int):
    """The best approximation of a rank."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank]


def product(factors):
    return np.asarray(factors["a"], np.float64) @ np.asarray(factors["b"], np.float64)


# FLoRA.


def test_flora_moves_every_rounds_mean_product_into_the_weights():
    adapters, state = after(FLora())
    for path in SIZES:
        expected = sum(mean_product(factors_of(seed, C)[path]) for seed in range(1, ROUNDS + 1))
        np.testing.assert_allclose(state["residual"][path], expected, atol=1e-5)
        assert not np.any(adapters[path]["b"])


def test_flora_draws_a_anew_in_every_round_by_its_seed():
    paths = [after(FLora(), range(1, 1 + rounds))[0] for rounds in (1, 2)]
    paths += [after(FLora(), (5,))[0], after(FLora(seed=1), (1,))[0]]
    one, two, others_data, other_seed = (np.concatenate([np.ravel(p[path]["a"]) for path in SIZES]) for p in paths)
    np.testing.assert_array_equal(one, others_data)
    assert np.min(np.abs(one - two)) > 0
    assert np.min(np.abs(one - other_seed)) > 0
    for path, (fan_in, _) in SIZES.items():
        drawn = np.asarray(paths[0][path]["a"])
        assert fan_in**-0.5 * 0.8 < np.abs(drawn).max() <= fan_in**-0.5


@pytest.mark.parametrize("algorithm", [FLora(), FedExLora(), FlexLora(), HetLora(), LoraFair()], ids=str)
def test_of_one_client_nothing_is_lost(algorithm):
    aggregation, update = updating(algorithm)
    start, end = on_device(factors_of(0)), on_device(factors_of(1, 1))
    state = aggregation.init(start)
    messages = end if aggregation.client.report else jax.tree.map(lambda new, old: new - old, end, start)
    adapters, state = update(Stack(messages, jnp.ones(1)), state, start)
    residual = aggregation.residual(state) if aggregation.residual else dict.fromkeys(SIZES, 0.0)
    for path in SIZES:
        expected = mean_product(factors_of(1, 1)[path], np.ones(1))
        np.testing.assert_allclose(product(adapters[path]) + residual[path], expected, atol=5e-6)


# FlexLoRA.


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([2, 9]), rank=st.sampled_from([1, 3]))
def test_principal_components_are_the_best_approximation_in_order(seed, width, rank):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(7, width)), rng.normal(size=(width, 5))
    best = jitted_principal(on_device({"a": a, "b": b}), rank)
    kept = min(rank, width, 5)
    assert (best["a"].shape, best["b"].shape) == ((7, kept), (kept, 5))
    np.testing.assert_allclose(best["a"].T @ best["a"], np.eye(kept), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(best["b"], axis=1), np.linalg.svd(a @ b)[1][:kept], rtol=1e-5, atol=1e-5)
    for r in range(1, kept + 1):
        np.testing.assert_allclose(best["a"][:, :r] @ best["b"][:r], cut(a @ b, r), atol=2e-4)


jitted_principal = jax.jit(principal, static_argnums=1)


def test_flexlora_is_the_truncated_decomposition_of_the_mean_product():
    adapters, state = after(FlexLora())
    assert state == ()
    for path in SIZES:
        found, wanted = adapters[path], mean_product(factors_of(ROUNDS, C)[path])
        for r in range(1, R + 1):
            part = {"a": found["a"][:, :r], "b": found["b"][:r]}
            np.testing.assert_allclose(product(part), cut(wanted, r), atol=1e-5)


def test_flexlora_does_not_flip_signs_with_the_order_of_clients():
    messages, order = on_device(factors_of(4, C)), np.array([2, 0, 1])
    found = []
    for index in (np.arange(C), order):
        view = Stack(jax.tree.map(lambda leaf, i=index: leaf[i], messages), jnp.asarray(SHARE[index], jnp.float32))
        found.append(updating(FlexLora())[1](view, (), on_device(factors_of(0)))[0])
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


# HetLoRA.


def test_hetlora_weighs_clients_by_the_norms_of_their_products():
    adapters, _ = after(HetLora())
    ends = factors_of(ROUNDS, C)
    squares = sum(
        np.sum((factors["a"] @ factors["b"]) ** 2, axis=(1, 2)) for factors in ends.values()
    )  # of all modules together
    share = np.sqrt(squares) / np.sqrt(squares).sum()
    for path in SIZES:
        for name in ("a", "b"):
            np.testing.assert_allclose(adapters[path][name], mean(ends[path][name], share), atol=1e-6)


def test_hetlora_of_products_that_are_zero_is_the_mean_of_those_who_came():
    ends = {path: factors | {"b": 0 * factors["b"]} for path, factors in factors_of(1, C).items()}
    view = Stack(on_device(ends), jnp.array([3.0, 0.0, 1.0]))
    adapters, _ = updating(HetLora())[1](view, (), on_device(factors_of(0)))
    np.testing.assert_allclose(adapters["q"]["a"], mean(ends["q"]["a"], np.array([0.5, 0, 0.5])), atol=1e-6)


@cache
def rules(algorithm: HetLora):
    """How clients correct a gradient, and find their next rank."""
    client = algorithm.make().client
    return jax.jit(client.gradient), jax.jit(client.rank)


def prunable(adapters, rank: int, left: int) -> float:
    return sum(
        np.linalg.norm(factors["a"][:, left:rank]) * np.linalg.norm(factors["b"][left:rank])
        for factors in adapters.values()
    )


@pytest.mark.parametrize(
    ("rank", "gamma", "left"), [(3, 0.99, 2), (10, 0.7, 7), (10, 0.45, 4), (8, 0.5, 4), (1, 0.5, 1)]
)
def test_hetlora_penalises_the_components_that_pruning_would_take(rank, gamma, left):
    adapters = factors_of(2, rank=10)
    corrected, _ = rules(HetLora(gamma=gamma, penalty=0.5))
    local = Local(on_device(adapters), (), (), jnp.int32(rank))
    zeros = on_device(jax.tree.map(np.zeros_like, adapters))
    added = corrected(zeros, on_device(adapters), local)
    rng = np.random.default_rng(0)
    for _ in range(3):  # along random directions
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), adapters)
        ahead, behind = (jax.tree.map(lambda x, d, s=s: x + s * d, adapters, direction) for s in (1e-6, -1e-6))
        slope = 0.5 * (prunable(ahead, rank, left) - prunable(behind, rank, left)) / 2e-6
        found = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (added, direction)), strict=True))
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-4)
    for factors in added.values():
        assert not np.any(factors["a"][:, :left])
        assert not np.any(factors["a"][:, rank:])


def test_hetlora_penalty_is_finite_where_the_factors_are_zero_and_absent_where_it_is_zero():
    fresh = {path: factors | {"b": 0 * factors["b"]} for path, factors in factors_of(2).items()}
    local = Local(on_device(fresh), (), (), jnp.int32(R))
    added = rules(HetLora(gamma=0.5, penalty=1.0))[0](on_device(fresh), on_device(fresh), local)
    assert same(added, on_device(fresh))
    assert HetLora(penalty=0.0).make().client.gradient is None


def test_hetlora_prunes_where_the_end_of_the_components_has_shrunk():
    (_, rank), start = rules(HetLora(gamma=0.5, penalty=1.0)), on_device(factors_of(3, rank=8))
    scaled = [jax.tree.map(lambda leaf, s=s: s * leaf, start) for s in (0.9, 1.0, 1.1)]
    local = Local(start, (), (), jnp.int32(6))
    assert [int(rank(end, local)) for end in scaled] == [3, 6, 6]
    assert int(rank(scaled[0], local._replace(rank=jnp.int32(1)))) == 1
    assert int(rules(HetLora(gamma=1.0))[1](scaled[0], local)) == 6


# FedEx-LoRA.


def test_fedex_keeps_the_mean_of_the_factors_and_adds_what_their_product_misses():
    adapters, state = after(FedExLora())
    for path in SIZES:
        ends = [factors_of(seed, C)[path] for seed in range(1, ROUNDS + 1)]
        missed = [mean_product(end) - mean(end["a"]) @ mean(end["b"]) for end in ends]
        np.testing.assert_allclose(state[path], sum(missed), atol=1e-5)
        for name in ("a", "b"):
            np.testing.assert_allclose(adapters[path][name], mean(ends[-1][name]), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 99])
def test_fedex_truncated_adds_the_best_approximation_of_each_rounds_residual(rank):
    _, state = after(FedExLora(residual_rank=rank))
    for path in SIZES:
        ends = [factors_of(seed, C)[path] for seed in range(1, ROUNDS + 1)]
        missed = [cut(mean_product(end) - mean(end["a"]) @ mean(end["b"]), rank) for end in ends]
        np.testing.assert_allclose(state[path], sum(missed), atol=2e-5)


def test_fedex_is_exact_with_adapters_in_bfloat16_too():
    start = on_device(factors_of(0), jnp.bfloat16)
    adapters, state = after(FedExLora(), (1,), start)
    for path in SIZES:
        assert adapters[path]["a"].dtype == jnp.bfloat16
        wanted = mean_product(factors_of(1, C)[path])
        np.testing.assert_allclose(product(adapters[path]) + state[path], wanted, atol=1e-5)


# LoRA-FAIR.


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_lora_fair_solves_the_ridge_problem(ridge):
    adapters, _ = after(LoraFair(ridge))
    for path in SIZES:
        ends = factors_of(ROUNDS, C)[path]
        a, b, wanted = mean(ends["a"]), mean(ends["b"]), mean_product(ends)
        correction = np.linalg.solve(a.T @ a + ridge * np.eye(R), a.T @ (wanted - a @ b))
        np.testing.assert_allclose(adapters[path]["a"], a, atol=1e-6)
        np.testing.assert_allclose(adapters[path]["b"], b + correction, atol=2e-5)


def test_lora_fair_lies_between_the_mean_and_the_nearest_product():
    gaps = []
    for ridge in (1e-2, 1.0, 1e8):
        adapters, _ = after(LoraFair(ridge))
        gaps.append(np.linalg.norm(product(adapters["q"]) - mean_product(factors_of(ROUNDS, C)["q"])))
    ends = factors_of(ROUNDS, C)["q"]
    a, wanted = mean(ends["a"]), mean_product(ends)
    nearest = np.linalg.norm(a @ np.linalg.lstsq(a, wanted, rcond=None)[0] - wanted)
    assert gaps[0] == pytest.approx(nearest, rel=0.02)
    assert gaps[2] == pytest.approx(np.linalg.norm(a @ mean(ends["b"]) - wanted), rel=1e-3)
    assert gaps[0] < gaps[1] < gaps[2]


# What travels.


def test_rolora_trains_b_first_and_then_in_turn():
    live = RoLora().make().live
    assert [live(number) for number in (1, 2, 3)] == [{"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]


def test_bytes_of_what_is_downloaded_beside_the_adapters():
    adapters = on_device(factors_of(0), jnp.bfloat16)
    numbers = R * (7 + 5 + 4 + 6)
    assert FLora().make().download(5, adapters) == 4 * numbers * 2
    assert FLora().make().download(1, adapters) == 0
    whole, low = FedExLora().make().download, FedExLora(residual_rank=1).make().download
    assert low(5, adapters) == 4 * (7 + 5 + 4 + 6)
    assert whole(1, adapters) == 4 * (min(3 * 12, 35) + min(3 * 10, 24))
    wide = {"q": {"a": jnp.zeros((100, 3)), "b": jnp.zeros((3, 50))}}
    assert whole(4, wide) == 4 * 12 * 150
    assert whole(99, wide) == 4 * 100 * 50  # as it is, where factors would be more


# A core between frozen factors (Fed-SB).


CORE = Lora(rank=4, targets=("q_proj", "down_proj"), train="core")


def test_fresh_cores_change_nothing_between_orthonormal_factors():
    model, _ = tiny_model()
    adapters = lora.init(jax.random.key(0), CORE, model)
    for factors in adapters.values():
        assert factors["c"].shape == (4, 4)
        assert not np.any(factors["c"])
        np.testing.assert_allclose(factors["a"].T @ factors["a"], np.eye(4), atol=1e-6)
        np.testing.assert_allclose(factors["b"] @ factors["b"].T, np.eye(4), atol=1e-6)
    trained, frozen = lora.split(adapters, "core")
    assert {name for factors in trained.values() for name in factors} == {"c"}
    assert {name for factors in frozen.values() for name in factors} == {"a", "b"}
    assert same(lora.join(trained, frozen), adapters)
    ends = [np.asarray(factors[name]).ravel() for factors in adapters.values() for name in ("a", "b")]
    assert len({end.tobytes() for end in ends}) == len(ends)


def test_the_mean_of_the_cores_is_the_mean_of_the_products():
    model, _ = tiny_model()
    adapters = lora.init(jax.random.key(0), CORE, model)
    rng = np.random.default_rng(0)
    cores = {path: rng.normal(size=(C, 4, 4)) for path in adapters}
    each = [
        lora.products({path: f | {"c": jnp.asarray(cores[path][c], jnp.float32)} for path, f in adapters.items()})
        for c in range(C)
    ]
    averaged = {path: f | {"c": jnp.asarray(mean(cores[path]), jnp.float32)} for path, f in adapters.items()}
    for path, found in lora.products(averaged).items():
        np.testing.assert_allclose(found, mean(np.stack([one[path] for one in each])), atol=1e-6)
        assert np.abs(found).max() > 0.1


def test_a_core_taken_from_two_factors_keeps_their_product():
    adapters = on_device(factors_of(1))
    cored = lora.cored(adapters)
    for path, found in lora.products(cored).items():
        np.testing.assert_allclose(found, product(adapters[path]), atol=1e-5)
        np.testing.assert_allclose(cored[path]["a"].T @ cored[path]["a"], np.eye(R), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "core", "init": "pissa"}, "lora.init='pissa' and lora.train='core'"),
        ({"train": "core", "ranks": (1, 2)}, r"lora.ranks is \(1, 2\), but lora.train is 'core'"),
        ({"train": "b", "ranks": (1, 2)}, r"lora.ranks is \(1, 2\), but lora.train is 'b'"),
    ],
)
def test_what_frozen_factors_do_not_go_with_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Lora(**fields)
