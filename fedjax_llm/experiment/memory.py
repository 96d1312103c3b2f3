"""What is kept from step to step and from run to run: compiled programs, and memory that was freed.

A training step frees and takes hundreds of megabytes, again and again.
"""

import ctypes
import sys

from fedjax_llm.experiment.compilation import use_compilation_cache

# Parameters of mallopt(3): <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def set_up_process() -> None:
    """What a command that trains begins with: compiled programs and freed memory are kept."""
    use_compilation_cache()
    keep_freed_memory()


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
