"""Where the server listens: on this computer alone, unless it is told otherwise."""

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from fedjax_llm.errors import UserError
from fedjax_llm.serving.guard import LOOPBACK, host_name

WARNING = (
    "Warning: the page is open to the network. It has no password and no encryption: whoever reaches this address can "
    "ask the models and read the run's report, held-out records among it."
)
_SECONDS_TO_END = 2


def names_of(host: str, names: Sequence[str], open_to_network: bool) -> tuple[str, ...]:
    """The names by which browsers may call the server.

    Args:
      host: the address to listen on.
      names: more of them.
      open_to_network: whether it may be an address that other computers reach.

    Raises:
      UserError: the address reaches further than is allowed, or nobody could call it.
    """
    for name in names:
        if host_name(name if ":" not in name else f"[{name}]") is None:
            raise UserError(f"--names has {name!r}, which is no name of a computer")
    if host in LOOPBACK:
        return (*LOOPBACK, *names)
    if not open_to_network:
        raise UserError(
            f"--host {host} can be reached by other computers, and the page has no password; add --open-to-network if "
            "that is meant, or leave --host out"
        )
    if _everywhere(host):
        if not names:
            raise UserError(
                f"--host {host} listens on all addresses; name those by which browsers call this computer, such as "
                "--names clinic-3.example 10.0.0.7"
            )
        return (*LOOPBACK, *names)
    return (*LOOPBACK, host, *names)


def _everywhere(host: str) -> bool:
    """Whether a host stands for all addresses of this computer."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound before the model is loaded, so that a port in use is told at once.

    Raises:
      UserError: the address cannot be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} is no port; 1 to 65535 are, and 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this computer: {error.strerror}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --port (0: a free one)"
            ) from error
        yield listener


def url_of(host: str, listener: socket.socket) -> str:
    """What to type into a browser on this computer."""
    name = "127.0.0.1" if _everywhere(host) else f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/"


def listen(app: ASGIApp, listener: socket.socket) -> None:
    """Serves until Ctrl-C; answers that are being made are then given up."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        limit_concurrency=64,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    with suppress(KeyboardInterrupt):  # raised again by uvicorn once it has ended in order
        uvicorn.Server(config).run(sockets=[listener])
