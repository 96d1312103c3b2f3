"""Slices that are not there: their names, their chips, and a program that is really compiled for one."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_pod import INNER, KV_HEADS, LAYERS, VOCABULARY, WIDTH

from experiments.pod_plan import SLICES
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import tpu_topology
from fedjax_llm.experiment.tpu_topology import CHIPS, chip_of, chips_in, devices_of

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="wants the TPU compiler; pip install 'fedjax_llm[topology]' (0.2 GB), no TPU is needed",
)


@pytest.mark.parametrize(("topology", "count"), [("v5e:4x4", 16), ("v5p:2x2x4", 16), ("v6e:16x16", 256), ("v5e:8", 8)])
def test_a_topology_has_so_many_chips_of_a_kind(topology, count):
    assert chips_in(topology) == count
    assert chip_of(topology) is CHIPS[topology[:3]]


@pytest.mark.parametrize(
    "topology", ["v5e", "v5e:", "v5e:4x", "v5e:x4", "v5e:4X4", "v7:4x4", "4x4", "", "v5e:4x4 ", "v5e:-4"]
)
def test_what_is_no_topology_is_refused_with_an_example(topology):
    with pytest.raises(UserError, match="for example v5e:4x4, v5p:2x2x4") as refused:
        chip_of(topology)
    assert repr(topology) in str(refused.value)
    with pytest.raises(UserError, match="for example"):
        devices_of(topology)


def test_a_kind_that_is_nearly_right_is_suggested():
    with pytest.raises(UserError, match="did you mean 'v5p'"):
        chip_of("v5pp:2x2x4")


def test_slices_of_a_kind_have_the_same_numbers_of_chips():
    assert set(SLICES) == set(CHIPS)
    for kind, slices in SLICES.items():
        assert [chips_in(one) for one in slices] == [8, 16, 64, 256]
        assert {chip_of(one) for one in slices} == {CHIPS[kind]}


def test_chips_can_do_what_their_pods_can_do_together():
    """The sheets give a pod's figures too: arithmetic of 256 chips, and all-reduce over a chip's links one way."""
    for kind, petaflops, terabytes in (("v5e", 50.63, 51.2), ("v6e", 234.9, 102.4)):
        chip = CHIPS[kind]
        assert math.isclose(256 * chip.flops, petaflops * 1e15, rel_tol=0.005)
        assert math.isclose(256 * chip.links, terabytes * 1e12, rel_tol=0.001)
    # Links of 50 GB/s in v5e; v5p and v6e have links of 100 GB/s, to six and to four neighbours.
    assert [chip.links / 1e9 for chip in (CHIPS["v5e"], CHIPS["v5p"], CHIPS["v6e"])] == [4 * 50, 6 * 100, 4 * 100]


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else SimpleNamespace())
    with pytest.raises(UserError, match=r"pip install 'fedjax_llm\[topology\]'\. No TPU is needed"):
        devices_of("v5e:4x4")


def test_what_the_compiler_refuses_is_passed_on_in_one_line(monkeypatch):
    from jax.experimental import topologies

    def refuse(**options):
        raise RuntimeError(f"no {options['topology_name']}\nand much more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(tpu_topology, "os", SimpleNamespace(environ={}))
    with pytest.raises(UserError, match=r"does not know the topology 'v5e:3x5': no v5e:3x5$"):
        devices_of("v5e:3x5")


def test_the_environment_names_slices_as_their_maker_does(monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **options: SimpleNamespace(devices=[options]))
    names = {}
    for topology in ("v5e:4x4", "v5p:2x2x4", "v6e:2x4"):
        environment: dict[str, str] = {}
        monkeypatch.setattr(tpu_topology, "os", SimpleNamespace(environ=environment))
        assert devices_of(topology) == [{"platform": "tpu", "topology_name": topology}]
        names[topology] = environment["TPU_ACCELERATOR_TYPE"]
    assert names == {"v5e:4x4": "v5litepod-16", "v5p:2x2x4": "v5p-32", "v6e:2x4": "v6e-8"}


COMPILED = """
import json
from small_pod import devices, on_virtual_devices, small_experiment
from fedjax_llm.experiment import pod, pod_report
from fedjax_llm.experiment.tpu_topology import CHIPS, devices_of
found = {f"{kind}:{shape}": len(devices_of(f"{kind}:{shape}"))
         for kind, shape in (("v6e", "2x4"), ("v5p", "2x2x2"), ("v5e", "2x4"))}
try:
    devices_of("v5e:3x5")
except Exception as error:
    found["refused"] = type(error).__name__
with on_virtual_devices():
    pod_report.devices_of = devices_of
    planned = pod_report.planned(small_experiment(dtype="bfloat16"), "v5e:2x4")
    one = pod.pod_of(small_experiment(dtype="bfloat16"), devices("v5e:2x4"))
    held = pod.argument_bytes(one)
print(json.dumps({"found": found, "planned": planned.to_json(), "held": held}))
"""


@compiler
def test_a_round_compiles_for_a_slice_that_is_not_there():
    """In a process of its own, whose environment the compiler has changed."""
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] == {"v6e:2x4": 8, "v5p:2x2x2": 8, "v5e:2x4": 8, "refused": "UserError"}
    planned = told["planned"]
    assert {"weights": planned["weights"], "clients": planned["clients"]} == told["held"]
    assert planned["fits"]
    assert 0 < planned["temporaries"] < 0.01 * planned["memory"]
    gradients, step, end = planned["exchanges"].values()
    (gathered,) = [row for row in gradients if row[0] == "all-gather"]
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH // 4 * KV_HEADS) + 3 * WIDTH * INNER
    # Every layer is gathered for the forward pass and again for the backward pass: none is kept.
    assert gathered == ["all-gather", "fsdp", 2 * 7 * LAYERS + 2, 2 * (2 * LAYERS * layer + 2 * VOCABULARY * WIDTH)]
    assert {row[1] for row in gradients} == {"fsdp"}
    assert step == []
    assert all("clients" in row[1] for row in end)
