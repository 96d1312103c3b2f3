"""What is written down about the machine and the code."""

import json
import platform
import subprocess
from pathlib import Path

import jax
import numpy as np

from fedjax_llm.runs import environment


def test_the_description_is_json_and_names_versions_and_devices():
    facts = json.loads(json.dumps(environment.describe()))
    assert facts["packages"]["jax"] == jax.__version__
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["python"] == platform.python_version()
    assert len(facts["devices"]) == len(jax.devices())
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28
    assert facts["started"].endswith("+00:00")


def test_git_state_sees_commit_and_changes_of_tracked_files(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )

    code = tmp_path / "code.py"
    code.write_text("x = 1\n")
    assert environment.git_state(code) is None, "no checkout"
    git("init", "-q")
    assert environment.git_state(code) is None, "not tracked"
    git("add", "code.py")
    git("commit", "-qm", "first")
    clean = environment.git_state(code)
    assert clean == {"commit": git("rev-parse", "HEAD").stdout.strip(), "dirty": False}
    code.write_text("x = 2\n")
    assert environment.git_state(code) == clean | {"dirty": True}


def test_peak_memory_is_in_bytes():
    peak, memory = environment.peak_rss_bytes(), environment.describe()["memory_bytes"]
    assert 2**25 < peak <= memory, "Python with jax is more than 32 MiB, and less than all there is"
    status = Path("/proc/self/status")
    if status.exists():
        kibibytes = int(status.read_text().split("VmRSS:")[1].split()[0])
        assert kibibytes * 1024 <= 1.01 * environment.peak_rss_bytes()
