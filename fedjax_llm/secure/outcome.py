"""How a round of secure aggregation ends: with a sum, or abandoned."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_llm.errors import UserError


class Fault(NamedTuple):
    """What a client did against the protocol, and in which stage."""

    client: str
    stage: str
    reason: str


class Outcome(NamedTuple):
    """A sum.

    Attributes:
      total: uint [P] modulo 2^bits.
      survivors: whose inputs are in it, by name.
      faults: that clients were found in.
      traffic: by name, bytes received and sent, of all messages as they were.
    """

    total: np.ndarray
    survivors: tuple[str, ...]
    faults: tuple[Fault, ...]
    traffic: Mapping[str, tuple[int, int]] = {}


class Abandoned(UserError):
    """Too few clients are left: nothing is opened.

    Attributes:
      dropped: who left, by name.
      faults: that clients were found in.
      traffic: as in :class:`Outcome`.
    """

    def __init__(self, reason: str, dropped: tuple[str, ...], faults: tuple[Fault, ...]) -> None:
        blamed = "; ".join(f"{fault.client} in {fault.stage}: {fault.reason}" for fault in faults[:3])
        super().__init__(reason + (f" ({blamed})" if blamed else ""))
        self.dropped, self.faults = dropped, faults
        self.traffic: Mapping[str, tuple[int, int]] = {}
