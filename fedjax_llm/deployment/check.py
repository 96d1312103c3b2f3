"""What a site can find out before it takes part: its text, the job, the model, its budget, its keys, and the server.

Nothing is trained, charged or sent; no text is shown. The server is asked for a TLS handshake, and told nothing.
"""

import socket
import ssl
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.config import Experiment
from fedjax_llm.data.chat import encode_records
from fedjax_llm.data.records import Dataset
from fedjax_llm.deployment import certificate_check
from fedjax_llm.deployment.job import job_hash, load_job
from fedjax_llm.deployment.site import Site
from fedjax_llm.deployment.site_budget import SiteBudget
from fedjax_llm.errors import UserError
from fedjax_llm.models.sources import open_checkpoint
from fedjax_llm.privacy.statement import bound

State = Literal["ok", "mind", "wrong"]
PATIENCE = 10.0
"""Seconds that the server has to answer."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      what: it is.
      state: ``ok``; ``mind``: it works, and somebody should know; ``wrong``: the site cannot take part like this.
      told: what was found.
      todo: what to do about it; empty where there is nothing to do.
    """

    what: str
    state: State
    told: str
    todo: str = ""


def check_site(site: Site, now: datetime | None = None, patience: float = PATIENCE) -> Iterator[Finding]:
    """Looks at everything that a site needs, one thing after the other.

    Args:
      site: its settings.
      now: to compare validities with; ``None``: the present.
      patience: seconds that the server has to answer.

    Yields:
      A finding for each.
    """
    now = datetime.now(UTC) if now is None else now
    dataset: list[Dataset] = []
    jobs: list[Experiment] = []
    yield _guarded("folder", lambda: _folder(site))
    yield _guarded("text", lambda: _text(site, dataset))
    yield _guarded("job", lambda: _job(site, jobs))
    for job in jobs:
        yield _guarded("model", lambda job=job: _model(job, dataset))
    yield _guarded("budget", lambda: _budget(site, jobs))
    yield _guarded("root certificate", lambda: _root_certificate(site, now))
    yield _guarded("key", lambda: _private_key(site))
    yield _guarded("server", lambda: _server(site, now, patience))


