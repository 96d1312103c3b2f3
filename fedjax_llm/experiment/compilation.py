"""The compilation cache, and how long compiling took."""

import time

import jax

from fedjax_llm.assets import cache_dir

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class CompileClock:
    """Counts the seconds that jax spends on tracing, lowering and compiling (or on reading its cache)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int | float) -> None:
        """Called by jax when an event ends. It may hold others that ended before: no second counts twice."""
        if event not in _EVENTS:
            return
        end = time.perf_counter()
        start = end - duration_secs
        while self._spans and self._spans[-1][0] >= start:
            begun, ended = self._spans.pop()
            self.seconds -= ended - begun
        if self._spans:
            start = max(start, self._spans[-1][1])
        self._spans.append((start, end))
        self.seconds += end - start


def use_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, unless the user has chosen another place (or none)."""
    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] is None and chosen["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
