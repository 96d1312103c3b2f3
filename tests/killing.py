"""Runs that die, or are told to stop, at an instant."""

import importlib
import multiprocessing
import os
import signal
import sys

import jax
from small_run import go

PROCESSES = multiprocessing.get_context("forkserver")  # forks of a process that has imported, but not used, jax
PROCESSES.set_forkserver_preload(
    ["fedjax_llm.experiment.run", "fedjax_llm.runs.report", "orbax.checkpoint", "tensorboardX"]
)


def in_a_process(experiment, folder, owner="os", name="getpid", needle="", call=1, after=False):
    """Runs in a process of its own, which dies at an instant: before or after the ``call``-th call of a function whose
    first argument has ``needle`` in its text. Gives the exit status."""
    process = PROCESSES.Process(target=run_and_die, args=(experiment, folder, owner, name, needle, call, after))
    process.start()
    process.join(120)
    return process.exitcode


def run_and_die(experiment, folder, owner, name, needle, call, after):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    module, *inner = owner.split(":")
    place = importlib.import_module(module)
    place = getattr(place, inner[0]) if inner else place
    at_call(setattr, place, name, lambda: os.kill(os.getpid(), signal.SIGKILL), needle, call, after)
    sys.exit(go(experiment, folder)[0])


def at_call(put, place, name, act, needle="", call=1, after=False):
    """Replaces a function by one that acts at its ``call``-th call with ``needle`` in its first argument."""
    original, seen = getattr(place, name), 0

    def replaced(*args, **kwargs):
        nonlocal seen
        seen += needle in str(args[0] if args else "")
        now = seen == call and needle in str(args[0] if args else "")
        if now and not after:
            act()
        result = original(*args, **kwargs)
        if now and after:
            act()
        return result

    put(place, name, replaced)
