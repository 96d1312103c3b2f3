"""What is kept from step to step and from run to run: compiled programs, and memory that was freed.

A training step frees and takes hundreds of megabytes, again and again.
"""

import ctypes
import gc
import sys
from pathlib import Path

import jax

from fedjax_llm.experiment.compilation import use_compilation_cache

_MAPPINGS, _MOST_MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

# Parameters of mallopt(3): <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def set_up_process() -> None:
    """What a command that trains begins with: compiled programs and freed memory are kept."""
    use_compilation_cache()
    keep_freed_memory()
    make_room_for_programs()


def make_room_for_programs(share: float = 0.25) -> bool:
    """Lets go of the process's compiled programs, if they take more than a share of the mappings that Linux gives it.

    Each takes a few of 65,530. A process that has used them up, after thousands of programs, is killed by the next one
    that is compiled. What is still wanted is read again from the cache on disk.

    Args:
      share: of the mappings, from 0 to 1.

    Returns:
      Whether it let go of them; never where the system does not tell how many there are.
    """
    try:
        used, most = _MAPPINGS.read_bytes().count(b"\n"), int(_MOST_MAPPINGS.read_text())
    except (OSError, ValueError):
        return False
    if used <= share * most:
        return False
    jax.clear_caches()
    gc.collect()
    return True


def release_freed_memory() -> None:
    """Gives back what is kept, so that a peak can be measured from there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Has freed memory kept for the next step, rather than given back to the system, which would clear it page by page.

    On two cores it saves a tenth of a training step. Memory that was needed once stays with the process.

    Returns:
      Whether the C library could be told (glibc can).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Large blocks from the one heap, not each from the system; and nothing of the heap given back below 2 GiB.
    return all(mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_ARENA_MAX, 1), (_TRIM_THRESHOLD, 2**31 - 1)))
