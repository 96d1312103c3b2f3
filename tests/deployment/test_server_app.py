"""The process of the server's run, which must not outlive the processes of Flower that started it."""

import os
import signal
import subprocess
import sys

import pytest
from small_trial import alive, wait_until

pytest.importorskip("flwr", reason="the extra [flower] is not installed")
RUN = """
import os, threading
from fedjax_llm.deployment import server_app
server_app._GRACE = 0.1
threading.Thread(target=server_app._end_with, args=(os.getppid(),), daemon=True).start()
print(os.getpid(), flush=True)
threading.Event().wait()
"""
SUPEREXEC = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


def test_a_run_that_hears_no_signal_ends_after_the_superexec():
    command = [sys.executable, "-c", SUPEREXEC, RUN]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as superexec:
        run = int(superexec.stdout.readline())
        try:
            assert alive(run)
            superexec.kill()
            superexec.wait(60)
            wait_until(lambda: not alive(run))
        finally:
            if alive(run):
                os.kill(run, signal.SIGKILL)
