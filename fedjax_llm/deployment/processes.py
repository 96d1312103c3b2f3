"""Processes that end with the one that started them, whatever happens to it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError

_GRACE = 10.0  # seconds between a request to end and the end
# Linux then ends the process when its parent dies, even by a kill (PR_SET_PDEATHSIG, SIGTERM). It is asked for after
# the fork, by a Python of its own: code between fork and exec may hang where the parent has threads, as JAX makes them.
_END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"


class Processes:
    """Running processes by name, each with a log.

    Args:
      folder: of the logs.
      environment: of all of them.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a command in a group of its own, so that what it starts ends with it."""
        words = [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT] if sys.platform == "linux" else []
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                [*words, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.folder / f"{name}.log"

    def check(self) -> None:
        """Raises if a process has ended by itself.

        Raises:
          UserError: with the end of its log.
        """
        for name, process in self.running.items():
            if process.poll() is not None:
                raise UserError(f"{name} ended with status {process.returncode}; its log ends:\n{tail(self.log(name))}")

    def stop(self, name: str, at_once: bool = False) -> None:
        """Ends one process with all that it has started; ``at_once``: without asking it."""
        _end([self.running.pop(name)], 0.0 if at_once else _GRACE)

    def stop_all(self) -> None:
        """Ends all."""
        processes = list(self.running.values())
        self.running.clear()
        _end(processes, _GRACE)


@contextmanager
def processes(folder: Path, environment: Mapping[str, str]) -> Iterator[Processes]:
    """Processes that end where the block ends, or when this process is asked to."""
    started = Processes(folder, environment)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield started
    finally:
        signal.signal(signal.SIGTERM, before)
        started.stop_all()


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, started: Processes, seconds: float = 120.0) -> None:
    """Waits until something listens.

    Raises:
      UserError: nothing does, or a process has ended.
    """
    end = time.monotonic() + seconds
    while True:
        started.check()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > end:
            raise UserError(
                f"nothing listens on port {port} after {seconds:.0f} seconds; see the logs in {started.folder}"
            )
        time.sleep(0.2)


def program(name: str) -> str:
    """The path of a command that pip has installed beside this Python.

    Raises:
      UserError: it is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{name} is not installed: pip install 'fedjax_llm[flower]'")
    return str(path)


def tail(path: Path, lines: int = 15) -> str:
    """The end of a log."""
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else ""


def _end(found: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Asks groups of processes to end, then ends them."""
    if grace:
        for process in found:
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + grace
        while time.monotonic() < end and any(process.poll() is None for process in found):
            time.sleep(0.1)
    for process in found:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a process and all of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
