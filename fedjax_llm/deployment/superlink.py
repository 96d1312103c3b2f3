"""The server's Flower processes: a SuperLink, the keys of the sites that it lets in, and a run of a job on it."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.deployment.certificates import ServerFiles
from fedjax_llm.deployment.processes import Processes, program, wait_for_port
from fedjax_llm.errors import UserError

_NAME = "job"  # of the connection in Flower's own configuration
_APP = {
    "pyproject.toml": """[project]
name = "fedjax-llm-job"
version = "1.0.0"
description = "A job of fedjax_llm"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedjax-llm"

[tool.flwr.app.components]
serverapp = "fedjax_llm_job.apps:server"
clientapp = "fedjax_llm_job.apps:client"

[tool.flwr.app.config]
settings = ""
""",
    "fedjax_llm_job/__init__.py": '"""A job of fedjax_llm."""\n',
    "fedjax_llm_job/apps.py": '''"""The apps, which every side has installed."""

from fedjax_llm.deployment import client_app, server_app

client = client_app.app
server = server_app.app
''',
}
"""What Flower sends to every site: two names, nothing that runs by itself."""


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink that runs.

    Attributes:
      address: ``HOST:PORT`` for sites and commands.
      started: its process.
      folder: of Flower's own files.
    """

    address: str
    started: Processes
    folder: Path

    def register(self, public_key: Path) -> int:
        """Lets a site in, by its public key; the number of its node.

        Raises:
          UserError: the key is none, or is registered already.
        """
        told = self._flwr("supernode", "register", str(public_key), _NAME, "--format", "json")
        return int(told["node-id"])

    def run(self, settings: Path) -> str:
        """Starts a run of the job in a settings file (``server_app.main``); its number.

        Raises:
          UserError: Flower does not start it.
        """
        app = self.folder / "app"
        for name, text in _APP.items():
            (app / name).parent.mkdir(parents=True, exist_ok=True)
            (app / name).write_text(text, "utf-8")
        told = self._flwr(
            "run", str(app), _NAME, "--run-config", f"settings={json.dumps(str(settings))}", "--format", "json"
        )
        return str(told["run-id"])

    def stop_run(self, number: str) -> None:
        """Ends a run."""
        self._flwr("stop", number, _NAME, "--format", "json")

    def ended(self, number: str) -> str | None:
        """How Flower says that a run has ended; ``None``: it goes on, for a minute after its process was killed too.

        Raises:
          UserError: Flower does not say.
        """
        (run,) = self._flwr("list", _NAME, "--run-id", number, "--format", "json")["runs"]
        status = str(run["status"])
        return f"{status} {run['status-details']}".strip() if status.startswith("finished") else None

    def _flwr(self, *words: str) -> Mapping[str, Any]:
        """What one of Flower's commands answers."""
        command = [program("flwr"), *words]
        done = subprocess.run(command, env=self.started.environment, capture_output=True, text=True, timeout=120)
        first = done.stdout.find("{")
        try:
            told = json.loads(done.stdout[first:]) if first >= 0 else {}
        except json.JSONDecodeError:
            told = {}
        if done.returncode or not told.get("success"):
            said = told.get("error-message") or (done.stdout + done.stderr).strip()[-600:]
            raise UserError(f"flwr {' '.join(words[:2])} failed: {said}")
        return told


def start_superlink(
    files: ServerFiles, port: int, started: Processes, folder: Path, host: str = "127.0.0.1"
) -> SuperLink:
    """Starts a SuperLink that speaks TLS and lets in registered sites alone.

    Args:
      files: its certificate.
      port: that it listens on.
      started: where its process belongs.
      folder: of its own files: who is registered survives it.
      host: that it listens on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(started.environment["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{port}"
    root = json.dumps(os.path.abspath(files.root))
    connection = (
        f'[superlink]\ndefault = "{_NAME}"\n\n[superlink.{_NAME}]\naddress = "{address}"\nroot-certificates = {root}\n'
    )
    (home / "config.toml").write_text(connection, "utf-8")
    command = [
        program("flower-superlink"),
        "--host", host, "--port", str(port),
        "--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key), "--ssl-ca-certfile", str(files.root),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--database", str(folder / "superlink.db"),
    ]  # fmt: skip
    started.start("superlink", command)
    wait_for_port(port, started)
    return SuperLink(address, started, folder)
