"""Correlated noise against dense NumPy matrices: what it is, how sensitive, what it is worth, and that it lasts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.correlated import BandedToeplitz, BufferedToeplitz, rmse, sensitivity
from fedjax_llm.privacy.events import Event

STEPS = 10
TEMPLATE = {"m": {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(4)}}
CONFIGS = {
    "cyclic": (BandedToeplitz(3), (1, STEPS)),
    "banded": (BandedToeplitz(3, amplified=False), (3, 4)),
    "buffered": (BufferedToeplitz(1), (3, 4)),
}


@pytest.fixture(params=CONFIGS)
def correlation(request):
    config, schema = CONFIGS[request.param]
    return config.make(STEPS, *schema)


def dense(coefficients, steps):
    """C."""
    padded = np.zeros(steps)
    padded[: len(coefficients)] = coefficients[:steps]
    return np.array([[padded[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])


def largest(matrix, separation, participations):
    """The largest |C u| over every allowed set of steps and all signs, one by one."""
    best = 0.0
    for signs in itertools.product((-1, 0, 1), repeat=len(matrix)):
        taken = np.flatnonzero(signs)
        if len(taken) <= participations and (np.diff(taken) >= separation).all():
            best = max(best, float(np.linalg.norm(matrix @ np.array(signs))))
    return best


def normals(seed, steps, *shape):
    return np.random.default_rng(seed).standard_normal((steps, *shape)).astype(np.float32)


def stream(correlation, draws, state=None):
    """The noise of all steps [T, N], and the state after them."""
    state = correlation.init({"w": draws[0]}) if state is None else state
    noise = []
    for draw in draws:
        mixed, state = jax.jit(correlation.mix)({"w": draw}, state)
        noise.append(np.asarray(mixed["w"]))
    return np.stack(noise), state


@pytest.mark.parametrize(
    ("separation", "participations", "bands", "independent", "banded", "full"),
    [(64, 1, 16, 5.70, 2.35, 2.23), (16, 4, 16, 11.4, 4.70, 5.71), (4, 16, 4, 22.8, 12.96, 19.3)],
)
def test_errors_of_known_mechanisms(separation, participations, bands, independent, banded, full):
    """Prefix sums over 64 steps; the full matrix is the square root of that of prefix sums."""
    made = BandedToeplitz(bands, amplified=False).make(64, separation, participations)
    k = np.arange(1, 64)
    root = np.append(1.0, np.cumprod((2 * k - 1) / (2 * k)))
    assert made.independent == pytest.approx(independent, rel=3e-3)
    assert made.error == pytest.approx(banded, rel=3e-3)
    assert rmse(root, 64, separation, participations) == pytest.approx(full, rel=3e-3)


def test_full_participation_is_refused_with_both_errors():
    with pytest.raises(
        UserError, match=r"64 times in 64 steps, 1 or more apart.* is 58\.\d+, with independent noise 45\.6"
    ):
        BandedToeplitz(16, amplified=False).make(64, 1, 64)
    with pytest.raises(UserError, match="no better than independent noise"):
        BufferedToeplitz(1).make(STEPS, 1, STEPS)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: BandedToeplitz(1), "bands is 1"),
        (lambda: BufferedToeplitz(0), "buffers is 0"),
        (lambda: BandedToeplitz(11).make(10, 1, 10), "11 bands need at least as many steps; the run has 10"),
        (lambda: BandedToeplitz(2).make(1, 1, 1), "over 1 steps"),
        (lambda: BandedToeplitz(3).make(10, 0, 1), "min_separation is 0"),
        (lambda: BufferedToeplitz(1).make(10, 3, 0), "max_participations 0"),
    ],
)
def test_impossible_noise_is_refused(attempt, message):
    with pytest.raises(UserError, match=message):
        attempt()


@given(
    drops=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    separation=st.sampled_from([1, 2, 3]),
    participations=st.sampled_from([1, 2, 6]),
)
@settings(max_examples=12)
def test_sensitivity_is_the_largest_over_all_participations(drops, separation, participations):
    coefficients = np.cumprod([1.0, *drops])[:6]
    expected = largest(dense(coefficients, 6), separation, participations)
    assert sensitivity(coefficients, 6, separation, participations) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_declared_sensitivity_and_error(name):
    config, schema = CONFIGS[name]
    made = config.make(STEPS, *schema)
    matrix = dense(made.coefficients, STEPS)
    # Cyclic sampling counts participations in the event: here it is that of one.
    schema = (3, 1) if name == "cyclic" else schema
    bound = max(
        np.linalg.norm(matrix[:, list(steps)].sum(axis=1))
        for count in range(1, schema[1] + 1)
        for steps in itertools.combinations(range(STEPS), count)
        if (np.diff(steps) >= schema[0]).all()
    )
    assert made.sensitivity == pytest.approx(bound, rel=1e-9)
    sums = np.tril(np.ones((STEPS, STEPS))) @ np.linalg.inv(matrix)
    assert made.error == pytest.approx(bound * np.sqrt((sums**2).sum(axis=1).mean()), rel=1e-9)
    assert made.error < made.independent


def test_the_stream_is_the_dense_inverse(correlation):
    draws = normals(0, STEPS, 5)
    expected = np.linalg.solve(dense(correlation.coefficients, STEPS), draws.astype(np.float64))
    np.testing.assert_allclose(stream(correlation, draws)[0], expected, atol=2e-6)


def test_clients_have_streams_of_their_own(correlation):
    """Mapped over clients and scanned over steps: each client's noise and state are those it has alone."""
    clients, draws = 3, normals(1, STEPS, 3, 4)
    state = jax.vmap(correlation.init)({"w": jnp.zeros((clients, 4), jnp.bfloat16)})

    def step(state, draw):
        mixed, state = jax.vmap(correlation.mix)({"w": draw}, state)
        return state, mixed["w"]

    state, together = jax.lax.scan(step, state, draws)
    for client in range(clients):
        alone, last = stream(correlation, draws[:, client])
        np.testing.assert_allclose(together[:, client], alone, atol=1e-6)
        np.testing.assert_allclose(state["w"][client], last["w"], atol=1e-6)


