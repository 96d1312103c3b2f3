"""What the examination of a computer finds, and what it advises."""

import hashlib
from datetime import UTC, datetime, timedelta

import jax
import pytest
from packaging.requirements import Requirement

from fedjax_llm.assets import WheelAsset
from fedjax_llm.experiment import doctor
from fedjax_llm.experiment.doctor import Answer

NEEDS = [Requirement(line) for line in ("jax>=0.10", "numpy>=2.0", "torch>=2.8; extra == 'parity'")]
GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "flax": "0.12.8"}
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def test_an_old_python_must_be_replaced():
    assert doctor.python(">=3.11", "3.12.1").advice == ""
    found = doctor.python(">=3.11", "3.10.2")
    assert found.must
    assert "install Python >=3.11" in found.advice


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, ""),
        ({"numpy": "1.26.0"}, "pip install 'numpy>=2.0'"),
        ({"numpy": None}, "pip install 'numpy>=2.0'"),
        ({"jaxlib": "0.10.1"}, "pip install jax==0.10.2 jaxlib==0.10.2"),
    ],
)
def test_packages_are_held_against_their_lower_bounds(changes, advice):
    found = doctor.packages(NEEDS, (GOOD | changes).get)
    assert (found.advice, found.must) == (advice, bool(advice))


def test_other_versions_than_the_known_good_ones_are_a_hint(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\njax==0.10.2\nnumpy==2.4.5\nabsent==1.0\nflax==9 ; python_version < '3'\n")
    found = doctor.pins(pins, GOOD.get)
    assert (found.found, found.must) == ("others of numpy 2.4.6", False)
    assert "-c constraints.txt" in found.advice
    assert doctor.pins(tmp_path / "none", GOOD.get).advice == ""


@pytest.mark.skipif(jax.devices()[0].platform != "cpu", reason="jax has found the accelerator")
def test_an_accelerator_that_jax_overlooks_must_be_fixed(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    gpu = [("cuda", "NVIDIA GPU")]
    assert doctor.devices([], GOOD.get).advice == ""
    missing = doctor.devices(gpu, GOOD.get)
    assert missing.must
    assert "pip install 'jax[cuda13]'" in missing.advice
    assert "compare driver and plugin" in doctor.devices(gpu, {"jax-cuda13-plugin": "1"}.get).advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    hidden = doctor.devices(gpu, GOOD.get)
    assert (hidden.must, hidden.advice) == (False, "JAX_PLATFORMS=cpu hides it: unset it")


def test_a_backend_that_does_not_start_must_be_fixed(monkeypatch):
    def broken():
        raise RuntimeError("no driver\nmore")

    monkeypatch.setattr(jax, "devices", broken)
    found = doctor.devices([], GOOD.get)
    assert (found.found, found.must) == ("no driver", True)


def test_little_memory_is_a_hint():
    assert doctor.memory(10**10).advice == ""
    assert "close other programs" in doctor.memory(10**9).advice
    assert doctor.memory(None).advice == ""


@pytest.mark.parametrize(("free", "must", "advised"), [(10**11, False, False), (2e9, False, True), (10**8, True, True)])
def test_a_full_disk_must_be_fixed_and_a_nearly_full_one_is_a_hint(tmp_path, monkeypatch, free, must, advised):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": int(free)}))
    found = doctor.disk("disk, runs", tmp_path / "not" / "made")
    assert (found.must, bool(found.advice)) == (must, advised)


def test_a_folder_that_cannot_be_written_must_be_fixed(tmp_path):
    assert doctor.writable("write access, runs", tmp_path / "new").advice == ""
    (tmp_path / "file").write_text("")
    found = doctor.writable("write access, cache", tmp_path / "file")
    assert found.must
    assert "FEDJAX_LLM_CACHE" in found.advice
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_downloads_are_hashed(tmp_path):
    asset = WheelAsset("thing==1.0", "", "thing/data.bin", hashlib.sha256(b"right").hexdigest())
    absent = doctor.downloaded(asset, tmp_path)
    assert (absent.must, "experiments.fetch" in absent.advice) == (False, True)
    path = tmp_path / "assets/thing-1.0/data.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"right")
    assert doctor.downloaded(asset, tmp_path).advice == ""
    path.write_bytes(b"wrong")
    changed = doctor.downloaded(asset, tmp_path)
    assert (changed.must, changed.advice) == (True, "python -m experiments.fetch --rehash")


def test_compiled_programs_are_measured(tmp_path):
    assert doctor.compiled(tmp_path / "none").found.startswith("none yet")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/program").write_bytes(bytes(3 * 10**6))
    assert doctor.compiled(tmp_path).found.startswith("3 MB")


def test_a_hub_out_of_reach_is_a_hint():
    assert doctor.hub(None).advice == ""
    assert doctor.hub(Answer(NOW)).advice == ""
    found = doctor.hub(Answer(None, "HF_HUB_OFFLINE is set"))
    assert ("HF_HUB_OFFLINE" in found.found, bool(found.advice), found.must) == (True, True, False)


@pytest.mark.parametrize(
    ("answer", "written", "must"),
    [
        (Answer(NOW - timedelta(minutes=4)), 0.0, False),
        (Answer(NOW + timedelta(minutes=6)), 0.0, True),
        (None, NOW.timestamp() - 60, False),
        (None, NOW.timestamp() + 3600, True),
        (Answer(None, "ConnectionError"), NOW.timestamp() + 3600, True),
    ],
)
def test_a_wrong_clock_must_be_set(answer, written, must):
    assert doctor.clock(NOW, answer, written).must == must


def test_extras_are_told_whole_or_absent():
    assert doctor.extras(NEEDS, GOOD.get).found == "there: none; not there: parity"
    assert doctor.extras(NEEDS, {"torch": "2.9.0"}.get).found == "there: parity; not there: none"
