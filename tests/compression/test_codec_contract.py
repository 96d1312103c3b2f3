"""What every compression promises, whichever there are: each file of the room is walked."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same

from fedjax_llm import compression
from fedjax_llm.catalogue import makers
from fedjax_llm.compression.bf16 import Bfloat16
from fedjax_llm.compression.codec import Codec
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.rotated import Rotated
from fedjax_llm.compression.sketch import CountSketch
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.errors import UserError

C = 3
DRAWS = 4000
FALSE_ALARM = 1e-6  # of all checks for bias together


VARIANTS = [
    Quantise(2, block=5),
    Rotated(Quantise(3, block=8), block=8),
    Rotated(Rotated(Bfloat16(), block=1), block=4),
    CountSketch(1, 5),
    CountSketch(4, 5),
    TopK(0.3, values=Rotated(Quantise(4), block=4)),
    TopK(1.0, error_feedback=False, values=Bfloat16()),
]
ALL = [kind() for kind in makers(compression)] + VARIANTS
every = pytest.mark.parametrize("config", ALL, ids=str)


@cache
def made(config: Any) -> Codec:
    """Cached, since every codec compiles anew."""
    return config.make()


def message(seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Arrays of several shapes, one of them empty; scalars and integers that must travel exactly."""
    rng = np.random.default_rng(seed)
    shapes = {"q": {"a": (5, 2), "b": (2, 3)}, "vector": (7,), "single": (1,), "empty": (0, 3)}
    arrays = jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return arrays | {"count": jnp.float32(0.123456789 + seed), "steps": jnp.int32(7), "names": jnp.arange(3)}


