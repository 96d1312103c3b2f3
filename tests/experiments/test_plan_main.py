"""``python -m experiments.plan --topology``: tables and JSON of rounds compiled for slices, and what is refused."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from small_pod import CONFIG, LAYERS, NAME, devices, on_virtual_devices, small_experiment

from experiments import pod_plan
from experiments.plan import main
from fedjax_llm.experiment import pod, pod_report
from fedjax_llm.experiment.tpu_topology import CHIPS
from fedjax_llm.mesh import MeshShape

SMALL = f'''"""The published configuration of a tiny model."""

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location

from fedjax_llm.mesh import MeshShape

spec = spec_from_file_location("published", {str(CONFIG)!r})
published = module_from_spec(spec)
spec.loader.exec_module(published)


def get_config():
    base = published.get_config()
    return replace(
        base,
        model=replace(base.model, name={NAME!r}, dtype="float32"),
        lora=replace(base.lora, rank=1, targets=("q_proj",)),
        data=replace(base.data, max_length=8),
        execution=replace(base.execution, tokens_per_microbatch=16, mesh=MeshShape(1, 4)),
    )
'''


@pytest.fixture(scope="module", autouse=True)
def virtual() -> Iterator[None]:
    with on_virtual_devices():
        yield


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "small.py").write_text(SMALL)
    return f"--config={tmp_path / 'small.py'}"


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """Of as many chips as there are virtual devices, in a terminal that holds a table's row."""
    monkeypatch.setattr(pod_plan, "SLICES", {"v5e": ("v5e:2x2", "v5e:2x4"), "v5p": ("v5p:2x2x2",)})
    monkeypatch.setenv("COLUMNS", "200")


def test_a_slice_is_described(config, capsys):
    assert main([config, "--topology=v5e:2x4"]) == 0
    told = capsys.readouterr().out
    for phrase in (
        "Compiled for v5e:2x4, not run",
        f"{NAME}, {LAYERS} layers",
        "clients 2 x fsdp 4 x tensor 1",
        "16 rows x 8 tokens",
        ": fits",
        "gradients of a microbatch: all-gather over fsdp",
        "end of a round: all-reduce over clients",
        "tokens a second, at most",
    ):
        assert phrase in told


def test_one_that_does_not_fit_says_so(config, capsys, monkeypatch):
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(memory=1e5))
    assert main([config, "--topology=v5e:2x4"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_options_override_and_json_is_the_plan(config, capsys):
    assert main([config, "--topology=v5e:2x4", "--json", "--training.batch-size=16"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["mesh"], told["microbatch"], told["fits"]) == ([2, 4, 1], [16, 8], True)
    held = pod.argument_bytes(pod.pod_of(small_experiment(), devices("v5e:2x4")))
    assert (told["weights"], told["clients"]) == (held["weights"], held["clients"])
    found = pod_report.planned(small_experiment(MeshShape(1, 4)), "v5e:2x4")
    microbatch = max(found.step)
    # Of batches of 16 rather than 8 there are twice as many microbatches: 8 clients x 4 steps x 8 / 16 more.
    assert told["round"] - found.round == pytest.approx(16 * microbatch)


def test_all_slices_make_a_table(config, capsys):
    assert main([config, "--topology=all"]) == 0
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if NAME in line]
    assert [row[1:3] for row in rows] == [["v5e:2x2", "1 x 4"], ["v5e:2x4", "2 x 4"], ["v5p:2x2x2", "2 x 4"]]
    speeds = [float(row[-1].replace(",", "")) for row in rows]
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.01)


def test_all_slices_as_json_are_an_object_a_line(config, capsys, monkeypatch):
    monkeypatch.setitem(CHIPS, "v5p", CHIPS["v5p"]._replace(memory=1e4))
    assert main([config, "--topology=all", "--json"]) == 0
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [(line["topology"], line["fits"]) for line in lines] == [("v5e:2x2", True), ("v5e:2x4", True)]
    assert f"{NAME} does not fit any slice of v5p." in told.err


def test_weights_are_spread_over_as_few_chips_as_hold_them(config, capsys, monkeypatch):
    """Over eight where four do not hold them, and then on the slice that has eight."""
    monkeypatch.setattr(pod_plan, "SLICES", {"v5e": ("v5e:2x2", "v5e:2x4", "v5e:4x4")})
    base, asked = pod_report.planned(small_experiment(MeshShape(1, 4)), "v5e:2x2"), []

    def shortened(experiment, topology):
        mesh = experiment.execution.mesh
        asked.append((topology, mesh.clients, mesh.fsdp))
        return replace(base, topology=topology, mesh=(mesh.clients, mesh.fsdp, 1), fits=mesh.fsdp == 8)

    monkeypatch.setattr(pod_plan, "shortened", shortened)
    assert main([config, "--topology=all", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["topology"], line["mesh"]) for line in lines] == [("v5e:2x4", [1, 8, 1]), ("v5e:4x4", [2, 8, 1])]
    assert asked == [("v5e:2x2", 1, 4), ("v5e:2x4", 1, 8)]


def test_what_the_compiler_has_to_be_told_is_said(config, capsys, monkeypatch):
    found = replace(pod_report.planned(small_experiment(MeshShape(1, 4)), "v5e:2x2"), options={"fuse": "false"})
    monkeypatch.setattr(pod_plan, "SLICES", {"v5e": ("v5e:2x2",)})
    monkeypatch.setattr(pod_plan, "shortened", lambda *_: found)
    assert main([config, "--topology=all"]) == 0
    told = capsys.readouterr().out
    assert "v5e:2x2*" in told
    assert "*: run with LIBTPU_INIT_ARGS=--fuse=false" in told
    monkeypatch.setattr(pod_plan, "planned", lambda *_: found)
    assert main([config, "--topology=v5e:2x2"]) == 0
    assert "LIBTPU_INIT_ARGS=--fuse=false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5q:4x4"], "--topology is 'v5q:4x4'; did you mean 'v5p'"),
        (["--topology=v5e:2x4", "--execution.mesh.fsdp=3"], "8 chips cannot be dealt out"),
        (["--topology=v5e:2x4", "--model.name=llama"], "the shape of the model 'llama' is not known"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(config, capsys, arguments, message):
    assert main([config, *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "Traceback" not in told.err + told.out


def test_without_the_compiler_it_is_said_at_once_what_to_install(config, capsys, monkeypatch):
    from fedjax_llm.experiment import tpu_topology

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    monkeypatch.setattr(pod_plan, "devices_of", tpu_topology.devices_of)
    assert main([config, "--topology=v5e:4x4"]) == 2
    assert "pip install 'fedjax_llm[topology]'" in capsys.readouterr().err


def test_the_help_names_the_options_of_a_plan(capsys):
    with pytest.raises(SystemExit) as ended:
        main([f"--config={CONFIG}", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "a TPU slice such as v5e:4x4" in told.replace("``", "").replace("`", "")
    for option in ("--topology", "--calibrate", "--json", "--execution.mesh.fsdp"):
        assert option in told
