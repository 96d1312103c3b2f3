"""What server and sites say to each other: a word, values, and arrays, as bytes in which nothing can name code."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.federation.hosts import packed, unpacked

VERSION = 1
"""Of the messages. Both sides must speak the same."""
REFUSED, FAILED, STRANGER = "refused", "failed", "stranger"
"""Answers beside those to the point: the site will not; it cannot now; it does not know the run yet."""


@dataclass(frozen=True, eq=False)
class Said:
    """A request or an answer.

    Attributes:
      word: what it is about.
      values: dictionaries with text as keys, lists, numbers, text, bytes and ``None``.
      arrays: leaves of what is trained, where it holds any.
    """

    word: str
    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Sequence[np.ndarray] = ()

    @property
    def why(self) -> str:
        """The reason, where the site will not or cannot."""
        return str(self.values.get("why", "no reason given"))


class Transport(Protocol):
    """How the server reaches the sites."""

    def ask(self, requests: Mapping[str, Said], deadline: float | None) -> Mapping[str, Said]:
        """Requests by site -> what those answered who did within so many seconds; ``None``: it waits for all."""
        ...


def to_bytes(said: Said) -> bytes:
    """A message as bytes."""
    return packed([VERSION, said.word, dict(said.values), [np.asarray(array) for array in said.arrays]])


def from_bytes(data: bytes) -> Said:
    """The message of :func:`to_bytes`.

    Raises:
      UserError: it is none.
    """
    try:
        version, word, values, arrays = unpacked(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, AttributeError) as error:
        raise UserError(f"what was received is no message: {error}") from error
    if version != VERSION:
        raise UserError(
            f"the other side speaks version {version} of the messages, and this one {VERSION}: install the same"
        )
    good = isinstance(word, str) and isinstance(values, dict) and isinstance(arrays, list)
    if not good or not all(isinstance(array, np.ndarray) for array in arrays):
        raise UserError("what was received is no message: its parts are of other kinds")
    return Said(word, values, arrays)


def digest(*parts: Any) -> str:
    """SHA-256 of values and arrays."""
    return hashlib.sha256(packed(list(parts))).hexdigest()


def check_arrays(arrays: Sequence[np.ndarray], like: Sequence[Any], whose: str) -> None:
    """Refuses arrays that are not such as are expected.

    Args:
      arrays: that were received.
      like: arrays of the right shapes and dtypes.
      whose: they are, for the message.

    Raises:
      UserError: naming the array.
    """
    if len(arrays) != len(like):
        raise UserError(f"{whose} has {len(arrays)} arrays, and {len(like)} were expected")
    for number, (array, right) in enumerate(zip(arrays, like, strict=True)):
        if array.shape != right.shape:
            raise UserError(f"array {number} of {whose} has the shape {array.shape}, and {right.shape} was expected")
        if array.dtype != right.dtype:
            raise UserError(f"array {number} of {whose} is of {array.dtype}, and {right.dtype} was expected")
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"array {number} of {whose} holds numbers that are not finite")
