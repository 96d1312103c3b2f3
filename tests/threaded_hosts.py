"""Hosts as threads of one process, which exchange bytes through a list."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedjax_llm.federation.hosts import Hosts


def as_threads(count: int, act: Callable[[Hosts], Any]) -> list[Any]:
    """What ``act`` gives on each of so many hosts; the first that fails ends all."""
    barrier, slots = threading.Barrier(count, timeout=100), [b""] * count

    def exchange_of(index: int) -> Callable[[bytes], Sequence[bytes]]:
        def exchange(data: bytes) -> list[bytes]:
            slots[index] = data
            barrier.wait()
            told = list(slots)
            barrier.wait()  # before anyone tells more
            return told

        return exchange

    def run(index: int) -> Any:
        try:
            return act(Hosts(index, count, exchange_of(index)))
        except BaseException as error:
            barrier.abort()
            return error

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, range(count)))
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise error
    return results
