"""Examples that share rows train as they do in rows of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny_configs import TINY_CONFIGS, tiny_of
from tiny import tiny_adapters
from toy_rounds import LAYOUTS, SCALING, play, toy_plan, toy_trainer

from fedjax_llm.data.packing import Shape, choose_shapes, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.data.shared_rows import likely_rows, tree_mask
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.rows import example_gradients, rows_of
from fedjax_llm.training.trunk import TrunkCache

SHARE = 40
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
gradients_of = jax.jit(example_gradients, static_argnums=(0, 1))


def card(number: int, beginning: int) -> EncodedExample:
    """One of those that begin with the same 6 tokens."""
    rng = np.random.default_rng(number)
    words = [*range(60 + beginning, 66 + beginning), *rng.integers(0, 60, int(rng.integers(6, 12)))]
    return EncodedExample(f"r{beginning}-{number}", np.array(words, np.int32), int(rng.integers(7, 10)))


CARDS = [card(number, beginning) for beginning in (0, 20) for number in range(3)]


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_token_sees_what_came_before_it_of_its_own_and_of_the_shared(branch):
    mask = np.asarray(tree_mask(jnp.array([branch])))[0]
    for query, own in enumerate(branch):
        for key, other in enumerate(branch):
            assert mask[query, key] == (key <= query and other in (own, -1))


@pytest.mark.parametrize(
    ("architecture", "kept"),
    [("LlamaForCausalLM", True), ("Gemma3ForCausalLM", False), ("GPT2LMHeadModel", False)],
    ids=["Llama, trunk kept", "Gemma 3", "GPT-2"],
)
def test_the_sums_of_loss_and_gradient_are_those_of_rows_of_their_own(architecture, kept):
    """With windows shorter than a row, and learned positions."""
    model, params = tiny_of(TINY_CONFIGS[architecture])
    adapters = tiny_adapters(model, targets=("*",), leading=(2,))
    if kept:
        adapters = {path: own for path, own in adapters.items() if path.startswith("layers.1.")}
    trunk = TrunkCache(model, params, 1, (Shape(2, 24, 0),), 10**6) if kept else None
    work, keys = [[CARDS], [CARDS[1:2]]], jax.random.split(jax.random.key(0), 2)

    def summed(**options):
        (batch,) = pack(work, (Shape(8, SHARE, 160),), clients=2, **options)
        rows = rows_of(batch, trunk)
        found = gradients_of(model, SCALING, params, adapters, rows, keys)
        return [jax.tree.map(lambda leaf, c=c: leaf[rows.client == c].sum(0), found) for c in (0, 1)], rows

    apart, _ = summed()
    together, rows = summed(share=SHARE)
    filled = (rows.branch >= 0).any(axis=1)
    assert filled.sum() < 7
    assert (filled & (rows.branch[:, 0] == -1)).any()
    for mine, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        assert np.abs(theirs).max() > 1e-4
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("normalise", ["example", "token"])
def test_rounds_end_with_the_same_adapters(normalise):
    sites = (("hill", tuple(CARDS)), ("lake", tuple(CARDS[1:4])), ("mill", tuple(CARDS[4:])))
    local = LocalTraining(4, 2, normalise=normalise)
    shapes = choose_shapes(CARDS, tokens_per_microbatch=80, buckets=2)
    plan = toy_plan(toy_trainer(), local, sites=sites)._replace(shapes=shapes)
    layout = dataclasses.replace(LAYOUTS["together"], shared_row=SHARE)
    rows = likely_rows([examples for _, examples in sites], 4, SHARE)
    shared = plan._replace(execution=layout, shapes=choose_shapes(rows, tokens_per_microbatch=80, buckets=2))
    (apart, reports), (together, shorter) = play(plan), play(shared)
    for mine, theirs in zip(jax.tree.leaves(together.adapters), jax.tree.leaves(apart.adapters), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)
    for report, other in zip(reports, shorter, strict=True):
        assert report.tokens == other.tokens
        assert other.padded_tokens < report.padded_tokens
        assert [one.loss for one in other.clients] == pytest.approx([one.loss for one in report.clients], rel=1e-5)


def test_rows_are_not_shared_where_examples_have_gradients_or_dropout_of_their_own():
    layout = dataclasses.replace(LAYOUTS["together"], shared_row=SHARE)
    plan = toy_plan(toy_trainer(), LocalTraining(4, 2))._replace(execution=layout)
    assert plan.shared_row == SHARE
    assert plan._replace(trainer=plan.trainer._replace(clip=Clip(1.0))).shared_row == 0
    assert plan._replace(trainer=toy_trainer(dropout=0.5)).shared_row == 0
