"""Shamir's t-of-n sharing of 16-byte secrets, with commitments, so that what is wrong or too little is noticed.

The arithmetic is pycryptodome's, in GF(2^128). It combines anything without complaint: too few shares, or one wrong
share, give another secret. So the dealer commits to each share and to the secret by hashes.
"""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from fedjax_llm.secure.primitives import digest


def dealt(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """One share a holder, of which ``threshold`` tell the secret and fewer nothing."""
    return [share for _, share in Shamir.split(threshold, holders, secret, ssss=False)]


def commitment(context: bytes, kind: str, place: int, secret: bytes) -> bytes:
    """To a holder's share (its place, from 1), or to the secret itself (place 0)."""
    return digest("commitment", context, kind, place, secret)


def combined(shares: Mapping[int, bytes], threshold: int) -> bytes | None:
    """The secret, from shares by place; ``None`` where they are too few.

    Examples:
      >>> shares = dealt(b"sixteen letters!", threshold=2, holders=3)
      >>> combined({1: shares[0], 3: shares[2]}, threshold=2), combined({2: shares[1]}, threshold=2)
      (b'sixteen letters!', None)
    """
    if len(shares) < threshold:
        return None
    return Shamir.combine(sorted(shares.items())[:threshold], ssss=False)
