"""The linear cost model: amounts that follow from shapes, and constants that a fit finds again."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_model

from fedjax_llm.data.packing import Shape
from fedjax_llm.experiment import cost_model
from fedjax_llm.experiment.cost_model import KINDS, Constants, Size, Work

SIZE = Size(
    layers=4,
    lowest=1,
    weights=3000.0,
    output=9000.0,
    vocabulary=300,
    width=30,
    heads=3,
    activations=200,
    adapters=500,
    trained=200,
    itemsize=4,
    remat="none",
)
SHAPES = st.builds(Shape, st.integers(1, 64), st.integers(1, 512), st.integers(1, 4096))
ROUGH = cost_model.rough_constants(1e11)


def amounts(work: Work) -> np.ndarray:
    return np.array([getattr(work, kind) for kind in KINDS])


def spread_works(count: int) -> list[Work]:
    """Work in which every kind's part varies, of seconds by ``ROUGH``."""
    rng, before = np.random.default_rng(0), np.array([ROUGH.seconds[kind] for kind in KINDS])
    return [Work(*(rng.uniform(0.01, 1, len(KINDS)) / before).tolist()) for _ in range(count)]


@given(st.lists(st.floats(0.1, 10), min_size=len(KINDS), max_size=len(KINDS)))
def test_a_fit_finds_the_constants_that_made_the_times(factors):
    true = Constants({kind: ROUGH.seconds[kind] * f for kind, f in zip(KINDS, factors, strict=True)}, 1.0)
    observed = [(work, cost_model.seconds_of(true, work)) for work in spread_works(40)]
    found = cost_model.fit(observed, ROUGH, trust=1e-10)
    np.testing.assert_allclose([found.seconds[k] for k in KINDS], [true.seconds[k] for k in KINDS], rtol=1e-3)
    assert not found.rough


@given(st.floats(0.2, 5))
def test_one_observation_scales_what_it_holds_and_nothing_else(slower):
    work = Work(training=1e12, training_logits=1e11)
    took = slower * cost_model.seconds_of(ROUGH, work)
    found = cost_model.fit([(work, took)], ROUGH)
    assert cost_model.seconds_of(found, work) == pytest.approx(took, rel=1e-6)
    kept = set(KINDS) - {"training", "training_logits"}
    assert all(found.seconds[kind] == pytest.approx(ROUGH.seconds[kind], rel=1e-6) for kind in kept)


def test_training_and_evaluation_that_are_slower_by_different_factors_come_apart():
    parts = (Work(training=1e12, training_logits=2e11), Work(forward=1e12, logits=2e11, reports=1))
    took = [factor * cost_model.seconds_of(ROUGH, work) for work, factor in zip(parts, (1.5, 4.0), strict=True)]
    constants, errors = ROUGH, []
    for _ in range(4):
        constants = cost_model.fit(list(zip(parts, took, strict=True)), constants)
        errors.append(max(abs(cost_model.seconds_of(constants, w) / t - 1) for w, t in zip(parts, took, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.1
    assert errors[-1] < 0.01


def test_no_constant_is_negative_where_times_contradict_one_another():
    observed = [(Work(forward=1e11), 5.0), (Work(forward=1e11, training=1e11), 1.0)]
    found = cost_model.fit(observed, ROUGH)
    assert min(found.seconds.values()) >= 0


def test_without_times_nothing_changes():
    assert cost_model.fit([], ROUGH) is ROUGH


@given(SHAPES, st.integers(1, 8))
def test_work_is_linear_in_rows_of_a_length(shape, times):
    larger = Shape(shape.rows * times, shape.length, shape.targets * times)
    one = cost_model.training_work(SIZE, shape, 0, trunk=False)
    many = cost_model.training_work(SIZE, larger, 0, trunk=False)
    expected = dataclasses.replace(one.times(times), microbatches=1)
    np.testing.assert_allclose(amounts(many), amounts(expected))
    assert cost_model.seconds_of(ROUGH, one.times(times)) == pytest.approx(times * cost_model.seconds_of(ROUGH, one))


@given(SHAPES, st.sampled_from(["layers", "weights", "output", "heads", "adapters", "trained"]), st.booleans())
def test_more_of_anything_takes_no_less(shape, field, trunk):
    larger = SIZE._replace(**{field: 2 * getattr(SIZE, field)})
    for size, bigger in ((SIZE, larger), (SIZE._replace(remat="blocks"), larger._replace(remat="blocks"))):
        less = cost_model.training_work(size, shape, 4, trunk)
        more = cost_model.training_work(bigger, shape, 4, trunk)
        assert (amounts(more) >= amounts(less)).all()
        assert cost_model.seconds_of(ROUGH, more) > cost_model.seconds_of(ROUGH, less)
        assert cost_model.step_bytes(bigger, shape, 4) >= cost_model.step_bytes(size, shape, 4)


@given(SHAPES)
def test_a_trunk_saves_the_layers_below(shape):
    whole = cost_model.training_work(SIZE, shape, 4, trunk=False)
    upper = cost_model.training_work(SIZE, shape, 4, trunk=True)
    below = cost_model.trunk_work(SIZE, shape.rows, shape.length)
    np.testing.assert_allclose(amounts(upper + below), amounts(dataclasses.replace(whole, microbatches=2)))


@given(SHAPES)
def test_computing_again_takes_time_and_saves_memory(shape):
    again = SIZE._replace(remat="blocks")
    assert cost_model.training_work(again, shape, 4, True).training == pytest.approx(
        1.5 * cost_model.training_work(SIZE, shape, 4, True).training
    )
    assert cost_model.step_bytes(again, shape, 4) < cost_model.step_bytes(SIZE, shape, 4)


def test_the_size_of_a_model_is_that_of_its_arrays():
    model, params = tiny_model()
    adapters = tiny_adapters(model, targets=("q_proj",))
    trained = {path: {"b": factors["b"]} for path, factors in adapters.items()}
    frozen = {path: {"a": factors["a"]} for path, factors in adapters.items()}
    base = type("Base", (), {"model": model, "params": params})()
    found = cost_model.size_of(base, trained, frozen)
    matrices = [leaf for leaf in jax.tree.leaves(params["layers"][0]) if leaf.ndim == 2]
    assert found.weights == sum(leaf.size for leaf in matrices)
    assert found.activations == sum(sum(leaf.shape) for leaf in matrices)
    assert (found.layers, found.lowest, found.width, found.itemsize) == (2, 0, 32, 4)
    assert (found.adapters, found.trained) == (2 * 3 * 64, 2 * 3 * 32)
