"""Seconds of compiling are counted once, however the events nest."""

import time

import jax
import jax.numpy as jnp

from fedjax_llm.experiment import compilation
from fedjax_llm.experiment.compilation import CompileClock


def test_nested_and_overlapping_events_count_once(monkeypatch):
    clock, now = CompileClock(), iter([2.0, 4.0, 5.0, 9.0])
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: next(now))
    trace, backend = compilation._EVENTS[0], compilation._EVENTS[2]
    clock._add(trace, 1.0)  # 1 to 2, inside the next but one
    clock._add(trace, 1.0)  # 3 to 4, inside the next
    clock._add(trace, 5.0)  # 0 to 5
    clock._add(backend, 3.0)  # 6 to 9
    clock._add("/jax/another/event", 100.0)
    assert clock.seconds == 8.0


def test_a_compilation_is_counted_and_a_second_call_is_not():
    clock = CompileClock()
    began = time.perf_counter()
    function = jax.jit(lambda x: jnp.tanh(x @ x) + 3.25)
    jax.block_until_ready(function(jnp.ones((5, 5))))
    spent = time.perf_counter() - began
    assert 0 < clock.seconds <= spent
    counted = clock.seconds
    jax.block_until_ready(function(jnp.ones((5, 5))))
    assert clock.seconds == counted
