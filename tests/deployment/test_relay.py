"""The socket between Flower's ClientApp and the process that holds a site's text."""

import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedjax_llm.deployment.messages import FAILED, Said
from fedjax_llm.deployment.relay import call, listen
from fedjax_llm.errors import UserError


def serve(path: Path, answer, requests: int) -> threading.Thread:
    """Listens in a thread for so many requests."""
    left = list(range(requests))
    thread = threading.Thread(target=listen, args=(path, answer, lambda: not left or (left.pop() and False)))
    thread.start()
    return thread


def test_what_is_asked_is_answered_and_only_the_owner_can_ask(tmp_path):
    path = tmp_path / "site" / "worker.sock"
    thread = serve(path, lambda said: Said("heard", {"word": said.word}, [said.arrays[0] + 1]), 2)
    found = call(path, Said("train", {}, [np.arange(3)]))
    assert (found.word, found.values["word"], found.arrays[0].tolist()) == ("heard", "train", [1, 2, 3])
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert call(path, Said("hello", {}, [np.zeros(1)])).values["word"] == "hello"
    thread.join(10)
    assert not thread.is_alive()


def test_a_fault_of_the_worker_is_told_without_what_it_knows(tmp_path):
    def broken(said: Said) -> Said:
        raise ValueError("Mrs Smith, born 1931")

    path = tmp_path / "w"
    thread = serve(path, broken, 1)
    found = call(path, Said("train"))
    thread.join(10)
    assert found.word == FAILED
    assert "ValueError" in found.why
    assert "Smith" not in found.why


def test_a_worker_that_is_not_there_is_waited_for_and_then_missed(tmp_path):
    path = tmp_path / "w"
    with pytest.raises(UserError, match="worker does not run"):
        call(path, Said("hello"), patience=0.0)
    late = threading.Thread(target=lambda: (time.sleep(0.3), serve(path, lambda said: said, 1)))
    late.start()
    assert call(path, Said("hello")).word == "hello"
    late.join(10)


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(UserError, match="too long for a socket"):
        listen(tmp_path / ("x" * 120), lambda said: said)
