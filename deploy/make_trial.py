"""Writes what a trial of a server and two sites wants: keys, certificates and settings, a folder for each machine.

    python deploy/make_trial.py trial --host=server

Nothing in one machine's folder is a secret of another's: what a site gives to the server is its public key alone. For
real machines follow docs/deploy.md, where every machine makes its own secrets.
"""

import shutil
import sys
from pathlib import Path

import tyro

from fedjax_llm.deployment.certificates import make_server_files, make_site_key

_JOB = '''"""The job: the trial of configs/deploy/quickstart.py between two clinics."""

from dataclasses import replace

from configs.deploy import quickstart
from fedjax_llm.data.at_sites import AtSites


def get_config():
    experiment = quickstart.get_config()
    return replace(
        experiment,
        model=replace(experiment.model, name={model!r}),
        data=replace(experiment.data, source=AtSites({names!r})),
        federation=replace(experiment.federation, rounds=3),
    )
'''
_SERVER = '''"""The server's settings."""

from fedjax_llm.deployment.server_process import Server


def get_server():
    return Server(
        job="job.py",
        out="run",
        sites={keys!r},
        root_certificate="authority.pem",
        certificate="server.pem",
        private_key="server.key",
        port={port},
    )
'''
_SITE = '''"""The settings of a site."""

from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.deployment.site import Budget, Site


def get_site():
    return Site(
        name={name!r},
        data=HpoFlashcards(sites=({name!r},)),
        job="job.py",
        folder="site",
        budget=Budget(epsilon=8.0, delta=1e-5),
        server={server!r},
        root_certificate="authority.pem",
        private_key={name!r} + ".key",
    )
'''


def make_trial(
    folder: tyro.conf.Positional[Path],
    host: str = "server",
    port: int = 8000,
    sites: tuple[str, ...] = ("ear", "eye"),
    model: str = "smollm2-135m-instruct",
) -> None:
    """Writes a folder for each machine; those that are there are left as they are.

    Args:
      folder: for all of them.
      host: by which the sites reach the server.
      port: of the server.
      sites: clinics of the text that the quickstart trains on.
      model: as in ``Model.name``.
    """
    server = folder / "server"
    if server.exists():
        print(f"{server} exists: nothing is made")
        return
    files = make_server_files(server, [host, "127.0.0.1"], days=90)
    job = _JOB.format(model=model, names=tuple(sites))
    for name in sites:
        own = folder / name
        _, public = make_site_key(own, name)
        shutil.copyfile(public, server / public.name)
        shutil.copyfile(files.root, own / files.root.name)
        (own / "site").mkdir(mode=0o700)
        (own / "job.py").write_text(job, "utf-8")
        (own / "site.py").write_text(_SITE.format(name=name, server=f"{host}:{port}"), "utf-8")
    (server / "job.py").write_text(job, "utf-8")
    keys = {name: f"{name}.pub" for name in sites}
    (server / "server.py").write_text(_SERVER.format(keys=keys, port=port), "utf-8")
    print(f"{folder}: a folder for the server and for each of {', '.join(sites)}")


if __name__ == "__main__":
    tyro.cli(make_trial, prog="python deploy/make_trial.py")
    sys.exit(0)