def split(tree: dict[str, Any], leading: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """All values of the arrays of a message [..., n], and the rest."""
    exact = {name: tree[name] for name in ("count", "steps", "names")}
    arrays = jax.tree.leaves({name: tree[name] for name in tree if name not in exact})
    return np.concatenate([leaf.reshape(*leaf.shape[:leading], -1) for leaf in arrays], axis=-1), exact


def coded(config: Any, key: int, given: Any, memory: Any = None):
    codec = made(config)
    return codec.code(jax.random.key(key), given, codec.init(given) if memory is None else memory)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_the_walk_finds_the_family():
    names = {kind.__name__ for kind in makers(compression)}
    assert {"Quantise", "Bfloat16", "Rotated", "TopK", "CountSketch"} <= names


@every
def test_it_is_a_frozen_value_whose_codec_keeps_shapes_and_types(config):
    assert type(config).__dataclass_params__.frozen
    assert hash(config) == hash(type(config)(**vars(config)))
    given = message() | {"half": jnp.ones((3, 2), jnp.bfloat16)}
    codec = made(config)
    decoded, memory = coded(config, 0, given)
    assert shapes(decoded) == shapes(given)
    assert shapes(memory) == shapes(codec.init(given))
    assert memory == () or len(jax.tree.leaves(memory)) == len(jax.tree.leaves(given))
    assert memory == () or not codec.unbiased


@every
def test_scalars_and_integers_travel_exactly_and_are_counted(config):
    codec, given = made(config), message(3)
    decoded, _ = coded(config, 1, given)
    assert same(split(decoded)[1], split(given)[1])
    alone = {name: given[name] for name in ("count", "steps", "names")}
    rest = {name: leaf for name, leaf in given.items() if name not in alone}
    assert codec.nbytes(given) - codec.nbytes(rest) == 4 + 4 + 3 * 4
    assert same(coded(config, 1, alone)[0], alone)


@every
def test_bytes_are_a_function_of_the_shapes(config):
    nbytes, given = made(config).nbytes, message()
    count = nbytes(given)
    assert type(count) is int
    assert count == nbytes(jax.eval_shape(lambda: given)) == nbytes(message(5, 100.0)) == nbytes(jax.tree.leaves(given))


@every
def test_the_key_decides(config):
    given = message(1)
    assert same(coded(config, 4, given), coded(config, 4, given))
    outcomes = {split(coded(config, key, given)[0])[0].tobytes() for key in range(4)}
    deterministic = isinstance(config, TopK) and config.values is None
    assert len(outcomes) == 1 if deterministic else len(outcomes) > 1 or isinstance(config, CountSketch)


@every
def test_compiled_and_side_by_side_clients_are_as_each_alone(config):
    codec, given = made(config), [message(seed) for seed in range(C)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
    keys = jax.vmap(jax.random.key)(jnp.arange(C))
    memory = jax.vmap(codec.init)(stacked)
    vectorised = jax.jit(jax.vmap(codec.code))
    for _ in range(2):
        before = memory
        decoded, memory = vectorised(keys, stacked, memory)
        for c in range(C):
            alone = coded(config, c, given[c], jax.tree.map(lambda leaf, c=c: leaf[c], before))
            together = jax.tree.map(lambda leaf, c=c: leaf[c], (decoded, memory))
            for one, other in zip(*map(jax.tree.leaves, (alone, together)), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@every
def test_nothing_stays_nothing(config):
    given = jax.tree.map(jnp.zeros_like, message())
    memory = None
    for key in range(3):
        decoded, memory = coded(config, key, given, memory)
        assert same(decoded, given)


SIZES = (0.0, 1e-45, 1e-39, 1.2e-38, 1e-30, 1.0, 1e30, 3.4028235e38)


@every
@settings(max_examples=15)
@given(values=st.lists(st.sampled_from([s * x for s in (1, -1) for x in SIZES]), min_size=17, max_size=17))
def test_what_is_finite_stays_finite(config, values):
    whole = jnp.array(values, jnp.float32)
    given = message() | {"q": {"a": whole[:10].reshape(5, 2), "b": whole[10:16].reshape(2, 3)}, "single": whole[16:]}
    memory = None
    for key in range(3):
        decoded, memory = coded(config, key, given, memory)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((decoded, memory)))


def error_bound(config: Any, values: np.ndarray) -> float:
    """The most by which a decoded value can differ from its own; infinite where it is not known."""
    match config:
        case Quantise():
            return float(np.abs(values).max()) / (2 ** (config.bits - 1) - 1)
        case Bfloat16():
            return float(np.abs(values).max()) * 2.0**-7
        case Rotated():  # norms are kept
            rotated = np.full(1, np.linalg.norm(values))
            return math.sqrt(len(values) * 2) * error_bound(config.values, rotated)
        case CountSketch():
            return float(np.abs(values).sum())
    raise AssertionError(f"{config} says that it is unbiased: give a bound of its errors here")


def deviation_allowed(draws: np.ndarray, spread: float, false_alarm: float) -> np.ndarray:
    """Maurer and Pontil 2009, Theorem 4 (both sides): how far a mean of draws [K, n] may be from the expectation.

    ``spread`` is the length of an interval that holds every draw.
    """
    log = math.log(4 / false_alarm)
    return np.sqrt(2 * draws.var(axis=0, ddof=1) * log / len(draws)) + 7 * spread * log / (3 * (len(draws) - 1))


UNBIASED = [config for config in ALL if made(config).unbiased and config != CountSketch()]  # whose table is too large


@pytest.mark.parametrize("config", UNBIASED, ids=str)
def test_the_mean_over_the_keys_is_the_message(config):
    given = message(2)
    values, _ = split(given)
    draw = jax.vmap(lambda key: made(config).code(key, given, ())[0])
    decoded = jax.device_get(draw(jax.random.split(jax.random.key(9), DRAWS)))
    draws, bound = split(decoded, 1)[0].astype(np.float64), error_bound(config, values)
    rounding = 1e-5 * np.abs(values).max()
    assert np.abs(draws - values).max() <= bound + rounding
    allowed = deviation_allowed(draws, 2 * bound, FALSE_ALARM / (len(ALL) * len(values)))
    assert (np.abs(draws.mean(axis=0) - values) <= allowed + rounding).all()


def test_the_check_for_bias_finds_rounding_to_the_nearest():
    values = np.linspace(-1, 1, 24) ** 3
    nearest = np.broadcast_to(np.round(values * 7) / 7, (DRAWS, 24))
    allowed = deviation_allowed(nearest, 2 / 7, FALSE_ALARM / (len(ALL) * 24))
    assert (np.abs(nearest.mean(axis=0) - values) > allowed).any()


BAD = {
    "bits": (Quantise, (1, 9, 0, -4, 4.0, True, "8")),
    "block": (Quantise, (0, -1, 2.5)),
    "share": (TopK, (0.0, -0.1, 1.01, float("nan"), float("inf"))),
    "rows": (CountSketch, (0, -3, 1.5)),
    "columns": (CountSketch, (0, 2**31)),
}


@pytest.mark.parametrize(("field", "kind", "value"), [(f, k, v) for f, (k, vs) in BAD.items() for v in vs], ids=str)
def test_impossible_values_are_refused_by_name(field, kind, value):
    with pytest.raises(UserError, match=rf"compression\.{field} is {value!r}"):
        kind(**{field: value}).make()


@given(bits=st.integers(-9, 20), block=st.integers(-5, 5))
def test_quantisers_are_made_or_refused(bits, block):
    if 2 <= bits <= 8 and block >= 1:
        Quantise(bits, block).make()
        return
    with pytest.raises(UserError, match=r"compression\.(bits|block) is"):
        Quantise(bits, block).make()


@given(block=st.integers(-3, 70))
def test_blocks_of_rotations_are_powers_of_two(block):
    if block in (1, 2, 4, 8, 16, 32, 64):
        Rotated(block=block).make()
        return
    with pytest.raises(UserError, match=f"compression.block is {block}"):
        Rotated(block=block).make()


@pytest.mark.parametrize("outer", [Rotated, TopK])
def test_the_values_within_must_be_coded_without_bias(outer):
    for biased in (TopK(), TopK(error_feedback=False)):
        with pytest.raises(UserError, match=r"compression\.values is TopK.*biased"):
            outer(values=biased).make()
    with pytest.raises(UserError, match=r"compression\.values is 'Quantise'; it must be a compression"):
        outer(values="Quantise").make()
    with pytest.raises(UserError, match=r"compression\.values\.bits is 1"):
        outer(values=Quantise(1)).make()
    with pytest.raises(UserError, match=r"compression\.values\.values\.block is 0"):
        outer(values=Rotated(Quantise(8, block=0))).make()
