"""Several hosts, each with clients of its own: who owns whom, how they exchange values, and what happens if one dies.

Hosts train without lockstep; what they exchange (``Hosts.gather``) is the size of adapters. This file alone knows
``jax.distributed``. Its tasks are made recoverable, without which the death of any ends all at once; then
``live_devices`` waits for all hosts and tells who is gone, before any of them enters a collective that would hang.
Host 0 also holds jax's coordination service. Where that is gone, jax's client aborts the process from a thread of its
own and cannot be asked not to: there the signal is caught, and a message takes the place of the abort.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import msgpack
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.types import PyTree

AGAIN = "start all hosts again with --resume"
"""What to do when a host has died."""
T = TypeVar("T")
_ARRAY = 1  # msgpack extension type


class HostGone(UserError):
    """Another host died. The message says which."""


@dataclass(frozen=True)
class Cluster:
    """The hosts of a run, as a command line names them.

    Attributes:
      coordinator: ``ADDRESS:PORT`` of host 0, as the others reach it.
      count: how many hosts.
      index: of this one, from 0.
      patience: seconds without a sign of life after which a host counts as gone.
    """

    coordinator: str | None = None
    count: int = 1
    index: int = 0
    patience: int = 30

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(f"hosts.index is {self.index} of hosts.count={self.count}; indices begin with 0")
        if self.patience < 1:
            raise UserError(f"hosts.patience is {self.patience}; it must be at least 1 second")
        if self.count > 1 and not _is_address(self.coordinator):
            raise UserError(
                f"hosts.coordinator is {self.coordinator!r}; name host 0 as the others reach it, e.g. 10.0.0.1:8476"
            )


@dataclass(frozen=True)
class Hosts:
    """This host among all.

    Attributes:
      index: of this one.
      count: how many.
      exchange: this host's bytes -> those of all, in order; every host must call it, equally often.
      remember: takes what shall be said, besides that it is gone, if host 0 dies.
      clients: the places of this host's clients where hosts trust each other with no more than the exchange: then each
        keeps its own state and secret keys. ``None``: clients are dealt out in turn, and keys and state are host 0's.
      train: takes the place of training clients here: (plan, state, cohort, attempt) -> what came of them
        (``joining.Part``) and of secure aggregation (``secured.Ended``, or ``None``).
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[bytes], Sequence[bytes]] = field(default=lambda data: [data], repr=False)
    remember: Callable[[str], None] = field(default=lambda text: None, repr=False)
    clients: tuple[int, ...] | None = None
    train: Callable[..., tuple[Any, Any]] | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this host is the one that writes the run."""
        return self.index == 0

    def owns(self, place: int) -> bool:
        """Whether the client at a place among all is this host's."""
        return place % self.count == self.index if self.clients is None else place in self.clients

    def gather(self, value: Any) -> list[Any]:
        """Every host's value, in their order; with one host, just this value.

        Args:
          value: dictionaries with text as keys, lists, numbers, text, ``None`` and arrays (which come back as NumPy's).

        Raises:
          HostGone: another host died.
        """
        if self.count == 1:
            return [value]
        return [unpacked(data) for data in self.exchange(packed(value))]

    def from_first(self, value: Any) -> Any:
        """What host 0 passes here; what the others pass is not looked at."""
        return self.gather(value if self.first else None)[0]

    def merge(self, own: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
        """What every host knows of its own sites, put together in the order of all sites; some may be in no host's."""
        found = {name: value for part in self.gather(dict(own)) for name, value in part.items()}
        return {name: found[name] for name in order if name in found}

    def tree_from_first(self, tree: PyTree) -> PyTree:
        """Host 0's arrays and keys in the structure of this host's tree."""
        if self.count == 1 or self.clients is not None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        data = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
        found = self.from_first([np.asarray(leaf) for leaf in data])
        return structure.unflatten(map(_like, leaves, found))


ALONE = Hosts()
"""One host that owns everything."""


def here(items: Sequence[T]) -> Sequence[T]:
    """The items that this host holds: all of them, or none."""
    return () if isinstance(items, Elsewhere) else items


class Elsewhere(Sequence):
    """What another host holds: here only its number is known.

    Args:
      count: how many items there are.
      units: how many privacy units they are in, where that matters.
    """

    def __init__(self, count: int, units: int = 0):
        self._count, self.units = int(count), int(units)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        raise LookupError("these items are another host's; only their number is known here")


@contextmanager
def connected(cluster: Cluster) -> Iterator[Hosts]:
    """Joins this process to the other hosts, before any computation of jax's.

    Raises:
      UserError: host 0 or another host cannot be reached.
      HostGone: a host died, from whatever is exchanged within.
    """
    if cluster.count == 1:
        yield ALONE
        return
    words = ["no round had begun"]
    _catch_abort(lambda: f"error: host 0 is gone: {words[-1]}. What its run folder holds is kept; {AGAIN}\n")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.count,
            cluster.index,
            initialization_timeout=4 * cluster.patience,
            heartbeat_timeout_seconds=cluster.patience,
            shutdown_timeout_seconds=cluster.patience,
            cluster_detection_method="deactivate",
        )
    except RuntimeError as error:
        raise UserError(
            f"host {cluster.index} cannot join the others at {cluster.coordinator}: {_short(error)}; check the address "
            f"and that all {cluster.count} hosts are started, each with an index of its own"
        ) from error
    yield Hosts(cluster.index, cluster.count, _all_gather, words.append)
    # Only after a good end: a host that failed goes without a word, so that the others notice.
    jax.distributed.shutdown()


