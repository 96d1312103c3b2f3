"""Encryption of a run's folder at rest: AES-256-GCM under a key that is kept elsewhere.

A file is one envelope: magic, version, a random 96-bit nonce, the ciphertext with its 128-bit tag (NIST SP 800-38D; up
to 2**32 messages a key). Authenticated beside it are the version, the run's id and the file's place in the run, so that
files swapped between places or runs are noticed. The files' key is derived from the user's and the run's id by
HKDF-SHA256 (RFC 5869). ``encryption.json`` holds that id, in clear, and a check value that tells a wrong key from a
file that was changed (one in each envelope would be changed with it).
"""

import hmac
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedjax_llm.errors import UserError
from fedjax_llm.runs.keys import KEY_BYTES, Encryption, key_of, of_config

IDENTITY = "encryption.json"
"""The clear file of an encrypted run that holds its id and the check of its key."""
CLEAR = ("config.json", "environment.json", "ledger.jsonl", IDENTITY)
"""What is never encrypted: how the run is, where it was made, and what an auditor recounts without the key."""
_MAGIC, _VERSION, _NONCE_BYTES = b"FJLLMENC", 1, 12
_CONFIG = "config.json"


@dataclass(frozen=True)
class Vault:
    """What seals and opens the files of one run.

    Attributes:
      folder: of the run, absolute.
      run_id: 16 random bytes.
      key: of the files, 32 bytes; derived, never the user's own.
    """

    folder: Path
    run_id: bytes
    key: bytes = field(repr=False)

    def seal(self, data: bytes, place: str, about: str = "") -> bytes:
        """An envelope with the data.

        Args:
          data: in clear, below 2 GiB.
          place: that the envelope belongs to, within the run; it opens for no other.
          about: what else must be the same when it is opened.
        """
        nonce = os.urandom(_NONCE_BYTES)
        return _HEAD + nonce + AESGCM(self.key).encrypt(nonce, data, self._beside(place, about))

    def unseal(self, sealed: bytes, place: str, about: str = "") -> bytes:
        """The data of an envelope.

        Raises:
          UserError: it is not encrypted, or not what this run wrote at this place.
        """
        start, body = len(_HEAD), len(_HEAD) + _NONCE_BYTES
        if not sealed.startswith(_MAGIC):
            raise UserError(f"{self.folder / place} is not encrypted, although its run is: it was damaged or replaced")
        if not sealed.startswith(_HEAD):
            raise UserError(
                f"{self.folder / place} was changed, or encrypted by another version of this program (not {_VERSION})"
            )
        try:
            return AESGCM(self.key).decrypt(sealed[start:body], sealed[body:], self._beside(place, about))
        except (InvalidTag, ValueError):
            raise UserError(
                f"{self.folder / place} was changed since the run wrote it, or belongs to another place or run; "
                "restore it from a backup"
            ) from None

    def place(self, path: Path) -> str:
        """A file's place: its path below the run's folder."""
        return path.absolute().relative_to(self.folder).as_posix()

    def _beside(self, place: str, about: str) -> bytes:
        """What is authenticated with the data; no path holds the zero byte."""
        return _HEAD + self.run_id + f"{place}\0{about}".encode("utf-8", "surrogateescape")


_HEAD = _MAGIC + bytes([_VERSION])


def seal(path: Path, data: bytes) -> bytes:
    """What a file is to hold: the data, or in an encrypted run (but for ``CLEAR``) an envelope with it.

    Raises:
      UserError: as for :func:`vault_of`.
    """
    vault = None if path.name in CLEAR else vault_of(path.parent)
    return data if vault is None else vault.seal(data, vault.place(path))


def read(path: Path) -> bytes:
    """What a file holds, decrypted where :func:`seal` encrypted it.

    Raises:
      UserError: as for :func:`vault_of` and :meth:`Vault.unseal`.
      OSError: it cannot be read.
    """
    data = path.read_bytes()
    vault = None if path.name in CLEAR else vault_of(path.parent)
    if vault is not None:
        return vault.unseal(data, vault.place(path))
    if data.startswith(_MAGIC):
        raise UserError(f"{path} is encrypted, and is not in the folder of its run (with {_CONFIG} and {IDENTITY})")
    return data


def vault_of(folder: Path) -> Vault | None:
    """The vault of the run that a folder is or lies in; ``None`` where that is not encrypted, or there is none.

    Raises:
      UserError: the key is missing (it is said where it was looked for), unusable or not the run's, or one of
        ``config.json`` and ``encryption.json`` is missing.
    """
    folder = folder.absolute()
    known = ((one, _recorded(one / _CONFIG), (one / IDENTITY).exists()) for one in (folder, *folder.parents))
    run, how, marked = next((found for found in known if found[1] is not None or found[2]), (folder, None, False))
    if how is None and not marked:
        return None
    if how is None or not marked:
        wanted, has = (_CONFIG, IDENTITY) if how is None else (IDENTITY, _CONFIG)
        raise UserError(
            f"{run} is encrypted by its {has}, but its {wanted} is missing, damaged or another's; restore it"
        )
    run_id, check = _identity(run / IDENTITY)
    key = key_of(how, run)
    if not hmac.compare_digest(check, _derived(key, run_id, "check")):
        raise UserError(f"the key is not the one that {run} was encrypted with (or its {IDENTITY} was changed)")
    return Vault(run, run_id, _derived(key, run_id, "files"))


def new_identity(how: Encryption, run: Path) -> dict[str, Any]:
    """What ``encryption.json`` of a new run holds.

    Raises:
      UserError: as for :func:`key_of`.
    """
    run_id = os.urandom(16)
    check = _derived(key_of(how, run), run_id, "check")
    return {"version": _VERSION, "cipher": "AES-256-GCM", "run_id": run_id.hex(), "key_check": check.hex()}


def _recorded(path: Path) -> Encryption | None:
    """The encryption that a ``config.json`` names, if it can be read and does."""
    try:
        return of_config(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return None  # whoever needs the configuration itself says so


def _identity(path: Path) -> tuple[bytes, bytes]:
    """Run id and key check."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["version"] == _VERSION:
            return bytes.fromhex(found["run_id"]), bytes.fromhex(found["key_check"])
        why = f"version {found['version']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is damaged, or of another version of this program ({why}); restore it")


def _derived(key: bytes, run_id: bytes, purpose: str) -> bytes:
    """A key for one purpose of one run."""
    return HKDF(SHA256(), KEY_BYTES, salt=run_id, info=f"fedjax_llm run {purpose}".encode()).derive(key)
