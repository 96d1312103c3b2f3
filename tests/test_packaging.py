"""Metadata, pins and make targets say what is true of the code."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

import fedjax_llm

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py hands to setuptools."""
    said: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **named: said.update(named))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return said


def requirements(metadata: dict) -> list[Requirement]:
    """Those of the package and of all its extras."""
    lines = [*metadata["install_requires"], *(line for extra in metadata["extras_require"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def canonical(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(python: str, file: str = "constraints.txt") -> dict[str, str]:
    """Name -> version for one Python."""
    found = {}
    for line in (ROOT / file).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert canonical(pin.name) not in found, f"{pin.name} is pinned twice for Python {python}"
                (specifier,) = pin.specifier
                assert specifier.operator == "==", line
                found[canonical(pin.name)] = specifier.version
    return found


def test_metadata(metadata: dict):
    assert metadata["name"] == "fedjax_llm"
    assert metadata["version"] == fedjax_llm.__version__
    assert metadata["python_requires"] == ">=3.11"
    extras = metadata["extras_require"]
    tested = ("test", "lint", "flower", "sql", "serve", "wandb", "mlflow")
    assert {one for name in tested for one in extras[name]} <= set(extras["dev"])
    assert {"parity", "hub", "topology", "dev"} <= set(extras)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_pin_that_satisfies_it(metadata: dict, python: str):
    known = pins(python)
    for requirement in requirements(metadata):
        assert canonical(requirement.name) in known, f"{requirement.name} has no pin for Python {python}"
        assert requirement.specifier.contains(known[canonical(requirement.name)]), f"{requirement} excludes its pin"


def test_python_3_11_is_held_at_the_last_jax_that_supports_it():
    assert (pins("3.11")["jax"], pins("3.11")["flax"]) == ("0.10.2", "0.12.8")
    assert pins("3.12")["jax"] != "0.10.2"
    assert all(pins(python)["jax"] == pins(python)["jaxlib"] for python in PYTHONS)


def test_the_benchmarks_peers_are_pinned_and_use_the_same_torch():
    known = pins("3.11", "benchmarks/peers-constraints.txt")
    wanted = [Requirement(line) for line in (ROOT / "benchmarks/peers.txt").read_text().splitlines() if line[0] != "#"]
    assert {canonical(requirement.name) for requirement in wanted} <= set(known)
    assert all(known[name] == pins("3.11")[name] for name in ("torch", "peft", "transformers"))


def test_every_library_that_is_imported_is_declared(metadata: dict):
    declared = {canonical(requirement.name) for requirement in requirements(metadata)}
    distributions = importlib.metadata.packages_distributions()
    own = {"fedjax_llm", "experiments", "configs"}
    undeclared = set()
    for folder in own:
        for path in (ROOT / folder).rglob("*.py"):
            for name in top_level_imports(path) - own - sys.stdlib_module_names:
                if not declared & {canonical(owner) for owner in distributions.get(name, [name])}:
                    undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared, f"imported, but in no list of setup.py: {sorted(undeclared)}"


def top_level_imports(path: Path) -> set[str]:
    """First names of a file's absolute imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    origin = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in plain | origin}


def test_a_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path: Path):
    checkout = copy_checkout(tmp_path)
    pip = (sys.executable, "-m", "pip")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), ".", folder=checkout)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("fedjax_llm-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (checkout / "fedjax_llm").rglob("*") if path.is_file())
    assert names == {path.relative_to(checkout).as_posix() for path in files}
    assert "fedjax_llm/runs/report.html" in names


def copy_checkout(folder: Path) -> Path:
    """What a build or make reads, apart from this checkout, so that neither leaves anything in it."""
    checkout = folder / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fedjax_llm", ".ci"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, checkout)
    return checkout


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command, free of what an outer make has set."""
    inherited = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_make_without_a_target_names_every_target():
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    told = run("make").stdout
    assert all(f"make {target}" in told for target in phony.split() if target != "help")


def test_make_says_so_where_no_python_is_new_enough(tmp_path: Path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the probe of a version before 3.11 comes to
    old.chmod(0o755)
    ran = run("make", "quickstart", f"PYTHON={old}", folder=copy_checkout(tmp_path))
    assert ran.returncode != 0
    assert f"No Python >= 3.11 with venv was found (tried: {old})" in ran.stderr
    assert "make PYTHON=" in ran.stderr


def test_make_installs_once_and_again_when_the_pins_change(tmp_path: Path):
    checkout = copy_checkout(tmp_path)
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> calls\n')
    python.chmod(0o755)

    def installs() -> int:
        assert run("make", "test", folder=checkout).returncode == 0
        return (checkout / "calls").read_text().count("-m pip install -c constraints.txt -e .[dev]")

    assert installs() == 1
    assert installs() == 1
    later = (checkout / ".venv/.installed-dev").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert installs() == 2
    assert "-m not parity" in (checkout / "calls").read_text()


@pytest.mark.parametrize(("broken", "stages"), [("none", 6), ("test", 2)])
def test_ci_runs_its_stages_in_order_times_them_and_stops_at_a_failure(broken: str, stages: int, tmp_path: Path):
    checkout = copy_checkout(tmp_path)
    stub = tmp_path / "bin/make"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\n[ "$1" != {broken} ]\n')
    stub.chmod(0o755)
    ran = run(checkout / ".ci/run", PATH=f"{stub.parent}:{os.environ['PATH']}")
    assert (ran.returncode == 0) == (broken == "none")
    timed = re.findall(r"^=== make (\w+) +\d+ s  status (\d)$", ran.stdout, re.MULTILINE)
    assert [name for name, _ in timed] == ["lint", "test", "parity", "flower", "docs", "pythons"][:stages]
    assert [name for name, status in timed if status != "0"] == ([] if broken == "none" else [broken])


def test_parity_without_torch_is_refused_rather_than_skipped(tmp_path: Path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "torch_is_absent.py").write_text("import sys\nsys.modules['torch'] = None\n")
    command = [sys.executable, "-m", "pytest", "-p", "torch_is_absent", "-m", "parity", str(tmp_path)]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    ran = run(*command, folder=tmp_path, PYTHONPATH=paths)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "make parity" in ran.stderr


def test_a_test_for_accelerators_is_skipped_with_a_reason_where_there_is_none(tmp_path: Path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    source = "import pytest\n@pytest.mark.accelerator\ndef test_a(): pass\ndef test_b(): pass\n"
    (tmp_path / "test_marked.py").write_text(source)
    command = (sys.executable, "-m", "pytest", "-rs", str(tmp_path))
    ran = run(*command, folder=tmp_path, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    assert "1 passed, 1 skipped" in ran.stdout
    assert "jax.devices() has only the CPU" in ran.stdout