def _all_gather(data: bytes) -> list[bytes]:
    """Every process's bytes by two collectives: lengths, then contents in rooms of equal size."""
    from jax.experimental import multihost_utils

    devices = jax.devices()
    try:
        with multihost_utils.live_devices(devices):
            pass  # it is left when all are here or one is gone; a collective alone would not wait as long
        with multihost_utils.live_devices(devices):
            lengths = multihost_utils.process_allgather(np.array([len(data)], np.uint32)).ravel()
            # Rooms of few sizes, since each is compiled.
            room = np.zeros(max(1024, 1 << (int(lengths.max()) - 1).bit_length()), np.uint8)
            room[: len(data)] = np.frombuffer(data, np.uint8)
            rooms = multihost_utils.process_allgather(room)
    except multihost_utils.ProcessFailureError as error:
        raise HostGone(_gone(sorted({device.process_index for device in error.failed_devices}))) from error
    except (ValueError, RuntimeError) as error:
        raise HostGone(f"the connection to another host broke off ({_short(error)})") from error
    return [row[:length].tobytes() for row, length in zip(rooms, lengths, strict=True)]


def _gone(missing: list[int]) -> str:
    """Which hosts are gone."""
    return f"host {missing[0]} is gone" if len(missing) == 1 else f"hosts {', '.join(map(str, missing))} are gone"


def _catch_abort(message: Callable[[], str]) -> None:
    """Ends an aborting process with a message and status 1. Python's own handlers never run while C aborts."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        os.write(2, message().encode())
        os._exit(1)

    _handlers.append(handler)  # must outlive this call
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_handlers: list[Any] = []


def _is_address(text: str | None) -> bool:
    """Whether a text is ``HOST:PORT``."""
    host, _, port = (text or "").rpartition(":")
    return bool(host) and port.isdecimal()


def _short(error: Exception) -> str:
    """An error of jax's on one line."""
    return " ".join(str(error).split())[:200]


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key (array)."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(leaf: Any, array: np.ndarray) -> Any:
    """An array as the kind of thing that a leaf is."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=jax.random.key_impl(leaf))
    return jax.numpy.asarray(array) if isinstance(leaf, jax.Array) else array


def packed(value: Any) -> bytes:
    """A value as bytes in which nothing can name code."""
    data = msgpack.packb(value, default=_array_out)
    assert data is not None
    return data


def unpacked(data: bytes) -> Any:
    """The value of :func:`packed`."""
    return msgpack.unpackb(data, ext_hook=_array_in, strict_map_key=False, max_ext_len=2**32 - 1)


def _array_out(value: Any) -> msgpack.ExtType:
    """An array as a msgpack extension: dtype, shape, bytes."""
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"hosts cannot exchange a {type(value).__name__}")
    array = np.ascontiguousarray(value)
    return msgpack.ExtType(_ARRAY, msgpack.packb([array.dtype.name, np.shape(value), array.tobytes()]))


def _array_in(kind: int, data: bytes) -> Any:
    """The array of :func:`_array_out`."""
    name, shape, content = msgpack.unpackb(data, max_bin_len=2**32 - 1)
    return np.frombuffer(content, jax.numpy.dtype(name)).reshape(shape)
