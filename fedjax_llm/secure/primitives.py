"""The cryptography of secure aggregation, all of it from ``cryptography``: agreement, derivation, sealing, streams.

Keys are fresh in every round and every key is used for one purpose: what is derived is bound by HKDF (RFC 5869) to the
protocol's name and version, the purpose, and whatever else the caller names (session, round, both clients, the hash of
all keys). Security is that of X25519, Ed25519 and AES-128: 128 bits.
"""

import hashlib
import secrets

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET = 16
"""Bytes of a seed, and of what a private key is derived from: what the sharing of secrets takes."""
PUBLIC = 32
SIGNATURE = 64
HASH = 32
SEALED = 12 + 2 * SECRET + 16
"""Bytes of two shares under the AEAD: nonce, both shares, tag."""
_PROTOCOL = b"fedjax_llm secure aggregation, version 1"
_HEAD = len(_PROTOCOL).to_bytes(8, "big") + _PROTOCOL


def packed(*parts: bytes | str | int) -> bytes:
    """Parts one after another, each with its length before it, so that no two lists give the same bytes."""
    found = [_HEAD]
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        found += (len(data).to_bytes(8, "big"), data)
    return b"".join(found)


def digest(*parts: bytes | str | int) -> bytes:
    """SHA-256 of the parts: a commitment where one of them is a secret of 128 bits or more."""
    return hashlib.sha256(packed(*parts)).digest()


def fresh() -> bytes:
    """16 bytes from the operating system."""
    return secrets.token_bytes(SECRET)


def derived(secret: bytes, length: int, *context: bytes | str | int) -> bytes:
    """Key material that is bound to its context."""
    return HKDF(SHA256(), length, salt=None, info=packed(*context)).derive(secret)


def private_key(secret: bytes, purpose: str) -> X25519PrivateKey:
    """The key pair that belongs to a 16-byte secret."""
    return X25519PrivateKey.from_private_bytes(derived(secret, PUBLIC, "private key", purpose))


def public_bytes(key: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    """The public half."""
    return key.public_key().public_bytes_raw()


def agreed(own: X25519PrivateKey, other: bytes) -> bytes:
    """What two parties share.

    Raises:
      ValueError: the other's public key is one of the few that agree with everybody.
    """
    return own.exchange(X25519PublicKey.from_public_bytes(other))


def is_usable(public: bytes) -> bool:
    """Whether a public key is none of the few that agree with everybody on the same secret."""
    try:
        agreed(X25519PrivateKey.generate(), public)
    except ValueError:
        return False
    return True


def sealed(key: bytes, message: bytes, context: bytes) -> bytes:
    """Encrypted and authenticated (AES-GCM), with its random nonce before it."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, message, context)


def unsealed(key: bytes, box: bytes, context: bytes) -> bytes | None:
    """The message; ``None`` where key, context or box are not those of :func:`sealed`."""
    try:
        return AESGCM(key).decrypt(box[:12], box[12:], context)
    except InvalidTag:
        return None


def signed(identity: Ed25519PrivateKey, message: bytes) -> bytes:
    """A signature of 64 bytes."""
    return identity.sign(message)


def is_signed(identity: bytes, signature: bytes, message: bytes) -> bool:
    """Whether a signature is of this identity and message."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Masks:
    """Adds key streams to integers in place. AES-128 in counter mode; buffers are kept, for they are as long as inputs.

    Args:
      values: P, how many integers an input has.
      bits: 16 or 32, of the ring.
    """

    def __init__(self, values: int, bits: int) -> None:
        self._dtype = np.dtype(f"<u{bits // 8}")
        self._zeros = bytes(values * self._dtype.itemsize)
        self._stream = bytearray(len(self._zeros) + 16)
        self._view = np.frombuffer(self._stream, self._dtype, values)

    def add(self, total: np.ndarray, seed: bytes, sign: int) -> None:
        """``total`` [P] plus or minus the stream of a 16-byte seed, which is used for nothing else."""
        encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
        encryptor.update_into(self._zeros, self._stream)
        (np.add if sign > 0 else np.subtract)(total, self._view, out=total)
