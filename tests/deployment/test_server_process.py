"""What a server says of itself: files and names are compared before anything starts, and keys are registered once."""

import pytest

from fedjax_llm.deployment.server_process import read_server, registered
from fedjax_llm.errors import UserError

JOB = """
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.at_sites import AtSites
def get_config():
    return Experiment(data=Data(AtSites(("north", "south"))))
"""
SERVER = """
from fedjax_llm.deployment.server_process import Server
def get_server():
    files = {"root_certificate": "ca.pem", "certificate": "server.pem", "private_key": "server.key"}
    return Server(**{"job": "job.py", "out": "run", "sites": {"north": "n.pub", "south": "s.pub"}, **files, **CHANGE})
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Writes the server's file, with changes; gives its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    for name in ("ca.pem", "server.pem", "server.key"):
        (tmp_path / name).write_text("")

    def write(**change):
        (tmp_path / "server.py").write_text(f"CHANGE = {change!r}\n{SERVER}")
        return tmp_path / "server.py"

    return write


def test_a_whole_file_is_read(settings):
    server = read_server(settings(port=8001))
    assert (server.port, dict(server.sites)) == (8001, {"north": "n.pub", "south": "s.pub"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": "jobs.py"}, "job of the server is 'jobs.py'; there is no such file"),
        ({"certificate": "none.pem"}, "certificate of the server is 'none.pem'"),
        ({"directory": "none.json"}, "directory of the server is 'none.json'"),
        ({"sites": {"north": "n.pub"}}, "no public key for south"),
        (
            {"sites": {"north": "n", "south": "s", "sout": "t"}},
            "'sout', which is no site of job.py; did you mean 'south'",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_starts(settings, change, message):
    with pytest.raises(UserError, match=message):
        read_server(settings(**change))


class Link:
    """A SuperLink as far as keys are concerned: it takes each once."""

    def __init__(self):
        self.keys = []

    def register(self, public_key):
        key = public_key.read_text().split()[1]
        assert key not in self.keys
        self.keys.append(key)
        return 100 + len(self.keys)


def test_keys_are_registered_once_and_new_ones_get_new_nodes(tmp_path):
    sites = {name: str(tmp_path / f"{name}.pub") for name in ("north", "south")}
    for name, path in sites.items():
        (tmp_path / path).write_text(f"ecdsa-sha2-nistp384 KEY-{name} somebody@{name}\n")
    link, kept = Link(), tmp_path / "nodes.json"
    assert registered(link, sites, kept) == {"north": 101, "south": 102}
    (tmp_path / "north.pub").write_text("ecdsa-sha2-nistp384 KEY-north another comment\n")
    assert registered(link, sites, kept) == {"north": 101, "south": 102}
    (tmp_path / "south.pub").write_text("ecdsa-sha2-nistp384 KEY-new\n")
    assert registered(link, sites, kept) == {"north": 101, "south": 103}
    assert link.keys == ["KEY-north", "KEY-south", "KEY-new"]


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the public key of site 'north' is .*north\.pub'; there is no such file"):
        registered(Link(), {"north": str(tmp_path / "north.pub")}, tmp_path / "nodes.json")
