"""Noise: its distribution, its keys, and that the checks which find it sound find broken noise unsound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import noise

ALPHA = 1e-5
"""False-alarm rate of each of the three statistical checks, so of right noise that is refused: at most 3e-5."""
STDDEV = 0.7
ROUNDS, CLIENTS, STEPS = 2, (7, 91, 2**31 - 1), 2
ADAPTERS = {
    "attention": {"a": jnp.zeros((60, 40), jnp.bfloat16), "b": jnp.zeros((60, 40), jnp.bfloat16)},
    "mlp": {"a": jnp.zeros((60, 40), jnp.bfloat16)},
}


def problems(streams, stddev):
    """What is wrong with streams [S, N] that should be independent normals: names of the checks that fail.

    Each statistical check alone refuses right noise with probability ALPHA; "values" counts distinct values: of 86 400
    float32 normals less than one in a hundred coincides, and 5 % never do.
    """
    draws = np.asarray(streams, np.float64)
    found = set()
    chi = stats.chi2(draws.size)
    square = np.sum((draws / stddev) ** 2)
    if 2 * min(chi.cdf(square), chi.sf(square)) < ALPHA:
        found.add("variance")
    if stats.kstest(np.unique(draws, axis=0).ravel(), stats.norm(scale=stddev).cdf).pvalue < ALPHA:
        found.add("normality")
    # Fisher: artanh(r) sqrt(N - 3) is standard normal where streams are independent; Bonferroni over the pairs.
    pairs = np.corrcoef(draws)[np.triu_indices(len(draws), 1)]
    scores = np.abs(np.arctanh(np.clip(pairs, -1 + 1e-12, 1 - 1e-12))) * np.sqrt(draws.shape[1] - 3)
    if 2 * stats.norm.sf(scores.max()) * len(pairs) < ALPHA:
        found.add("dependence")
    if len(np.unique(draws)) < 0.95 * draws.size:
        found.add("values")
    return found


@jax.jit
def gaussians(keys, stddev):
    """Noise for each of the keys [K]: leaves [K, 60, 40]."""
    return jax.vmap(noise.gaussian, (0, None, None))(keys, ADAPTERS, stddev)


def streams(draw, per_round, per_site, per_step):
    """The noise of every round, client, step and leaf of a small run, [streams, N], with the keys of a run."""
    root = noise.run_key("reproducible", 3)
    keys = [
        per_step(per_site(per_round(root, round_number), client), step)
        for round_number in range(ROUNDS)
        for client in CLIENTS
        for step in range(STEPS)
    ]
    drawn = jax.tree.leaves(draw(jnp.stack(keys), STDDEV))
    return np.concatenate([np.asarray(leaf).reshape(len(keys), -1) for leaf in drawn])


def one_key_for_all_leaves(keys, stddev):
    drawn = gaussians(keys, stddev)
    return jax.tree.map(lambda _: drawn["mlp"]["a"], drawn)


def in_the_adapters_precision(keys, stddev):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), gaussians(keys, stddev))


def of_two_values(keys, stddev):
    return jax.tree.map(lambda leaf: stddev * jnp.sign(leaf), gaussians(keys, stddev))


RIGHT = {
    "draw": gaussians,
    "per_round": functools.partial(noise.round_noise_key, attempt=0),
    "per_site": noise.site_noise_key,
    "per_step": noise.step_key,
}
WRONG = {
    "one key for all leaves": ({"draw": one_key_for_all_leaves}, "dependence"),
    "one key for all clients": ({"per_site": lambda key, client: key}, "dependence"),
    "one key for all rounds": ({"per_round": lambda key, round_number: key}, "dependence"),
    "one key for all steps": ({"per_step": lambda key, step: key}, "dependence"),
    "bfloat16": ({"draw": in_the_adapters_precision}, "values"),
    "variance for deviation": ({"draw": lambda keys, stddev: gaussians(keys, stddev**2)}, "variance"),
    "4 % too little": ({"draw": lambda keys, stddev: gaussians(keys, 0.96 * stddev)}, "variance"),
    "not normal": ({"draw": of_two_values}, "normality"),
}


def test_noise_is_normal_and_independent_over_rounds_clients_steps_and_leaves():
    assert problems(streams(**RIGHT), STDDEV) == set()


@pytest.mark.parametrize("name", WRONG)
def test_the_check_finds_broken_noise(name):
    mutant, problem = WRONG[name]
    assert problem in problems(streams(**(RIGHT | mutant)), STDDEV)


def test_another_attempt_at_a_round_draws_other_noise():
    root = noise.run_key("reproducible", 3)
    keys = [noise.round_noise_key(root, *which) for which in ((0, 0), (0, 1), (1, 0), (1, 1))]
    drawn = np.asarray(gaussians(jnp.stack(keys), 1.0)["mlp"]["a"]).reshape(4, -1)
    assert problems(drawn, 1.0) == set()


@given(dtype=st.sampled_from(["float32", "bfloat16", "float16"]), shape=st.sampled_from([(), (3,), (2, 3), (0, 4)]))
@settings(max_examples=8)
def test_noise_is_float32_whatever_the_template(dtype, shape):
    drawn = noise.gaussian(jax.random.key(0), {"m": {"a": jax.ShapeDtypeStruct(shape, dtype)}}, jnp.bfloat16(1.0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), drawn) == {"m": {"a": (shape, jnp.float32)}}


@given(names=st.sets(st.sampled_from(["k", "q", "v", "up", "down"]), min_size=1, max_size=4))
@settings(max_examples=5)
def test_a_module_keeps_its_noise_whatever_others_there_are(names):
    alone = noise.gaussian(jax.random.key(5), {"o": {"a": jnp.zeros((4, 2))}}, 1.0)
    among = noise.gaussian(jax.random.key(5), {name: {"a": jnp.zeros((4, 2))} for name in {*names, "o"}}, 1.0)
    np.testing.assert_array_equal(among["o"]["a"], alone["o"]["a"])


def test_clients_side_by_side_draw_what_each_draws_alone():
    """Mapped over clients with standard deviations of their own, jitted and within a scan over steps."""
    site_keys = jax.vmap(noise.site_noise_key, (None, 0))(jax.random.key(1), jnp.arange(3))
    deviations = jnp.array([0.0, 0.5, 2.0])
    template = {"w": jnp.zeros((4, 3), jnp.bfloat16), "v": jnp.zeros(5), "u": jnp.zeros(5)}

    @jax.jit
    def together(keys, deviations):
        draw = jax.vmap(
            lambda key, step, stddev: noise.gaussian(noise.step_key(key, step), template, stddev), (0, None, 0)
        )
        return jax.lax.scan(lambda carry, step: (carry, draw(keys, step, deviations)), None, jnp.arange(2))[1]

    drawn = together(site_keys, deviations)
    for client in range(3):
        for step in range(2):
            alone = noise.gaussian(noise.step_key(site_keys[client], step), template, float(deviations[client]))
            for name in template:
                np.testing.assert_array_equal(drawn[name][step, client], alone[name])


def test_reproducible_keys_are_functions_of_the_seed_apart_from_its_other_uses():
    bits = {seed: tuple(np.asarray(jax.random.key_data(noise.run_key("reproducible", seed)))) for seed in (0, 1, 2**40)}
    assert bits[0] == tuple(np.asarray(jax.random.key_data(noise.run_key("reproducible", 0))))
    others = [jax.random.key(0), *jax.random.split(jax.random.key(0), 8)]
    assert len({*bits.values(), *(tuple(np.asarray(jax.random.key_data(key))) for key in others)}) == 3 + 9
    assert all(word > 0 for words in bits.values() for word in words)


def test_secret_keys_are_fresh_and_fill_all_bits():
    """No two of 60 random words are alike, and each of 64 bits is seen set and unset; false alarms: 6e-7."""
    words = np.concatenate([np.asarray(jax.random.key_data(noise.run_key("secret", 0))) for _ in range(30)])
    assert words.dtype == np.uint32
    assert len(set(words.tolist())) == 60
    first, second = words[0::2], words[1::2]
    for half in (first, second):
        assert np.bitwise_or.reduce(half) == 2**32 - 1
        assert np.bitwise_and.reduce(half) == 0


def test_unknown_randomness_is_refused():
    with pytest.raises(UserError, match=r"'secrets'; did you mean 'secret'\?"):
        noise.run_key("secrets", 0)
