"""One answer at a time, and a short queue before it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio


class Busy(Exception):
    """The queue is full."""


class Turns:
    """Lets one in at a time, in the order of arrival.

    Args:
      waiting: how many may wait beside the one that is in.
    """

    def __init__(self, waiting: int) -> None:
        self._waiting, self._places, self._free = waiting, 0, anyio.Semaphore(1)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """A place in the queue for the time of the context; what it gives is awaited for the turn.

        Raises:
          Busy: there is no place.
        """
        if self._places > self._waiting:
            raise Busy
        self._places += 1
        held = False

        async def turn() -> None:
            nonlocal held
            await self._free.acquire()
            held = True

        try:
            yield turn
        finally:
            self._places -= 1
            if held:
                self._free.release()
