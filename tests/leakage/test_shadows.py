"""Shadows: whom they are trained on, that they are trained as if alone, and what attacks make of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from tiny import same, tiny_adapters, tiny_model

from fedjax_llm import lora
from fedjax_llm.data.packing import Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.leakage.membership import confidence, joined, lira, loss, rmia
from fedjax_llm.leakage.roc import roc
from fedjax_llm.leakage.shadows import coins, shadow_scores, train_shadows
from fedjax_llm.leakage.token_scores import token_scores
from fedjax_llm.training.client_update import Trainer

SCALING = 2.0
KEY = jax.random.key(3)
SGD, ADAM = optax.sgd(0.2), optax.adam(2e-2)
SHAPES = (Shape(8, 16, 112),)


def quiet(count):
    """Takes progress and shows nothing."""


def records(count, seed, most=2):
    """Random tokens, which only a model that saw them can know; up to ``most`` examples each."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        lengths = rng.integers(6, 16, int(rng.integers(1, most + 1)))
        texts = [rng.integers(0, 97, length).astype(np.int32) for length in lengths]
        found.append([EncodedExample(f"{seed}-{number}", text, 2) for text in texts])
    return found


def flat(candidates):
    return list(itertools.chain.from_iterable(candidates))


def train(pool, included, optimizer=SGD, *, start=None, **change):
    """Shadows of a model of one layer."""
    model, _ = tiny_model(layers=1)
    settings = {"steps": 3, "batch_size": 4, "key": KEY, "shapes": SHAPES, "chunk": 4, "advance": quiet} | change
    start = beginning() if start is None else start
    return train_shadows(Trainer(model, SCALING, optimizer), tiny_model(layers=1)[1], start, pool, included, **settings)


def beginning(rank=8):
    """Adapters that change nothing yet."""
    adapters = tiny_adapters(tiny_model(layers=1)[0], rank=rank, targets=("v_proj", "up_proj"))
    return {path: factors | {"b": jnp.zeros_like(factors["b"])} for path, factors in adapters.items()}


def scores(shadows, candidates):
    model, params = tiny_model(layers=1)
    return shadow_scores(model, SCALING, params, shadows, candidates, shapes=SHAPES, advance=quiet)


def close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_each_candidate_is_in_a_random_half_of_the_shadows():
    drawn = coins(np.random.default_rng(0), 4, 6000)
    assert drawn.dtype == bool
    assert (drawn.sum(axis=0) == 2).all()
    halves = np.bincount(drawn.T @ (1 << np.arange(4)), minlength=16)
    counts = halves[[sum(1 << i for i in pair) for pair in itertools.combinations(range(4), 2)]]
    assert stats.chisquare(counts).pvalue > 1e-6  # all six halves alike, with this false-alarm rate
    assert not np.array_equal(drawn, coins(np.random.default_rng(1), 4, 6000))


@pytest.mark.parametrize("shadows", [0, 1, 5])
def test_shadows_that_cannot_be_halved_are_refused(shadows):
    with pytest.raises(UserError, match=f"shadows is {shadows}; it must be even"):
        coins(np.random.default_rng(0), shadows, 3)


def test_a_shadow_descends_on_its_own_candidates_alone():
    pool = records(4, 0, most=1)
    included = np.array([[True, True, False, False], [False, True, False, True]])
    model, params = tiny_model(layers=1)

    @jax.jit
    @jax.grad
    def slope(adapters, tokens, weights):
        hidden = model.hidden(params, lora.scaled(adapters, SCALING), tokens)
        logs = jax.nn.log_softmax(jax.vmap(model.logits, (None, 0))(params, hidden[:, :-1]))
        return -(weights * jnp.take_along_axis(logs, tokens[:, 1:, None], 2)[..., 0]).sum()

    found = train(pool, included, steps=2, batch_size=2, learning_rates=np.array([1.0, 0.5]))
    for s, members in enumerate(([0, 1], [1, 3])):
        tokens, weights, expected = np.zeros((2, 16), np.int32), np.zeros((2, 15)), beginning()
        for row, i in enumerate(members):
            length = len(pool[i][0].tokens)
            tokens[row, :length], weights[row, 1 : length - 1] = pool[i][0].tokens, 0.5 / (length - 2)
        for factor in (1.0, 0.5):  # a batch is all of a shadow's examples
            gradient = slope(expected, tokens, weights)
            expected = jax.tree.map(lambda a, g, factor=factor: a - 0.2 * factor * g, expected, gradient)
        close(jax.tree.map(lambda leaf, s=s: leaf[s], found), expected)


