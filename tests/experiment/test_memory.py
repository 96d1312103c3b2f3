"""Freed memory stays with the process: measured in one of its own, since what it changes cannot be taken back."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm.experiment import memory

_PROGRAM = """
import resource
import numpy as np
from fedjax_llm.experiment.memory import keep_freed_memory

kept = {keep} and keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24).sum()  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(int(kept), faults())
"""


def run(keep: bool) -> list[int]:
    command = [sys.executable, "-c", _PROGRAM.format(keep=keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_second_array_takes_no_new_pages():
    kept, faults = run(keep=True)
    if not kept:
        pytest.skip("this C library has no mallopt")
    _, otherwise = run(keep=False)
    assert faults < 100 < otherwise


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_programs_are_let_go_where_they_take_too_many_mappings(monkeypatch, tmp_path):
    function = jax.jit(lambda x: x + 1)
    function(jnp.ones(3))
    assert not memory.make_room_for_programs(1.0)
    assert function._cache_size() == 1
    assert memory.make_room_for_programs(0.0)
    assert function._cache_size() == 0
    assert function(jnp.ones(3)).tolist() == [2, 2, 2]
    monkeypatch.setattr(memory, "_MOST_MAPPINGS", tmp_path / "absent")
    assert not memory.make_room_for_programs(0.0)
