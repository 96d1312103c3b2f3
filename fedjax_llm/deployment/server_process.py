"""The server as it runs on a machine of its own: what it says of itself, its SuperLink, and a run of the job."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedjax_llm.config import from_file
from fedjax_llm.deployment.certificates import ServerFiles
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.job import load_job
from fedjax_llm.deployment.processes import processes
from fedjax_llm.deployment.site_process import flower_environment
from fedjax_llm.deployment.superlink import SuperLink, start_superlink
from fedjax_llm.deployment.trial import Trial, python_path, run_to_end
from fedjax_llm.errors import UserError, nearest


@dataclass(frozen=True)
class Server:
    """A server.

    Attributes:
      job: the configuration file that all have agreed to.
      out: folder of the run.
      sites: file with the public key (OpenSSH) of every site of the job, by its name.
      root_certificate: of the authority that signed the server's certificate (PEM); every site has it too.
      certificate: the server's (PEM), for the name that sites use and for 127.0.0.1.
      private_key: of the certificate (PEM).
      host: that it listens on.
      port: that sites connect to.
      folder: where it keeps Flower's database and the logs.
      directory: all sites' public signing keys (JSON: name -> hexadecimal), where aggregation is secure.
      deadline: seconds after which a round goes on without the sites that have not answered; ``None``: it waits.
      at_least: sites that a round needs; ``None``: all.
    """

    job: str
    out: str
    sites: Mapping[str, str]
    root_certificate: str
    certificate: str
    private_key: str
    host: str = "0.0.0.0"
    port: int = 8000
    folder: str = "server"
    directory: str | None = None
    deadline: float | None = None
    at_least: int | None = None


def read_server(path: str | Path) -> Server:
    """The server of a settings file.

    Raises:
      UserError: no such file, no ``get_server``, a field or file that does not exist, or sites that are not the job's.
    """
    server = from_file(path, "get_server", Server)
    for name in ("job", "root_certificate", "certificate", "private_key", "directory"):
        value = getattr(server, name)
        if value is not None and not Path(value).is_file():
            raise UserError(f"{name} of the server is {value!r}; there is no such file")
    names = load_job(server.job).data.source.names
    for name in server.sites:
        if name not in names:
            raise UserError(f"sites of the server has {name!r}, which is no site of {server.job}{nearest(name, names)}")
    missing = sorted(set(names) - set(server.sites))
    if missing:
        raise UserError(
            f"sites of the server has no public key for {', '.join(missing)}; ask them for their .pub files"
        )
    return server


def run_server(server: Server, console: Console, resume: bool = False) -> None:
    """Runs the job, from the SuperLink's start to the last round.

    Args:
      server: its settings.
      console: where to show progress.
      resume: go on with the run in its folder.

    Raises:
      UserError: something that can be put right; what is done is kept.
    """
    folder = Path(server.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    directory = folder / "directory.json"
    if server.directory is None:
        directory.write_text("{}", "utf-8")
    else:
        shutil.copyfile(server.directory, directory)
    files = ServerFiles(Path(server.root_certificate), Path(server.certificate), Path(server.private_key))
    environment = flower_environment(folder / "flwr") | {"PYTHONPATH": python_path()}
    with processes(folder / "logs", environment) as started:
        link = start_superlink(files, server.port, started, folder / "superlink", server.host)
        nodes = registered(link, server.sites, folder / "nodes.json")
        console.print(f"SuperLink on port {server.port}; {len(nodes)} sites may connect; logs in {started.folder}")
        federation = Trial(Path(server.job), link, started, files, folder, nodes)
        rules = Rules(deadline=server.deadline, at_least=server.at_least or len(nodes))
        run_to_end(federation, Path(server.out), rules, resume, console)


def registered(link: SuperLink, sites: Mapping[str, str], kept: Path) -> dict[str, int]:
    """The numbers of the sites' nodes; keys that were not registered before are registered now.

    Args:
      link: the SuperLink, whose database lasts.
      sites: file with the public key, by name.
      kept: file in which the numbers of registered keys are kept, since a key is registered once.

    Raises:
      UserError: a file is missing, or holds no key that the SuperLink takes.
    """
    known: dict[str, int] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    nodes = {}
    for name, file in sites.items():
        if not Path(file).is_file():
            raise UserError(f"the public key of site {name!r} is {file!r}; there is no such file")
        key = " ".join(Path(file).read_text("utf-8").split()[:2])  # without a comment
        if key not in known:
            known[key] = link.register(Path(file))
            partial = kept.with_name(kept.name + ".new")
            partial.write_text(json.dumps(known), "utf-8")
            partial.replace(kept)
        nodes[name] = known[key]
    return nodes
