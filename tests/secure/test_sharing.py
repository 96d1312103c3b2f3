"""Shamir's sharing: any threshold of shares open a secret, fewer nothing, and a commitment tells what is wrong."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedjax_llm.secure.sharing import combined, commitment, dealt

secrets = st.binary(min_size=16, max_size=16)
IRREDUCIBLE = 1 + 2 + 4 + 128 + 2**128
"""The polynomial of GF(2^128), as an integer whose bit i is the coefficient of x^i."""


def product(one: int, other: int) -> int:
    """In GF(2^128)."""
    found = 0
    while other:
        if other & 1:
            found ^= one
        one <<= 1
        if one >> 128:
            one ^= IRREDUCIBLE
        other >>= 1
    return found


def inverse(one: int) -> int:
    """In GF(2^128): the power 2^128 - 2."""
    found, power = 1, one
    for _ in range(127):
        power = product(power, power)
        found = product(found, power)
    return found


def interpolated(shares: dict[int, bytes]) -> bytes:
    """The value at zero of the polynomial through the shares (Lagrange)."""
    total = 0
    for place, share in shares.items():
        top, bottom = 1, 1
        for other in shares:
            if other != place:
                top, bottom = product(top, other), product(bottom, other ^ place)
        total ^= product(int.from_bytes(share, "big"), product(top, inverse(bottom)))
    return total.to_bytes(16, "big")


def by_place(shares: list[bytes]) -> dict[int, bytes]:
    """Places from 1."""
    return dict(enumerate(shares, 1))


@settings(deadline=None, max_examples=25)
@given(secrets, st.integers(2, 6), st.integers(0, 3))
def test_every_set_of_enough_shares_opens_the_secret(secret: bytes, threshold: int, more: int):
    shares = by_place(dealt(secret, threshold, threshold + more))
    assert len(shares) == threshold + more
    for count in range(threshold + more + 1):
        for chosen in combinations(shares, count):
            found = combined({place: shares[place] for place in chosen}, threshold)
            assert found == (secret if count >= threshold else None)


@settings(deadline=None, max_examples=15)
@given(secrets, st.integers(2, 5))
def test_the_arithmetic_is_that_of_the_field(secret: bytes, threshold: int):
    """An independent interpolation, written from the definition of GF(2^128)."""
    assert interpolated(by_place(dealt(secret, threshold, threshold))) == secret


def test_sharing_is_of_many_holders_too():
    secret, shares = bytes(range(16)), by_place(dealt(bytes(range(16)), 200, 300))
    assert combined({place: shares[place] for place in range(101, 301)}, 200) == secret
    assert combined({place: shares[place] for place in range(102, 301)}, 200) is None


def test_too_few_shares_look_the_same_whatever_the_secret():
    """Chi-square of all bytes of threshold - 1 shares; false alarms once in 10^6 for either secret."""
    for secret in (bytes(16), b"\xff" * 16):
        drawn = b"".join(b"".join(dealt(secret, 3, 4)[1:3]) for _ in range(800))
        counts = np.bincount(np.frombuffer(drawn, np.uint8), minlength=256)
        expected = len(drawn) / 256
        assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-6, 255)


def test_one_wrong_share_gives_another_secret_and_its_commitment_tells():
    secret = bytes(16)
    shares = by_place(dealt(secret, 3, 4))
    own = commitment(b"round", "seed", 0, secret)
    promised = {place: commitment(b"round", "seed", place, share) for place, share in shares.items()}
    wrong = shares | {2: bytes(16)}
    found = combined(wrong, 3)
    assert found is not None
    assert commitment(b"round", "seed", 0, found) != own
    assert [place for place in wrong if commitment(b"round", "seed", place, wrong[place]) != promised[place]] == [2]


def test_a_commitment_is_to_all_that_it_names():
    about = [(b"a", "seed", 1, bytes(16)), (b"b", "seed", 1, bytes(16)), (b"a", "key", 1, bytes(16))]
    about += [(b"a", "seed", 2, bytes(16)), (b"a", "seed", 1, b"1" * 16), (b"as", "eed", 1, bytes(16))]
    assert len({commitment(*one) for one in about}) == len(about)
    assert commitment(*about[0]) == commitment(*about[0])


@pytest.mark.parametrize("length", [1, 15, 17, 32])
def test_secrets_are_of_16_bytes(length: int):
    with pytest.raises(ValueError, match="16 byte"):
        dealt(bytes(length), 2, 3)