def test_noise_and_state_are_float32_trees_like_the_template(correlation):
    state = correlation.init(TEMPLATE)
    mixed, after = correlation.mix(TEMPLATE, state)
    assert jax.tree.map(lambda leaf: leaf.shape, mixed) == jax.tree.map(lambda leaf: leaf.shape, TEMPLATE)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state, mixed, after))} == {"float32"}
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
    assert all(leaf.size for leaf in jax.tree.leaves(state))


def covariance_is_off(correlation, noise):
    """Whether the covariance over T steps of noise [T, N] is more than 6 standard errors from C^-1 C^-T anywhere.

    Right noise is refused with probability 2e-9 for each of the T (T + 1) / 2 entries.
    """
    steps, count = noise.shape
    inverse = np.linalg.inv(dense(correlation.coefficients, steps))
    expected = inverse @ inverse.T
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / count)
    return bool((np.abs(noise @ noise.T / count - expected) > 6 * spread).any())


def test_covariance_and_what_breaks_it(correlation):
    draws = normals(2, 5, 20_000)
    assert not covariance_is_off(correlation, stream(correlation, draws)[0])
    begun_anew = np.concatenate([stream(correlation, draws[:2])[0], stream(correlation, draws[2:])[0]])
    assert covariance_is_off(correlation, begun_anew)
    assert covariance_is_off(correlation, draws * correlation.coefficients[0] ** -1)


def test_streams_of_two_clients_are_uncorrelated(correlation):
    """At any two steps; within 6 standard errors, so right noise is refused with probability 5e-8."""
    one, other = (stream(correlation, normals(seed, 5, 20_000))[0] for seed in (3, 4))
    deviations = np.outer(one.std(axis=1), other.std(axis=1))
    assert (np.abs(one @ other.T / 20_000) < 6 * deviations / np.sqrt(20_000)).all()


def test_a_restored_state_goes_on_with_the_same_bits(correlation):
    draws = normals(5, STEPS, 7)
    whole, _ = stream(correlation, draws)
    _, state = stream(correlation, draws[:4])
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), state)
    np.testing.assert_array_equal(stream(correlation, draws[4:], restored)[0], whole[4:])
    assert not np.allclose(stream(correlation, draws[4:])[0], whole[4:], atol=0.05)


def test_events_say_what_is_charged():
    cyclic, banded, buffered = (config.make(STEPS, *schema) for config, schema in CONFIGS.values())
    assert cyclic.event(1.5, 0.25, 2) == Event("banded", 1.5, 0.25, count=2, bands=3)
    assert cyclic.cyclic == 3
    for whole in (banded, buffered):
        assert whole.event(1.5, 0.25, 2) == Event("matrix", 1.5, 1.0, count=2)
        assert whole.cyclic == 1
    with pytest.raises(UserError, match=r"probability 1\.2.*3 groups"):
        cyclic.event(1.5, 1.2, 2)
    with pytest.raises(UserError, match="made for 10 steps cannot cover 11"):
        cyclic.event(1.5, 0.25, 11)


def test_making_noise_leaves_jax_as_it_was():
    before = jax.config.jax_enable_x64
    for config, schema in CONFIGS.values():
        config.make(STEPS, *schema)
    assert jax.config.jax_enable_x64 == before
    assert jnp.ones(1).dtype == jnp.float32
    assert jnp.asarray(np.ones(1)).dtype == jnp.float32