def render(console: Console, findings: list[Finding]) -> None:
    """Prints what was found, and what to do."""
    styles = {"ok": "green", "mind": "yellow", "wrong": "bold red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("looked at", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for found in findings:
        told = Text(found.told)
        if found.todo:
            told.append(f"\n-> {found.todo}", style=styles[found.state])
        table.add_row(found.what, Text(found.state, style=styles[found.state]), told)
    console.print(table)


def _guarded(what: str, look: Callable[[], Finding]) -> Finding:
    """A finding, or why there is none."""
    try:
        return look()
    except UserError as error:
        return Finding(what, "wrong", str(error))
    except OSError as error:
        return Finding(what, "wrong", f"{error.filename or what}: {error.strerror or error}")


def _folder(site: Site) -> Finding:
    """Where the site keeps its ledger and secrets."""
    folder = Path(site.folder)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write-check"
    probe.write_bytes(b"")
    probe.unlink()
    if folder.stat().st_mode & 0o027:
        return Finding("folder", "mind", f"{folder}: others may enter it, or write", f"chmod 710 {folder}")
    return Finding("folder", "ok", f"{folder}: can be written, and by its owner alone")


def _text(site: Site, keep: list[Dataset]) -> Finding:
    """How much text there is."""
    dataset: Dataset = site.data.load()
    if len(dataset.sites) != 1:
        names = ", ".join(found.name for found in dataset.sites[:5])
        return Finding("text", "wrong", f"the source gives {len(dataset.sites)} sites ({names})", "it must give one")
    keep.append(dataset)
    records = dataset.sites[0].records
    owners = {record.owner for record in records if record.owner is not None}
    lengths = sorted(
        sum(len(message.content) for message in example.messages) for record in records for example in record.examples
    )
    owned = f" of {len(owners):,} owners" if owners else ", no column of owners"
    spread = f"{lengths[0]:,} to {lengths[-1]:,} characters, half of them at most {int(statistics.median(lengths)):,}"
    told = f"{len(records):,} records{owned}; {len(lengths):,} examples of {spread}; version {dataset.version}"
    if site.budget is not None and site.budget.unit == "patient" and not owners:
        return Finding("text", "wrong", told, "the budget is for one patient: set owner_column of the source")
    return Finding("text", "ok", told)


def _job(site: Site, keep: list[Experiment]) -> Finding:
    """The configuration that the site agreed to."""
    job = load_job(site.job)
    keep.append(job)
    privacy = job.privacy
    private = "no differential privacy"
    if privacy.mechanism is not None:
        target = "" if privacy.budget is None else f", epsilon at most {privacy.budget:g}"
        private = f"{type(privacy.mechanism).__name__} for one {privacy.unit}{target} at delta {privacy.delta:g}"
    told = f"{site.job}: {job.federation.rounds:,} rounds, {private}; hash {job_hash(job)[:16]}"
    if site.name not in job.data.source.names:
        return Finding("job", "wrong", told, f"it has no site {site.name!r}: agree on a name with whoever wrote it")
    if privacy.mechanism is not None and privacy.randomness == "reproducible" and privacy.real_data:
        return Finding("job", "mind", told, "its noise comes from a seed: ask for privacy.randomness='secret'")
    if privacy.mechanism is not None and getattr(privacy.mechanism, "distributed", "at the site") is None:
        todo = "the server adds the noise and sees updates without it: take part if you trust it, and compare the hash"
        return Finding("job", "mind", told, todo)
    return Finding("job", "ok", told, "compare the hash with the server's and the other sites'")


def _model(job: Experiment, text: list[Dataset]) -> Finding:
    """The frozen model, and whether the text fits its length."""
    checkpoint = open_checkpoint(job.model.name)
    told = f"{job.model.name}: fingerprint {checkpoint.fingerprint[:16]}"
    if checkpoint.tokenizer is None:
        return Finding("model", "wrong", told, "it has no tokenizer: choose one that has")
    if not text:
        return Finding("model", "ok", told)
    data = job.data
    records = text[0].sites[0].records
    _, report = encode_records(records, checkpoint.tokenizer, data.max_length, data.too_long, data.system)
    told += f"; {report.kept:,} examples fit {data.max_length} tokens, {report.truncated:,} are cut"
    told += f", {report.dropped:,} left out; the longest has {report.longest:,}"
    if report.kept + report.truncated == 0:
        return Finding("model", "wrong", told, "no example is left: raise data.max_length of the job")
    short = report.truncated + report.dropped > len(records) / 10
    return Finding("model", "mind" if short else "ok", told, "raise data.max_length of the job" if short else "")


def _budget(site: Site, jobs: list[Experiment]) -> Finding:
    """What the site has left."""
    if site.budget is None:
        todo = "set budget=Budget(epsilon=...): a round beyond it is then refused, whatever the server says"
        return Finding("budget", "mind", "none: the site takes part in any job, private or not", todo)
    limit = site.budget
    standing = SiteBudget(site.budget_path, limit.epsilon, limit.delta, site.name, limit.unit).standing()
    told = (
        f"epsilon {bound(standing.spent)} of {limit.epsilon:g} spent at delta {limit.delta:g} for one {limit.unit}, in "
        f"{standing.runs:,} runs with {standing.releases:,} rounds"
    )
    if standing.spent >= limit.epsilon:
        return Finding("budget", "wrong", told, "it is used up: no private run may compute from this text any more")
    for privacy in (job.privacy for job in jobs):
        if privacy.mechanism is None:
            return Finding("budget", "wrong", told, "the job has no differential privacy, and the budget asks for it")
        if privacy.unit != limit.unit:
            todo = f"the job protects one {privacy.unit}: their epsilons do not add up; agree on the unit"
            return Finding("budget", "wrong", told, todo)
        if privacy.budget is not None and standing.spent + privacy.budget > limit.epsilon:
            todo = f"the job may want epsilon {privacy.budget:g}: it may be refused before its last round"
            return Finding("budget", "mind", told, todo)
    return Finding("budget", "ok", told)


def _root_certificate(site: Site, now: datetime) -> Finding:
    """By which the site knows the server."""
    if site.root_certificate is None:
        return Finding("root certificate", "wrong", "not set", "set root_certificate to the authority's file")
    state, told, todo = certificate_check.root(Path(site.root_certificate), now)
    return Finding("root certificate", state, told, todo)


def _private_key(site: Site) -> Finding:
    """By which the server knows the site."""
    if site.private_key is None:
        return Finding("key", "wrong", "not set", "set private_key to the site's own file")
    state, told, todo = certificate_check.private_key(Path(site.private_key))
    return Finding("key", state, told, todo)


def _server(site: Site, now: datetime, patience: float) -> Finding:
    """Whether the server answers TLS with a certificate of the authority."""
    host, _, port = site.server.rpartition(":")
    if not host or not port.isdigit():
        return Finding(
            "server", "wrong", f"server is {site.server!r}", "write it as HOST:PORT, e.g. fl.example.org:8000"
        )
    if site.root_certificate is None:
        return Finding("server", "wrong", f"{site.server}: not asked", "set root_certificate first")
    context = ssl.create_default_context(cafile=site.root_certificate)
    name = host.strip("[]")
    try:
        with (
            socket.create_connection((name, int(port)), timeout=patience) as plain,
            context.wrap_socket(plain, server_hostname=name) as secured,
        ):
            presented = secured.getpeercert(binary_form=True)
            protocol = secured.version()
    except ssl.SSLCertVerificationError as error:
        todo = "ask the server's operator for the certificate of the authority that signed its own, and for its name"
        return Finding("server", "wrong", f"{site.server}: {error.verify_message}", todo)
    except ssl.SSLError as error:
        todo = "it does not speak TLS: is it the right port, and was the SuperLink started with certificates?"
        return Finding("server", "wrong", f"{site.server}: {error.reason or error}", todo)
    except OSError as error:
        todo = f"is the server started, and may this machine connect to port {port} of it through the firewall?"
        return Finding("server", "wrong", f"{site.server}: {error.strerror or error}", todo)
    assert presented is not None
    state, told, todo = certificate_check.presented(presented, now)
    return Finding("server", state, f"{site.server}: {protocol}; its certificate {told}", todo)
