"""Clipping against NumPy in double precision, and against jax_privacy's clipped gradients of the toy model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_private import CLIP, ROWS, clipped, length, private_shapes, toy_base
from toy_rounds import SCALING, toy_example

from fedjax_llm import trees
from fedjax_llm.data.packing import pack
from fedjax_llm.errors import UserError
from fedjax_llm.privacy.clipping import Clip, clip_units, factors
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import Trainer
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.training.rows import rows_of

SCOPES = ("flat", "layers")
UNITS = 5
clip = jax.jit(clip_units, static_argnums=1)


def random_tree(seed: int, magnitudes) -> dict:
    """Gradients [U, ...] of two modules, each unit with a magnitude of its own."""
    rng = np.random.default_rng(seed)
    shapes = {"q": {"a": (7, 2), "b": (2, 5)}, "up": {"a": (40, 30), "b": (2, 9)}}
    wide = np.asarray(magnitudes, np.float32)[:, None, None]
    return {
        path: {name: wide * rng.normal(size=(UNITS, *shape)).astype(np.float32) for name, shape in factors.items()}
        for path, factors in shapes.items()
    }


def unit(tree, u: int):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[u], tree)


magnitudes = st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 0.02, 0.03, 1.0, 1e4, 1e17]), min_size=UNITS, max_size=UNITS)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99), sizes=magnitudes, scope=st.sampled_from(SCOPES), norm=st.sampled_from([0.01, 1.0, 50.0])
)
def test_every_unit_is_scaled_into_the_bound_and_no_further(seed, sizes, scope, norm):
    tree = random_tree(seed, sizes)
    bounded = clip(tree, Clip(1.0, scope), norm)
    scales = factors(tree, Clip(norm, scope))
    for u in range(UNITS):
        expected = clipped(unit(tree, u), Clip(norm, scope), norm) if sizes[u] else unit(tree, u)
        for mine, theirs in zip(jax.tree.leaves(unit(bounded, u)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-6)
        assert length(unit(bounded, u)) <= norm * (1 + 1e-6)
        assert all(0 <= float(scale[u]) <= 1 for scale in scales.values())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_has_no_norm_contributes_nothing_in_any_module_and_spoils_no_other(scope, bad):
    clean = random_tree(3, [1.0] * UNITS)
    spoilt = jax.tree.map(np.copy, clean)
    spoilt["q"]["b"][2, 0, 0] = bad
    one, other = clip(clean, Clip(0.5, scope)), clip(spoilt, Clip(0.5, scope))
    others = np.array([0, 1, 3, 4])
    for leaf, before in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
        assert not np.any(leaf[2])
        np.testing.assert_array_equal(leaf[others], before[others])


def test_layers_share_the_bound_and_do_not_each_get_the_whole():
    tree = random_tree(0, [10.0] * UNITS)
    bounded = clip(tree, Clip(1.0, "layers"))
    for u in range(UNITS):
        assert [length(unit(part, u)) for part in bounded.values()] == pytest.approx([2**-0.5] * 2, rel=1e-6)
        assert length(unit(bounded, u)) == pytest.approx(1.0, rel=1e-6)


def test_bfloat16_gradients_are_clipped_in_float32():
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_tree(1, [3.0] * UNITS))
    bounded = clip(tree, Clip(1.0))
    assert {leaf.dtype for leaf in jax.tree.leaves(bounded)} == {jnp.dtype(jnp.float32)}
    assert all(length(unit(bounded, u)) == pytest.approx(1.0, rel=1e-6) for u in range(UNITS))


@pytest.mark.parametrize("norm", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_bounds_are_refused(norm):
    with pytest.raises(UserError, match=f"the clip norm is {norm}; it must be positive and finite"):
        Clip(norm)


@pytest.mark.parametrize("examples", [1, 2])
def test_sums_are_those_of_jax_privacy(examples):
    """The summed, clipped gradients of five units of one or two examples, before any division or noise."""
    from jax_privacy import clipped_grad

    base = toy_base()
    made = [[toy_example(10 * u + e, 9, 3) for e in range(examples)] for u in range(UNITS)]
    tokens = jnp.asarray([[one.tokens for one in unit] for unit in made])

    def loss(adapters, tokens, params):
        """Of one unit [E, L]: the mean over its examples of the mean over their targets."""
        scaled = {path: {"a": f["a"], "b": SCALING * f["b"]} for path, f in adapters.items()}
        hidden = base.model.hidden(params, scaled, tokens)
        logits = jax.vmap(base.model.logits, (None, 0))(params, hidden)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
        return -jnp.mean(likelihood[:, 2:])

    theirs = clipped_grad(loss, l2_clip_norm=CLIP, keep_batch_dim=False)(base.adapters, tokens, base.params)
    grouped = examples > 1
    trainer = Trainer(base.model, SCALING, Optimizer().make(), clip=Clip(CLIP), grouped=grouped)
    state = client_update.start(trainer, trees.repeat(base.adapters, 1))
    keys = jax.random.split(jax.random.key(0), 1)
    work = [[[tuple(unit) for unit in made]]]
    for batch in pack(work, private_shapes("one by one", ROWS if grouped else 1), clients=1, denominators=[9.0]):
        state = client_update.accumulate(trainer, base.params, state, rows_of(batch), keys)
    for mine, other in zip(jax.tree.leaves(state.gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine[0], other, atol=1e-5)
    assert length(theirs) > CLIP
