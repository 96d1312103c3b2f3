"""A computation that exchanges values with others, held by one who is only asked from time to time."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fedjax_llm.errors import UserError

Exchange = Callable[[bytes], Sequence[bytes]]
"""This party's bytes -> those of all."""


class Talk:
    """Runs a program in a thread of its own, which stops wherever it exchanges values.

    Args:
      program: is given the exchange.
      index: of this party among all.
    """

    def __init__(self, program: Callable[[Exchange], Any], index: int) -> None:
        self._said: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._heard: queue.Queue[Sequence[bytes] | None] = queue.Queue()
        self._index, self.step = index, 0
        self._next: tuple[str, Any] | None = None
        threading.Thread(target=self._run, args=(program,), daemon=True).start()

    def go_on(self, log: Sequence[Sequence[bytes]]) -> bytes | None:
        """Goes on as far as the log of all exchanges so far allows.

        Args:
          log: what all parties said, by exchange; the first of them may have been heard before.

        Returns:
          What this party says in the next exchange; ``None`` where the program has ended.

        Raises:
          UserError: the log has this party say something else than it does now; or whatever the program raises.
        """
        while True:
            kind, value = self._current()
            if kind == "failed":
                raise value
            if kind == "ended" or self.step >= len(log):
                return None if kind == "ended" else value
            if log[self.step][self._index] != value:
                raise UserError(
                    "this site's text, model or settings are not those with which it joined the run; restore them, or "
                    "start a new run"
                )
            self._heard.put(log[self.step])
            self._next, self.step = None, self.step + 1

    def result(self) -> Any:
        """What the program gave, once it has ended."""
        kind, value = self._current()
        assert kind == "ended"
        return value

    def end(self) -> None:
        """Ends a program that waits for an exchange, so that nothing of it is kept."""
        self._heard.put(None)

    def _current(self) -> tuple[str, Any]:
        """What the program says or came to; waits for it."""
        if self._next is None:
            self._next = self._said.get()
        return self._next

    def _run(self, program: Callable[[Exchange], Any]) -> None:
        """The thread."""
        try:
            self._said.put(("ended", program(self._exchange)))
        except BaseException as error:
            self._said.put(("failed", error))

    def _exchange(self, data: bytes) -> Sequence[bytes]:
        """Waits for what all said.

        Raises:
          UserError: the program was ended meanwhile.
        """
        self._said.put(("says", data))
        heard = self._heard.get()
        if heard is None:
            raise UserError("the exchange was given up")
        return heard
