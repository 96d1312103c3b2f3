"""Freed memory stays with the process: measured in one of its own, since what it changes cannot be taken back."""

import subprocess
import sys

import pytest

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
