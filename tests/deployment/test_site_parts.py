"""A site as two processes of two users: the worker with the text, and the node with the connection."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from small_job import adapters, lines, quiet, same_bits
from small_trial import write_trial

from experiments.deploy import main
from fedjax_llm.config import from_file
from fedjax_llm.deployment.certificates import make_server_files, make_site_key
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.in_memory import InMemory
from fedjax_llm.deployment.job import load_job
from fedjax_llm.deployment.messages import Said
from fedjax_llm.deployment.relay import call
from fedjax_llm.deployment.serve import serve, simulate
from fedjax_llm.deployment.site import Site, read_site
from fedjax_llm.deployment.worker import Worker
from fedjax_llm.privacy import ledger

pytestmark = pytest.mark.usefixtures("short_reports")
SETTINGS = """
from dataclasses import replace
from fedjax_llm.config import from_file
def get_site():
    (site,) = [site for site in from_file({config!r}, "get_sites", tuple) if site.name == {name!r}]
    return replace(site, folder={folder!r}, root_certificate={root!r}, private_key={key!r})
"""
SUPERNODE = """#!{python}
import sys
from pathlib import Path
from fedjax_llm.deployment.messages import Said
from fedjax_llm.deployment.relay import call
given = sys.argv[sys.argv.index("--node-config") + 1]
print("it answers:", call(Path(given.partition("=")[2].strip('"')), Said("dance"), 1.0).why)
"""
"""In place of Flower's: it hands over one request, and ends."""
NODE = """
import sys
from experiments.deploy import main
from fedjax_llm.deployment import site_process
site_process.program = lambda name: {programs!r} + "/" + name
sys.exit(main(sys.argv[1:]))
"""
"""The command, with the programs of another folder."""


class Far(NamedTuple):
    """A worker in another process, as the transport sees it."""

    socket: Path

    def answer(self, request: Said) -> Said:
        """The worker's."""
        return call(self.socket, request, patience=120.0)


def settings(folder: Path, config: Path, name: str, key: str | None = None, root: str | None = None) -> Path:
    """A site's file."""
    fields = {"config": str(config), "name": name, "folder": str(folder / name), "root": root, "key": key}
    path = folder / f"{name}.py"
    path.write_text(SETTINGS.format(**fields))
    return path


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a trial, in which the worker of one site runs, which has been given no key."""
    folder = tmp_path_factory.mktemp("apart")
    site = settings(folder, write_trial(folder), "hill")
    command = [sys.executable, "-m", "experiments.deploy", f"--site={site}", "--part=worker"]
    with open(folder / "worker.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    yield folder
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_worker_of_its_own_gives_the_bits_of_the_simulation_and_charges_its_own_budget(apart):
    config = apart / "job.py"
    sites: tuple[Site, ...] = from_file(config, "get_sites", tuple)
    here = {name: Worker(read_site(settings(apart, config, name)), console=quiet()) for name in ("coast", "town")}
    over = InMemory(here | {"hill": Far(apart / "hill" / "worker.sock")})
    serve(load_job(config), apart / "run", over, Rules(at_least=3), console=quiet())
    simulate(load_job(config), apart / "simulation", {site.name: site.data for site in sites}, console=quiet())
    assert same_bits(adapters(apart / "run"), adapters(apart / "simulation"))
    assert lines(apart / "run") == lines(apart / "simulation")
    charged = ledger.read(apart / "hill" / "budget.jsonl").entries
    assert [entry.round for entry in charged if entry.events] == [1, 2]


def test_owner_and_group_can_ask_the_worker_and_nobody_else(apart):
    assert Far(apart / "hill" / "worker.sock").answer(Said("dance")).why.startswith("the server asks for 'dance'")
    assert stat.S_IMODE((apart / "hill" / "worker.sock").stat().st_mode) == 0o660


@pytest.mark.parametrize(("name", "heard"), [("hill", "the server asks for 'dance'"), ("town", "worker does not run")])
def test_a_node_asks_the_worker_beside_it_and_is_none_itself(name, heard, apart, tmp_path):
    supernode = tmp_path / "flower-supernode"
    supernode.write_text(SUPERNODE.format(python=sys.executable))
    supernode.chmod(0o700)
    key, root = make_site_key(tmp_path, name)[0], make_server_files(tmp_path, ["127.0.0.1"]).root
    site = settings(tmp_path, apart / "job.py", name, str(key), str(root))
    if name == "hill":
        (tmp_path / name).symlink_to(apart / name)
        Far(apart / name / "worker.sock").answer(Said("dance"))  # until it listens
    command = [sys.executable, "-c", NODE.format(programs=str(tmp_path)), f"--site={site}", "--part=node"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert heard in " ".join(ended.stderr.split())
    assert (tmp_path / name / "worker.sock").exists() == (name == "hill")


def test_a_node_wants_the_key_and_the_certificate_that_a_worker_does_not(apart, tmp_path, capsys):
    assert main([f"--site={settings(tmp_path, apart / 'job.py', 'town')}", "--part=node"]) == 2
    assert "root_certificate of site 'town' is None; it must be a file" in " ".join(capsys.readouterr().err.split())


def test_another_part_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--site=site.py", "--part=nodes"])
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "invalid choice 'nodes' for argument '--part'. Expected one of ('both', 'worker', 'node')" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config=job.py", "--part=node"], "--part goes with --site only"),
        (["--site=site.py", "--resume"], "--resume goes with --config or --server only"),
        (["--server=server.py", "--at-least=3"], "--at-least goes with --config only"),
        (["--config=job.py", "--simulate", "--deadline=5"], "without sites to wait for"),
    ],
)
def test_options_without_effect_are_refused(words, message, capsys):
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
