"""What a round would take on a slice: sums and extrapolations of compiled programs, and rooflines of a chip."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_pod import LAYERS, NAME, SHAPE, devices, on_virtual_devices, small_experiment

from fedjax_llm.errors import UserError
from fedjax_llm.experiment import collectives, pod, pod_report
from fedjax_llm.experiment.collectives import Collective
from fedjax_llm.experiment.pod import Program
from fedjax_llm.experiment.pod_report import Roofline, elsewhere, planned, shortened
from fedjax_llm.experiment.tpu_topology import CHIPS
from fedjax_llm.mesh import MeshShape
from fedjax_llm.models.shapes import SHAPES

SMALL, LARGE = "v5e:2x2", "v5e:2x4"
CHIP = CHIPS["v5e"]


@pytest.fixture(scope="module", autouse=True)
def virtual() -> Iterator[None]:
    with on_virtual_devices():
        yield


@cache
def compiled(layers: int) -> list[Program]:
    return pod.compiled(pod.pod_of(small_experiment(), devices(LARGE), layers))


# Depths that were not compiled.


def linear(rates: dict[str, tuple[int, int]], depth: int) -> Program:
    """A program whose numbers are straight lines over its depth."""
    value = {name: start + depth * rate for name, (start, rate) in rates.items()}
    gather = Collective("all-gather", ("fsdp",), 64)
    exchanges = Counter(
        {
            gather: value["gathers"],
            Collective("all-reduce", ("fsdp",), value["summed"]): 1,
            Collective("all-reduce", ("clients", "fsdp"), 8): 2,
        }
    )
    return Program("p", value["arguments"], value["temporaries"], exchanges, float(value["accessed"]), 1.0)


NUMBERS = ("gathers", "summed", "arguments", "temporaries", "accessed")
LINE = st.tuples(st.integers(1, 10**6), st.integers(0, 10**6))


@given(st.fixed_dictionaries(dict.fromkeys(NUMBERS, LINE)), st.integers(17, 100))
def test_straight_lines_are_extrapolated_exactly(rates, depth):
    found = pod_report._between(linear(rates, 8), linear(rates, 16), (depth - 8) / 8)
    assert found == replace(linear(rates, depth), seconds=2.0)


KIND = st.builds(
    Collective,
    st.sampled_from(["all-gather", "all-reduce"]),
    st.sampled_from([("fsdp",), ("clients", "fsdp")]),
    st.integers(1, 5),
)


@given(st.dictionaries(KIND, st.integers(1, 4)), st.dictionaries(KIND, st.integers(1, 4)), st.integers(1, 9))
def test_bytes_in_all_are_extrapolated_whatever_arrays_they_are_of(first, second, more):
    programs = [replace(linear(dict.fromkeys(NUMBERS, (1, 1)), 1), exchanges=Counter(one)) for one in (first, second)]
    totals = [{row[:2]: row[3] for row in collectives.in_rows(one.exchanges)} for one in programs]
    found = {row[:2]: row[3] for row in collectives.in_rows(pod_report._between(*programs, more).exchanges)}
    for row in {**totals[0], **totals[1]}:
        a, b = (total.get(row, 0) for total in totals)
        assert found[row] == a + more * (b - a)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["gradients", "step", "end"])
def test_real_programs_of_more_layers_are_as_extrapolated(which):
    expected = compiled(3)[which]
    found = pod_report._between(compiled(1)[which], compiled(2)[which], 2.0)
    assert found.arguments == expected.arguments
    assert collectives.in_rows(found.exchanges) == collectives.in_rows(expected.exchanges)
    np.testing.assert_allclose(found.temporaries, expected.temporaries, rtol=0.1)
    np.testing.assert_allclose(found.accessed, expected.accessed, rtol=0.05)


def test_deep_models_are_extrapolated_and_those_that_cannot_fit_are_not_compiled(monkeypatch):
    experiment, whole = small_experiment(), planned(small_experiment(), LARGE)
    assert shortened(experiment, LARGE).compiled_layers == (LAYERS,)
    with monkeypatch.context() as patch:
        patch.setattr(pod_report, "_MOST", LAYERS - 1)
        patch.setattr(pod_report, "_DEPTHS", (1, 2))
        found = shortened(experiment, LARGE)
    exact = ("weights", "clients", "flops", "exchanges", "layers", "mesh", "microbatch")
    assert [getattr(found, name) for name in exact] == [getattr(whole, name) for name in exact]
    assert found.compiled_layers == (1, 2)
    np.testing.assert_allclose(found.round, whole.round, rtol=0.1)
    held = whole.weights + whole.clients
    monkeypatch.setattr(pod, "compiled", lambda *_: pytest.fail("compiled in vain"))
    monkeypatch.setitem(CHIPS, "v5e", CHIP._replace(memory=held / 0.69))
    with pytest.raises(pytest.fail.Exception, match="in vain"):
        shortened(experiment, LARGE)
    monkeypatch.setitem(CHIPS, "v5e", CHIP._replace(memory=held / 0.71))
    assert shortened(experiment, LARGE) is None


@pytest.mark.parametrize("deep", [False, True])
def test_what_does_not_fit_is_compiled_again_to_spare_memory(monkeypatch, deep):
    right, asked = pod.compiled, []
    whole = planned(small_experiment(), LARGE)

    def compiled(one, options):
        asked.append(options)
        return [replace(program, temporaries=program.temporaries + (0 if options else 10**9)) for program in right(one)]

    monkeypatch.setattr(pod, "compiled", compiled)
    monkeypatch.setattr(pod_report, "SPARING", {"fuse": "false"})
    if deep:
        monkeypatch.setattr(pod_report, "_MOST", LAYERS - 1)
        monkeypatch.setattr(pod_report, "_DEPTHS", (1, 2))
    find, each = (shortened, 1 + deep) if deep else (planned, 1)
    assert find(small_experiment(), LARGE).options == {}
    assert asked == [{}] * each
    used = whole.weights + whole.clients + whole.temporaries
    monkeypatch.setitem(CHIPS, "v5e", CHIP._replace(memory=2 * used))
    found = find(small_experiment(), LARGE)
    assert (found.fits, found.options) == (True, {"fuse": "false"})
    assert asked[each:] == [{}] * each + [{"fuse": "false"}] * each
    monkeypatch.setitem(CHIPS, "v5e", CHIP._replace(memory=used / 2))
    found = planned(small_experiment(), LARGE)
    assert (found.fits, found.options) == (False, {"fuse": "false"})


# What a slice takes.


def test_a_roofline_is_bounded_by_the_slowest_of_three():
    assert Roofline(1.0, 3.0, 2.0).least == 3.0
    one = pod.pod_of(small_experiment(), devices(LARGE))
    program = replace(
        compiled(3)[0], accessed=8.19e9, exchanges=Counter({Collective("all-gather", ("fsdp",), 10**9): 8})
    )
    found = pod_report._roofline(CHIP, program, one.trainer.mesh, 394e12)
    np.testing.assert_allclose(found, (2.0, 0.01, 8 * 0.75 * 1e9 / 200e9), rtol=1e-12)


def test_a_round_is_made_of_its_programs():
    found, one = planned(small_experiment(), LARGE), pod.pod_of(small_experiment(), devices(LARGE))
    programs, mesh = compiled(3), one.trainer.mesh
    flops = [pod.training_flops(one), 0.0, 0.0]
    least = [
        max(
            count / CHIP.flops,
            program.accessed / CHIP.bandwidth,
            collectives.seconds(program.exchanges, mesh, CHIP.links),
        )
        for count, program in zip(flops, programs, strict=True)
    ]
    # Eight clients take four steps with eight rows each; sixteen rows are computed at a time.
    assert found.microbatch == (16, 8)
    microbatches = 8 * 4 * 8 / 16
    np.testing.assert_allclose(found.round, microbatches * least[0] + 4 * least[1] + least[2], rtol=1e-12)
    np.testing.assert_allclose(found.tokens_per_second, 8 * 4 * 8 * 8 / found.round, rtol=1e-12)
    assert found.step.least == least[0] > 0
    assert found.temporaries == max(program.temporaries for program in programs)
    assert (found.weights, found.clients) == tuple(pod.argument_bytes(one).values())
    assert list(found.exchanges) == [program.name for program in programs]
    assert json.loads(json.dumps(found.to_json()))["step"] == found.step._asdict()


def test_it_fits_where_there_is_room_for_all_of_it(monkeypatch):
    found = planned(small_experiment(), LARGE)
    used = found.weights + found.clients + found.temporaries
    for memory, fits in ((used / 0.96, False), (used / 0.94, True)):
        monkeypatch.setitem(CHIPS, "v5e", CHIP._replace(memory=memory))
        one = planned(small_experiment(), LARGE)
        assert (one.fits, one.memory) == (fits, int(memory))


def test_a_larger_slice_does_more_of_the_same(monkeypatch):
    monkeypatch.setitem(SHAPES, NAME, SHAPE | {"num_hidden_layers": 1})
    monkeypatch.setattr(pod, "compiled_ends", lambda one: [linear(dict.fromkeys(NUMBERS, (1, 1)), 1)] * 2)
    first = planned(small_experiment(MeshShape(1, 4), clients_per_chunk=4), SMALL)
    larger = planned(small_experiment(MeshShape(1, 4), clients_per_chunk=8), LARGE)
    found = elsewhere(first, LARGE)
    # What a chip holds and does, compiled for the larger slice, but for the sum at the round's end.
    exact = ("topology", "mesh", "microbatch", "weights", "clients", "memory", "flops", "layers", "fits", "model")
    assert [getattr(found, name) for name in exact] == [getattr(larger, name) for name in exact]
    assert (found.mesh, found.microbatch) == ((2, 4, 1), (16, 8))
    gradients = "gradients of a microbatch"
    assert found.exchanges[gradients] == larger.exchanges[gradients]
    np.testing.assert_allclose(found.step, larger.step, rtol=0.01)
    np.testing.assert_allclose(
        (found.round, found.tokens_per_second), (larger.round, larger.tokens_per_second), rtol=0.05
    )
    untouched = {"topology", "mesh", "microbatch", "tokens_per_second"}
    for name, value in vars(found).items():
        assert name in untouched or value == getattr(first, name)
    assert math.isclose(found.tokens_per_second, 2 * first.tokens_per_second)
    with pytest.raises(AssertionError, match="the same chips"):
        elsewhere(first, "v5p:2x2x2")


def test_a_slice_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(UserError, match="4 chips cannot be dealt out"):
        planned(small_experiment(MeshShape(1, 8)), SMALL)
