"""The way from Flower's ClientApp to the process that holds a site's text: bytes over a socket of the site's own.

Flower starts the ClientApp anew for every message, from code that the server sends. That code gets at nothing here: it
hands bytes over and takes bytes back, and the worker behind the socket runs what the site has installed.
"""

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from pathlib import Path

from fedjax_llm.deployment.messages import FAILED, Said, from_bytes, to_bytes
from fedjax_llm.errors import UserError

_LONGEST = 100  # characters of a socket's path, which systems bound


def listen(
    path: Path, answer: Callable[[Said], Said], stop: Callable[[], bool] = lambda: False, group: bool = False
) -> None:
    """Answers requests, one after the other, until ``stop`` says so after one of them.

    Args:
      path: of the socket; only its owner can connect to it.
      answer: the worker's.
      stop: whether to end.
      group: whether the owner's group can connect to it too.

    Raises:
      UserError: the path is too long for a socket.
    """
    if len(os.fspath(path)) > _LONGEST:
        raise UserError(f"{path} is too long for a socket ({_LONGEST} characters at most); choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    before = os.umask(0o117 if group else 0o177)
    try:
        listener = Listener(os.fspath(path), "AF_UNIX", backlog=8)
    finally:
        os.umask(before)
    with listener:
        while not stop():
            with listener.accept() as connection:
                try:
                    connection.send_bytes(to_bytes(_answered(answer, connection.recv_bytes())))
                except (EOFError, OSError):
                    continue  # whoever asked has gone; it will ask again


def call(path: Path, request: Said, patience: float = 20.0) -> Said:
    """The answer of the worker behind a socket.

    Args:
      path: of the socket.
      request: for it.
      patience: seconds for which a worker that is not there is waited for.

    Raises:
      UserError: it is not there, or goes away.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with Client(os.fspath(path), "AF_UNIX") as connection:
                connection.send_bytes(to_bytes(request))
                return from_bytes(connection.recv_bytes())
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() > end:
                raise UserError(f"the site's worker does not run (nothing listens at {path})") from error
            time.sleep(0.2)
        except (EOFError, ConnectionError) as error:
            raise UserError("the site's worker ended while it was asked") from error


def _answered(answer: Callable[[Said], Said], data: bytes) -> Said:
    """An answer to whatever came; a fault of the worker's own is told as such, without its details."""
    try:
        return answer(from_bytes(data))
    except UserError as error:
        return Said(FAILED, {"why": str(error)})
    except Exception as error:
        return Said(FAILED, {"why": f"an error in the site's worker ({type(error).__name__}); see its log"})
