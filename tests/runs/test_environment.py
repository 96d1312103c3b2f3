"""What is written down about the machine and the code."""

import json
import platform
import subprocess

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


def test_peak_memory_is_in_bytes_and_sees_an_allocation():
    size = environment.peak_rss_bytes() + 2**26
    held = np.ones(size, np.uint8)
    assert environment.peak_rss_bytes() > size > 2**25
    del held
