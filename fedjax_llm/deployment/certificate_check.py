"""Whether certificates and keys are what they should be, and for how long."""

import base64
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, ssh_key_fingerprint

Look = tuple[Literal["ok", "mind", "wrong"], str, str]
"""State, what was found, and what to do."""
_SOON = timedelta(days=30)


def root(path: Path, now: datetime) -> Look:
    """A file with the certificate of an authority (PEM).

    Args:
      path: of the file.
      now: with a time zone.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        return "wrong", f"{path} is no certificate", "ask the server's operator for the authority's certificate (PEM)"
    try:
        signs = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        signs = False
    if not signs:
        todo = "ask for the certificate of the authority that signed it"
        return "wrong", f"{path} is the certificate of a server, not of an authority", todo
    state, told, todo = _validity(certificate, now)
    return state, f"{path}: {certificate.subject.rfc4514_string()}, {told}", todo


def presented(der: bytes, now: datetime) -> Look:
    """A certificate as a server presents it (DER).

    Args:
      der: its bytes.
      now: with a time zone.
    """
    return _validity(x509.load_der_x509_certificate(der), now)


def private_key(path: Path) -> Look:
    """A site's key in OpenSSH's format, on a NIST curve.

    Args:
      path: of the file.
    """
    make = f"make one: ssh-keygen -t ecdsa -b 384 -N '' -f {path}"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return "wrong", f"{path} is no key in OpenSSH's format, or is locked with a password", make
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return "wrong", f"{path} is a key of another kind than the server takes", make
    digest = ssh_key_fingerprint(key.public_key(), hashes.SHA256())
    told = f"{path}: {key.curve.name}, public key {_told(digest)}"
    if path.stat().st_mode & 0o077:
        return "mind", f"{told}; others may read it", f"chmod 600 {path}"
    return "ok", told, "compare the fingerprint with the one that the server's operator registered"


def _validity(certificate: x509.Certificate, now: datetime) -> Look:
    """From when, and until when."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    until = f"valid until {ends:%Y-%m-%d}"
    if now < begins:
        return "wrong", f"is valid from {begins:%Y-%m-%d %H:%M} UTC on", "is this machine's clock right?"
    if now >= ends:
        return "wrong", f"was {until}", "ask the server's operator for a new one"
    if ends - now < _SOON:
        return "mind", f"{until}, {(ends - now).days} days", "ask the server's operator for a new one"
    return "ok", until, ""


def _told(digest: bytes) -> str:
    """A fingerprint as ``ssh-keygen -l`` shows it."""
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")
