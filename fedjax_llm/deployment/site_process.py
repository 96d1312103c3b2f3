"""A site as it runs beside its text: a worker that holds it, and Flower's SuperNode, which connects to the server."""

import os
import threading
import time
from pathlib import Path
from typing import Literal

from rich.console import Console

from fedjax_llm.deployment.processes import free_port, processes, program, tail
from fedjax_llm.deployment.relay import listen
from fedjax_llm.deployment.site import Site
from fedjax_llm.deployment.worker import Worker
from fedjax_llm.errors import UserError

_ALREADY = "Failed to activate SuperNode"  # what it says for up to a minute after a node was killed
_TRIES, _WAIT = 12, 10.0  # seconds between tries
Part = Literal["both", "worker", "node"]
"""Of a site: what holds the text, what connects to the server, or both."""


def run_site(site: Site, console: Console, part: Part = "both") -> None:
    """Takes part in jobs until it is stopped. All connections go out from here; nothing has to be let in.

    Args:
      site: its settings.
      console: where to show what happens.
      part: Flower's node runs what the server sends, as whoever starts the node. Where the worker, with the text,
        and the node are two users' of one group, that code gets at the socket between them and at nothing else.

    Raises:
      UserError: a file is missing, or the SuperNode ends: the server may not know the site's key, or its certificate
        is not signed by the authority that the site trusts.
    """
    if part == "worker":
        listen(site.socket_path, Worker(site, console=console).answer, group=True)
        return
    for name in ("root_certificate", "private_key"):
        path = getattr(site, name)
        if path is None or not Path(path).is_file():
            raise UserError(f"{name} of site {site.name!r} is {path!r}; it must be a file")
    failed = list[BaseException]()
    serving = threading.Thread(target=_listen, args=(site, failed, console), daemon=True)
    if part == "both":
        serving.start()
    with processes(Path(site.folder) / "logs", flower_environment(Path(site.folder) / "flwr")) as started:
        node = started.start("supernode", supernode_command(site))
        log = started.log("supernode")
        console.print(f"Site {site.name}: connecting to {site.server}; log: {log}", highlight=False)
        tries = 1
        while not failed:
            time.sleep(0.5)
            if node.poll() is None:
                continue
            if _ALREADY not in tail(log, 30) or tries == _TRIES:
                started.check()
            console.print(f"The server counts {site.name} as connected still; trying again.", highlight=False)
            time.sleep(_WAIT)
            tries, node = tries + 1, started.start("supernode", supernode_command(site))
        raise failed[0]


def supernode_command(site: Site) -> list[str]:
    """The command line of the site's SuperNode."""
    socket = os.path.abspath(site.socket_path)
    return [
        program("flower-supernode"),
        "--superlink", site.server,
        "--root-certificates", str(site.root_certificate),
        "--auth-supernode-private-key", str(site.private_key),
        "--host", "127.0.0.1", "--port", str(free_port()),
        "--node-config", f'socket="{socket}"',
    ]  # fmt: skip


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of Flower's commands: a home of its own, and no word to anybody about what runs."""
    here = os.path.dirname(program("flwr"))
    return os.environ | {
        "PATH": os.pathsep.join([here, os.environ.get("PATH", "")]),
        "FLWR_HOME": os.path.abspath(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def _listen(site: Site, failed: list[BaseException], console: Console) -> None:
    """Serves a worker; what stops it is told."""
    try:
        listen(site.socket_path, Worker(site, console=console).answer)
    except BaseException as error:
        failed.append(error)