def test_how_many_are_trained_at_a_time_changes_nothing():
    pool = records(10, 1)
    included, seen = coins(np.random.default_rng(2), 6, 10), []
    few = train(pool, included, chunk=2, advance=seen.append)
    assert sum(seen) == 6 * 3
    many = train(pool, included, chunk=4, advance=seen.append)  # 4 and 2, which leave two slots empty
    assert sum(seen) == 2 * 6 * 3
    assert jax.tree.leaves(many)[0].shape[0] == 6
    close(few, many)


def test_a_shadow_depends_on_its_number_and_its_candidates():
    pool = records(8, 2)
    included = np.array([[True] * 4 + [False] * 4] * 2)
    first = train(pool, included)
    assert same(first, train(pool, included))
    one, other = (jax.tree.map(lambda leaf, s=s: leaf[s], first) for s in (0, 1))
    assert not same(one, other)  # another order of the same examples
    changed = [*pool[:4], *records(4, 99)]
    close(train(changed, included), first)
    assert not same(train(pool, included, key=jax.random.key(4)), first)


def test_frozen_factors_serve_all_shadows_and_stay():
    pool = records(6, 3)
    trained, frozen = lora.split(beginning(), "b")
    found = train(pool, coins(np.random.default_rng(0), 2, 6), start=trained, frozen=frozen)
    assert jax.tree.structure(found) == jax.tree.structure(trained)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found))


def test_what_cannot_be_trained_is_refused():
    pool, included = records(3, 4), np.array([[True, False, True], [False, False, False]])
    with pytest.raises(UserError, match="shadow 1 has no candidate"):
        train(pool, included)
    model, params = tiny_model(layers=1)
    settings = {"steps": 1, "batch_size": 1, "key": KEY, "shapes": (), "chunk": 1, "advance": quiet}
    with pytest.raises(UserError, match="noisy"):
        train_shadows(Trainer(model, SCALING, SGD, noisy=True), params, beginning(), pool, included, **settings)


def test_scores_are_means_over_a_records_tokens():
    model, params = tiny_model(layers=1)
    shadows, candidates = tiny_adapters(model, leading=(3,)), records(7, 5, most=3)
    found = scores(shadows, candidates)
    assert found.shape == (3, 7)
    for s in range(3):
        own = jax.tree.map(lambda leaf, s=s: leaf[s], shadows)
        for n, candidate in enumerate(candidates):
            tokens = token_scores(model, SCALING, params, own, candidate, shapes=SHAPES, advance=quiet)
            assert found[s, n] == pytest.approx(loss([joined(tokens)])[0], abs=1e-5)


def test_a_candidate_without_targets_is_refused():
    empty = [EncodedExample("e", np.arange(6, dtype=np.int32), 6)]
    with pytest.raises(UserError, match="candidate 2 has no target"):
        scores(jax.tree.map(lambda leaf: leaf[None], beginning()), [*records(2, 6), empty])


def test_a_target_that_memorised_is_told_apart_and_its_base_is_not():
    pool, population = records(40, 7, most=1), records(40, 8, most=1)
    rng = np.random.default_rng(9)
    included, member = coins(rng, 8, 40), np.arange(40) < 20
    settings = {"steps": 60, "batch_size": 8, "chunk": 4}
    everyone = train(pool, np.concatenate([included, member[None]]), ADAM, **settings)
    under, under_population = scores(everyone, pool), scores(everyone, population)
    untuned = jax.tree.map(lambda leaf: leaf[None], beginning())

    def attacks(target, of_population):
        phi = confidence(np.concatenate([under[:8], target[None]]))
        return {
            "loss": target,
            "reference": target - scores(untuned, pool)[0],
            "lira": lira(phi[8], phi[:8], included),
            "lira offline": lira(phi[8], phi[:8], included, offline=True),
            "rmia": rmia(target, under[:8], included, of_population, under_population[:8]),
        }

    for name, values in attacks(under[8], under_population[8]).items():
        assert roc(name, values[member], values[~member]).auc > 0.97, name
    # Who is a member says nothing of the base: each interval misses 1/2 with probability 1e-6, about
    for name, values in attacks(scores(untuned, pool)[0], scores(untuned, population)[0]).items():
        found = roc(name, values[member], values[~member], confidence=1 - 1e-6)
        assert found.auc_low <= 0.5 <= found.auc_high, name
