"""Processes that are started for a federation end with the one that started them."""

import os
import subprocess
import sys

import pytest
from small_trial import alive, wait_until

from fedjax_llm.deployment.processes import processes

PARENT = """
import sys
from pathlib import Path
from fedjax_llm.deployment.processes import Processes
started = Processes(Path(sys.argv[1]), {})
print(started.start("child", [sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of a parent's end")
def test_a_process_ends_when_its_parent_is_killed(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command, pipe = [sys.executable, "-c", PARENT, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as parent:
        child = int(parent.stdout.readline())
        wait_until(lambda: "sleep" in subprocess.check_output(["ps", "-o", "args=", "-p", str(child)], text=True))
        parent.kill()
        parent.wait(60)
        wait_until(lambda: not alive(child))


def test_a_process_has_its_log_and_its_end_is_that_of_the_command(tmp_path):
    with processes(tmp_path, os.environ) as started:
        process = started.start("one", [sys.executable, "-c", "print('heard'); raise SystemExit(3)"])
        assert process.wait(60) == 3
        assert started.log("one").read_text() == "heard\n"
