"""TPU slices that are not there: their devices as a compiler sees them, and what their chips can do."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedjax_llm.errors import UserError, nearest


class Chip(NamedTuple):
    """One chip, by its maker's data sheet (cloud.google.com/tpu/docs, pages "TPU v5e", "TPU v5p", "TPU v6e").

    Attributes:
      flops: bf16 operations a second.
      memory: bytes of HBM.
      bandwidth: of HBM, bytes a second.
      links: between chips, bytes a second out of a chip, all its links together; as many come in (the sheets give
        both directions together, which is twice as much).
      accelerator: how the environment names a kind of slice; the number that follows it counts
      cores: of which a chip has so many.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    accelerator: str
    cores: int = 1


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, "v5litepod"),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, "v5p", cores=2),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, "v6e"),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as ``v5e:4x4``.

    Raises:
      UserError: it is not written like that, or the kind is not known.
    """
    found = re.fullmatch(r"(\w+):\d+(x\d+)*", topology)
    if not found or found[1] not in CHIPS:
        known = ", ".join(f"{kind}:4x4" if kind != "v5p" else "v5p:2x2x4" for kind in CHIPS)
        near = nearest(topology.split(":")[0], CHIPS)
        raise UserError(f"--topology is {topology!r}{near}; it is a kind of chip and a shape, for example {known}")
    return CHIPS[found[1]]


def chips_in(topology: str) -> int:
    """How many chips a topology has."""
    count = 1
    for side in topology.split(":")[1].split("x"):
        count *= int(side)
    return count


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a slice, for ahead-of-time compilation: nothing can be run on them.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs their compiler (0.2 GB): pip install 'fedjax_llm[topology]'. No TPU is needed"
        )
    # Without these it would look for a machine's own TPUs, and let one process have them.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip.accelerator}-{chips_in(topology) * chip.cores}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the plugin raises several kinds
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"the TPU compiler does not know the topology {topology!r}: {reason}") from error
    return described.devices
