"""What a compression of messages is: pure functions of one client's message, which the rounds vectorise.

A compression is a frozen dataclass in a file of its own whose ``make()`` gives a :class:`Codec`. What a codec gives
back is what the server decodes: the simulation computes with it, and counts the bytes that its encoded form takes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jax import Array

from fedjax_llm.types import PyTree


class Codec(NamedTuple):
    """A compression as pure functions.

    Attributes:
      init: ``init(message) -> memory``: what a client keeps between rounds (error feedback): a tree like the message,
        leaf by leaf, so that the memory of factors which do not travel in a round can rest; ``()`` for nothing.
      code: ``code(key, message, memory) -> (message, memory)``: the message as the server decodes it.
      nbytes: ``nbytes(message) -> bytes``: what the encoded message takes on the wire, exactly; a function of the
        shapes (arrays, or ``jax.ShapeDtypeStruct``).
      unbiased: whether the expectation of the decoded message over the keys is the message itself.
    """

    init: Callable[[PyTree], PyTree]
    code: Callable[[Array, PyTree, PyTree], tuple[PyTree, PyTree]]
    nbytes: Callable[[PyTree], int]
    unbiased: bool


class Compression(Protocol):
    """A frozen dataclass of a compression's parameters."""

    def make(self) -> Codec:
        """The compression with these parameters."""
        ...
