"""A site is looked at before it takes part: every fault is found and told with what to do, and no text is shown."""

import base64
import io
import json
import socket
import ssl
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from rich.console import Console
from tiny import tiny_folder

from experiments import check_site as command
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.deployment.check import check_site, render
from fedjax_llm.deployment.job import job_hash, load_job
from fedjax_llm.deployment.site import Budget, Site
from fedjax_llm.deployment.site_budget import SiteBudget
from fedjax_llm.privacy.events import Event

JOB = """
from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.data.at_sites import AtSites
from fedjax_llm.federation.plan import Federation
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy

def get_config():
    privacy = Privacy(mechanism=DpSgd(), unit="patient", target_epsilon=3.0, randomness="secret")
    return Experiment(
        model=Model({model!r}),
        data=Data(AtSites(("north", "south")), max_length={length}),
        federation=Federation(weighting="uniform"),
        privacy=privacy,
    )
"""
NOW = datetime(2030, 6, 15, tzinfo=UTC)
DAY = timedelta(days=1)
WORD = "confidential"


def pem(value):
    return value.public_bytes(serialization.Encoding.PEM)


def certificate(name, days, signed_by=None, begins=-1):
    """A certificate from the day before on, for so many days; without a signer an authority's. With its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, signing = signed_by or (own, key)
    built = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begins * DAY)
        .not_valid_after(NOW + days * DAY)
        .add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, signed_by is None, False, False, False), critical=True
        )
        .sign(signing, hashes.SHA256())
    )
    return built, key


def key_bytes(key, form=serialization.PrivateFormat.OpenSSH):
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with an authority, a server's certificate by it, a site's key, a tiny model, a job, and records."""
    folder = tmp_path_factory.mktemp("ground")
    authority, key = certificate("authority", 100000, begins=-10000)
    (folder / "ca.pem").write_bytes(pem(authority))
    served, served_key = certificate("server", 100000, (authority.subject, key), begins=-10000)
    (folder / "server.pem").write_bytes(pem(served))
    (folder / "server.key").write_bytes(key_bytes(served_key, serialization.PrivateFormat.PKCS8))
    (folder / "site.key").write_bytes(key_bytes(ec.generate_private_key(ec.SECP384R1())))
    (folder / "site.key").chmod(0o600)
    (folder / "job.py").write_text(JOB.format(model=str(tiny_folder(folder / "model")), length=128))
    rows = [{"prompt": f"{WORD} {i}?", "answer": f"{WORD} " * (i + 1), "patient": f"p{i // 2}"} for i in range(7)]
    (folder / "north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def port(ground):
    """Of a server that answers TLS handshakes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ground / "server.pem", ground / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    plain, _ = listening.accept()
                except OSError:
                    return
                with plain:
                    try:
                        context.wrap_socket(plain, server_side=True).close()
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.fixture
def site(ground, port, tmp_path):
    (tmp_path / "site").mkdir(mode=0o700)
    return Site(
        name="north",
        data=SiteFiles((str(ground / "north.jsonl"),), owner_column="patient"),
        job=str(ground / "job.py"),
        folder=str(tmp_path / "site"),
        budget=Budget(8.0, 1e-5, "patient"),
        server=f"127.0.0.1:{port}",
        root_certificate=str(ground / "ca.pem"),
        private_key=str(ground / "site.key"),
    )


def found(site, **more):
    return {finding.what: finding for finding in check_site(site, patience=2.0, **{"now": NOW, **more})}


def budget_of(site):
    return SiteBudget(site.budget_path, 8.0, 1e-5, "north", "patient")


def test_a_site_that_can_take_part(site, ground):
    findings = found(site)
    assert {name: finding.state for name, finding in findings.items()} == dict.fromkeys(
        ("folder", "text", "job", "model", "budget", "root certificate", "key", "server"), "ok"
    )
    assert findings["text"].told.startswith("7 records of 4 owners; 7 examples of ")
    assert job_hash(load_job(ground / "job.py"))[:16] in findings["job"].told
    assert "DpSgd for one patient, epsilon at most 3" in findings["job"].told
    assert "epsilon 0.00 of 8 spent" in findings["budget"].told
    assert "TLSv1.3; its certificate valid until" in findings["server"].told


def test_no_text_is_shown(site, ground, tmp_path):
    out = io.StringIO()
    render(Console(file=out, width=250), list(check_site(site, NOW)))
    (tmp_path / "north.jsonl").write_text(json.dumps({"messages": [{"role": "doctor", "content": WORD}]}))
    broken = replace(site, data=SiteFiles((str(tmp_path / "north.jsonl"),)))
    assert found(broken)["text"].state == "wrong"
    render(Console(file=out, width=250), list(check_site(broken, NOW)))
    assert WORD not in out.getvalue()


def test_lengths_are_counted_in_characters_and_tokens(site, ground, tmp_path):
    (tmp_path / "job.py").write_text((ground / "job.py").read_text().replace("max_length=128", "max_length=90"))
    findings = found(replace(site, job=str(tmp_path / "job.py")))
    shortest, longest = len(f"{WORD} 0?{WORD} "), len(f"{WORD} 6?") + 7 * len(f"{WORD} ")
    assert f"7 examples of {shortest} to {longest} characters" in findings["text"].told
    model = findings["model"]
    assert (model.state, model.todo) == ("mind", "raise data.max_length of the job")
    # A token a byte: the template's 42 or so around a prompt of 15 leave room for 2 answers of 13 whole.
    assert "fit 90 tokens" in model.told


def test_what_is_spent_is_told_and_what_is_used_up_is_wrong(site):
    budget_of(site).charge(1, 0, Event("gaussian", 0.8), run="a")
    spent = budget_of(site).standing().spent
    finding = found(site)["budget"]
    assert 5.0 < spent < 8.0
    assert (finding.state, finding.todo[:31]) == ("mind", "the job may want epsilon 3: it ")
    assert "in 1 runs with 1 rounds" in finding.told
    smaller = replace(site, budget=Budget(1.0, 1e-5, "patient"))
    assert found(smaller)["budget"].todo.startswith("it is used up")


@pytest.mark.parametrize(
    ("change", "what", "state", "said"),
    [
        ({"budget": None}, "budget", "mind", "in any job"),
        ({"budget": Budget(8.0, 1e-5, "record")}, "budget", "wrong", "the job protects one patient"),
        ({"name": "west"}, "job", "wrong", "it has no site 'west'"),
        ({"job": "nowhere.py"}, "job", "wrong", "nowhere.py"),
        ({"data": SiteFiles(("nowhere.jsonl",))}, "text", "wrong", "no such file"),
        ({"server": "127.0.0.1"}, "server", "wrong", "HOST:PORT"),
        ({"root_certificate": None}, "server", "wrong", "set root_certificate first"),
        ({"root_certificate": None}, "root certificate", "wrong", "set root_certificate"),
        ({"root_certificate": "nowhere.pem"}, "root certificate", "wrong", "nowhere.pem: No such file"),
        ({"private_key": None}, "key", "wrong", "set private_key"),
        ({"private_key": "nowhere.key"}, "key", "wrong", "nowhere.key: No such file"),
    ],
)
def test_a_wrong_setting_is_told(site, change, what, state, said):
    finding = found(replace(site, **change))[what]
    assert finding.state == state
    assert said in finding.told + finding.todo


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("DpSgd()", "LocalDp()", "compare the hash"),
        ("DpSgd()", "DpFedAvg()", "the server adds the noise and sees updates without it"),
        ('"secret"', '"reproducible"', "its noise comes from a seed"),
        ('mechanism=DpSgd(), unit="patient", target_epsilon=3.0, ', "", "compare the hash"),
    ],
)
def test_whom_a_job_makes_the_site_trust(site, ground, tmp_path, before, after, said):
    job = (ground / "job.py").read_text().replace(before, after)
    imports = "from fedjax_llm.privacy.dp_fedavg import DpFedAvg\nfrom fedjax_llm.privacy.local_dp import LocalDp\n"
    if after in ("DpFedAvg()", "LocalDp()"):
        job = job.replace('"patient"', '"site"')
    (tmp_path / "job.py").write_text(imports + job)
    findings = found(replace(site, job=str(tmp_path / "job.py")))
    assert said in findings["job"].todo
    if "mechanism" not in job:
        assert findings["budget"].todo == "the job has no differential privacy, and the budget asks for it"


def test_a_budget_for_patients_wants_a_column_of_them(site, ground):
    unowned = replace(site, data=SiteFiles((str(ground / "north.jsonl"),)))
    assert "owner_column" in found(unowned)["text"].todo


def test_a_folder_that_others_may_enter(site, tmp_path):
    for mode in (0o755, 0o711, 0o730):
        (tmp_path / "site").chmod(mode)
        assert found(site)["folder"].todo == f"chmod 710 {tmp_path / 'site'}"
    (tmp_path / "site").chmod(0o710)  # a node of another user gets at the socket through it
    assert found(site)["folder"].state == "ok"


@pytest.mark.parametrize(
    ("begins", "days", "state", "said"),
    [
        (-1, 31, "ok", "valid until 2030-07-16"),
        (-1, 29, "mind", "valid until 2030-07-14, 29 days"),
        (-9, -1, "wrong", "was valid until 2030-06-14"),
        (2, 9, "wrong", "is valid from 2030-06-17"),
    ],
)
def test_how_long_a_root_certificate_is_valid(site, tmp_path, begins, days, state, said):
    (tmp_path / "ca.pem").write_bytes(pem(certificate("authority", days, begins=begins)[0]))
    finding = found(replace(site, root_certificate=str(tmp_path / "ca.pem")))["root certificate"]
    assert finding.state == state
    assert said in finding.told


def test_a_root_certificate_is_one_of_an_authority(site, ground):
    wrong = found(replace(site, root_certificate=str(ground / "server.pem")))["root certificate"]
    assert (wrong.state, "of a server, not of an authority" in wrong.told) == ("wrong", True)
    nothing = found(replace(site, root_certificate=str(ground / "job.py")))["root certificate"]
    assert (nothing.state, "is no certificate" in nothing.told) == ("wrong", True)


def test_a_key_is_told_as_ssh_keygen_tells_it_and_is_its_owner_s_alone(site, ground, tmp_path):
    key = serialization.load_ssh_private_key((ground / "site.key").read_bytes(), None)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(base64.b64decode(public.split()[1]))
    shown = base64.b64encode(digest.finalize()).decode().rstrip("=")
    assert f"secp384r1, public key SHA256:{shown}" in found(site)["key"].told
    open_key = tmp_path / "open.key"
    open_key.write_bytes((ground / "site.key").read_bytes())
    open_key.chmod(0o644)
    assert found(replace(site, private_key=str(open_key)))["key"].todo == f"chmod 600 {open_key}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (key_bytes(ed25519.Ed25519PrivateKey.generate()), "of another kind"),
        (key_bytes(ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.PKCS8), "no key in OpenSSH"),
        (b"nonsense", "no key in OpenSSH"),
    ],
)
def test_keys_that_the_server_does_not_take(site, tmp_path, content, said):
    (tmp_path / "other.key").write_bytes(content)
    finding = found(replace(site, private_key=str(tmp_path / "other.key")))["key"]
    assert (finding.state, said in finding.told) == ("wrong", True)
    assert "ssh-keygen -t ecdsa" in finding.todo


def test_a_server_of_another_authority_is_not_believed(site, tmp_path):
    (tmp_path / "ca.pem").write_bytes(pem(certificate("authority", 100000, begins=-10000)[0]))
    finding = found(replace(site, root_certificate=str(tmp_path / "ca.pem")))["server"]
    assert finding.state == "wrong"
    assert "ask the server's operator for the certificate of the authority" in finding.todo


def test_a_server_of_another_name_is_not_believed(site, port):
    finding = found(replace(site, server=f"localhost:{port}"))["server"]
    assert (finding.state, "localhost" in finding.told) == ("wrong", True)


def test_a_port_without_tls_and_one_without_a_server(site):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=lambda: listening.accept()[0].sendall(b"HTTP/1.1 400\r\n\r\n"), daemon=True).start()
        there = f"127.0.0.1:{listening.getsockname()[1]}"
        assert "does not speak TLS" in found(replace(site, server=there))["server"].todo
    finding = found(replace(site, server=there))["server"]
    assert (finding.told, finding.state) == (f"{there}: Connection refused", "wrong")
    assert "firewall" in finding.todo


def test_the_command_says_whether_the_site_can_take_part(site, tmp_path, capsys):
    fields = {
        name: getattr(site, name) for name in ("name", "job", "folder", "server", "root_certificate", "private_key")
    }
    (tmp_path / "site.py").write_text(
        "from fedjax_llm.data.site_files import SiteFiles\n"
        "from fedjax_llm.deployment.site import Budget, Site\n"
        f"def get_site():\n    return Site(data={site.data!r}, budget={site.budget!r}, **{fields!r})\n"
    )
    assert command.main(["--site", str(tmp_path / "site.py"), "--patience", "2"]) == 0
    assert "The site can take part." in capsys.readouterr().out
    budget_of(site).charge(1, 0, Event("gaussian", 1.0), run="a")
    (tmp_path / "site.py").write_text((tmp_path / "site.py").read_text().replace("epsilon=8.0", "epsilon=1.0"))
    assert command.main(["--site", str(tmp_path / "site.py"), "--patience", "2"]) == 1
    assert "1 of 8 to be put right." in capsys.readouterr().out
