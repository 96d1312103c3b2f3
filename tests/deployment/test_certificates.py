"""Throw-away certificates: a client that trusts the authority connects, and no other does."""

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedjax_llm.deployment.certificates import ServerFiles, make_server_files, make_signing_key, make_site_key


def connect(files: ServerFiles, root: Path, host: str) -> None:
    """A TLS handshake of a client that trusts ``root`` with a server that has ``files``."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(root))
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True):
                pass
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host):
            pass
    finally:
        ours.close()
        thread.join(10)


def test_who_trusts_the_authority_reaches_the_server_by_its_names_alone(tmp_path):
    files = make_server_files(tmp_path / "one", ["127.0.0.1", "localhost"])
    other = make_server_files(tmp_path / "other", ["127.0.0.1"])
    connect(files, files.root, "127.0.0.1")
    connect(files, files.root, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        connect(files, files.root, "elsewhere.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(files, other.root, "127.0.0.1")


def test_keys_are_for_their_owner_and_the_authority_keeps_none(tmp_path):
    files = make_server_files(tmp_path, ["localhost"])
    private, public = make_site_key(tmp_path, "hill")
    signing, _ = make_signing_key(tmp_path, "hill")
    for path in (files.key, private, signing):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = [path for path in tmp_path.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(keys) == sorted([files.key, private, signing])
    key = load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == load_ssh_public_key(public.read_bytes())
