"""Messages as integers with shares of noise: what comes back, what one unit can change, and what wraps around."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import shares as sizing
from fedjax_llm.privacy.discrete_noise import discrete_gaussian
from fedjax_llm.privacy.mechanism import Shares
from fedjax_llm.privacy.skellam import Skellam
from fedjax_llm.secure import encoding

ROTATION = b"rotation" * 4


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def silent(_: bytes, size: int) -> np.ndarray:
    return np.zeros(size, np.int64)


def agreed(
    *,
    values: int,
    clip_norm: float = 1.0,
    scale: float = 256.0,
    conditional: bool = True,
    bits: int = 32,
    draw: Callable[[bytes, int], np.ndarray] = silent,
) -> Shares:
    """Shares whose bound is that of the mechanisms."""
    d = encoding.encoded_length(values)
    messages = sizing.Messages(d, clip_norm, 1.0, 1, 1, conditional)
    bound = sizing.bound(messages, scale, Skellam().beta)
    return Shares("skellam", bits, scale, bound, clip_norm, conditional, 1.0, draw)


def message(rng: np.random.Generator, values: int, norm: float = 1.0) -> np.ndarray:
    x = rng.normal(size=values)
    return (norm * x / np.linalg.norm(x)).astype(np.float32)


def coded(x: np.ndarray, shares: Shares, number: int = 0) -> np.ndarray:
    return encoding.encode(
        x, shares, noise_key=key(2 * number), rounding_key=key(2 * number + 1), rotation_key=ROTATION
    )


def whole(x: np.ndarray, shares: Shares, number: int = 0) -> np.ndarray:
    """The integers before they are reduced."""
    half = 1 << (shares.bits - 1)
    return (coded(x, shares, number).astype(np.int64) + half) % (2 * half) - half


@given(st.integers(1, 300), st.booleans(), st.integers(0, 2**32))
def test_a_message_comes_back_within_its_rounding(values: int, conditional: bool, seed: int):
    shares = agreed(values=values, conditional=conditional)
    x = message(np.random.default_rng(seed), values)
    back = encoding.decode(coded(x, shares), shares, rotation_key=ROTATION, values=values)
    assert back.dtype == np.float32
    # Every integer is off by at most 1 (at random) or 1/2 (to the nearest), and a rotation keeps norms.
    off = math.sqrt(encoding.encoded_length(values)) / shares.scale * (1.0 if conditional else 0.5)
    assert np.linalg.norm(back - x) <= off + 1e-6


@pytest.mark.parametrize("bits", [12, 16, 31, 32])
def test_the_sum_of_messages_comes_back_with_the_sum_of_the_noise(bits: int):
    rng, d, n = np.random.default_rng(0), 64, 20

    def draw(own: bytes, size: int) -> np.ndarray:
        return discrete_gaussian(own, 3.0, size)

    shares = agreed(values=d, scale=32.0, bits=bits, draw=draw)
    quiet = shares._replace(draw=silent)
    messages = [message(rng, d) for _ in range(n)]
    total = sum(coded(x, shares, i).astype(np.int64) for i, x in enumerate(messages)) % (1 << bits)
    found = encoding.decode(total.astype(np.uint32), shares, rotation_key=ROTATION, values=d)
    noise = sum(draw(key(2 * i), d) for i in range(n))
    rounded = sum(whole(x, quiet, i) for i, x in enumerate(messages))
    expected = encoding.decode(
        ((rounded + noise) % (1 << bits)).astype(np.uint32), shares, rotation_key=ROTATION, values=d
    )
    np.testing.assert_array_equal(found, expected)
    assert np.linalg.norm(found - np.sum(messages, axis=0)) < 6 * math.sqrt(n * d * (9 + 0.25)) / 32


def test_words_are_of_the_fewest_bits_and_unsigned():
    for bits, kind in {8: np.uint16, 16: np.uint16, 17: np.uint32, 32: np.uint32}.items():
        found = coded(-np.ones(3, np.float32) / 2, agreed(values=3, bits=bits))
        assert found.dtype == kind
        assert found.shape == (4,)
        assert found.max() < 2**bits


@settings(max_examples=60)
@given(
    st.integers(1, 200),
    st.sampled_from(["even", "one", "halves", "random"]),
    st.sampled_from([0.25, 4.0, 1024.0, 2.0**20]),
    st.integers(0, 2**32),
)
def test_the_integers_of_a_site_are_never_longer_than_the_bound(values: int, shape: str, scale: float, seed: int):
    """Also of those messages that random rounding lengthens most."""
    rng, d = np.random.default_rng(seed), encoding.encoded_length(values)
    x = {
        "even": np.ones(values) / math.sqrt(values),
        "one": np.eye(1, values)[0],
        "halves": np.full(values, 0.5 / scale) / max(1.0, 0.5 / scale * math.sqrt(values)),
        "random": message(rng, values),
    }[shape]
    shares = agreed(values=values, scale=scale)
    for number in range(5):
        found = whole(x.astype(np.float32), shares, number)
        assert found.size == d
        assert sum(int(one) ** 2 for one in found) <= shares.bound**2


def test_rounding_is_without_bias_but_for_what_the_condition_adds():
    d, repeats = 256, 400
    shares = agreed(values=d, scale=16.0)
    x = message(np.random.default_rng(3), d, 0.7)
    mean = np.mean([whole(x, shares, number) for number in range(repeats)], axis=0)
    expected = encoding.rotate(x, ROTATION) * 16
    # 256 numbers of standard deviation at most 1/2: beyond 6.2 of the mean's with probability 1e-6 / 2.
    assert np.abs(mean - expected).max() < 6.2 * 0.5 / math.sqrt(repeats)


@settings(max_examples=100)
@given(
    st.integers(1, 200),
    st.sampled_from([0.5, 8.0, 4096.0]),
    st.sampled_from(["cell", "near", "random"]),
    st.integers(0, 2**32),
)
def test_a_unit_inside_a_site_changes_its_integers_by_no_more_than_the_bound(
    values: int, scale: float, kind: str, seed: int
):
    """Pairs of sums that differ by a gradient of norm c, also ones that lie where rounding moves them furthest."""
    rng, d = np.random.default_rng(seed), encoding.encoded_length(values)
    shares = agreed(values=values, scale=scale, conditional=False)
    gradient = message(rng, values).astype(np.float64)
    rest = rng.normal(size=values) * 10
    if kind != "random":  # the rotated sum lies just below the middle between integers, all numbers of it
        middle = np.floor(rng.normal(size=d) * 5) + 0.5 - (1e-9 if kind == "near" else 0)
        rest = _unrotated(middle / scale)[:values]
    moved = whole(rest + gradient, shares) - whole(rest, shares)
    assert np.linalg.norm(moved) <= shares.bound
    assert shares.bound == pytest.approx(scale + math.sqrt(d))


def _unrotated(rotated: np.ndarray) -> np.ndarray:
    """What is rotated to this."""
    total, ones = np.zeros(rotated.size), np.eye(rotated.size)
    for place in range(rotated.size):
        total[place] = encoding.rotate(ones[place], ROTATION) @ rotated
    return total


def test_nearest_integers_need_the_square_root_of_the_dimension_in_the_bound():
    """A small change can move every number across the middle between two integers."""
    d, scale = 256, 4.0
    shares = agreed(values=d, scale=scale, conditional=False)
    rest = _unrotated(np.full(d, 0.5 - 1e-6) / scale)
    gradient = _unrotated(np.full(d, 2e-6) / scale)
    moved = np.linalg.norm(whole(rest + gradient, shares) - whole(rest, shares))
    assert moved == math.sqrt(d)
    assert np.linalg.norm(gradient) * scale < 1e-3
    assert moved <= shares.bound


def test_what_passes_the_modulus_wraps_around():
    shares = agreed(values=1, scale=1.0, conditional=False, bits=8)
    found = [
        encoding.decode(coded(np.array([x]), shares), shares, rotation_key=ROTATION, values=1)[0] for x in (127, 129)
    ]
    assert found == [127.0, 129.0 - 256]  # the sign of the rotation is taken back after the centre is found
    two = (coded(np.array([100.0]), shares).astype(int) * 2) % 256
    assert encoding.decode(two.astype(np.uint16), shares, rotation_key=ROTATION, values=1)[0] == 200 - 256


@given(st.integers(1, 500))
def test_a_rotation_keeps_norms_and_spreads_them(values: int):
    x = np.eye(1, values)[0]
    rotated = encoding.rotate(x, ROTATION)
    assert rotated.size == encoding.encoded_length(values) < 2 * values + 1
    np.testing.assert_allclose(np.abs(rotated), rotated.size**-0.5, rtol=1e-12)
    assert (encoding.rotate(x, key(7)) != rotated).any() or values < 3


def test_a_message_just_beyond_the_clip_norm_is_shortened_and_a_longer_one_refused():
    """Norms of float32 are right to 1e-7, which fine integers would see."""
    shares = agreed(values=64, scale=2.0**28)
    x = message(np.random.default_rng(1), 64).astype(np.float64)
    x *= (1 + 1e-6) / np.linalg.norm(x)
    assert sum(int(one) ** 2 for one in whole(x, shares)) <= shares.bound**2
    with pytest.raises(UserError, match="not clipped"):
        coded(1.1 * x, shares)
    for wrong in (math.nan, math.inf):
        with pytest.raises(UserError, match="not finite"):
            coded(np.where(np.arange(64) == 3, wrong, x), shares)
