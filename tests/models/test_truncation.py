"""A model cut short is the model up to there, and says that it is cut."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import same, tiny_adapters, tiny_base

from fedjax_llm import lora
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora
from fedjax_llm.models.truncation import truncated

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module")
def base():
    return tiny_base(layers=3)


def logits(base, adapters=None):
    """Of all positions, [tokens, V]."""
    hidden = base.model.hidden(base.params, adapters or {}, TOKENS)
    return base.model.logits(base.params, hidden.reshape(-1, hidden.shape[-1]))


def silenced(base, first):
    """The whole model, whose layers from ``first`` on add nothing to what passes through them."""
    layers = [jax.tree.map(lambda leaf: leaf * 0, layer) if i >= first else layer for i, layer in enumerate(_of(base))]
    return replace(base, params={**base.params, "layers": tuple(layers)})


def _of(base):
    return base.params["layers"]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_layers_that_are_kept_are_the_models_own(base, layers):
    short = truncated(base, layers)
    assert short.model.config.layers == len(_of(short)) == layers
    assert same(_of(short), _of(base)[:layers])
    rest = set(base.params) - {"layers"}
    assert set(short.params) == {*rest, "layers"}
    assert all(same(short.params[name], base.params[name]) for name in rest)
    assert short.size == base.size - sum(leaf.size for leaf in jax.tree.leaves(_of(base)[layers:]))
    assert len(_of(base)) == base.model.config.layers == 3


@pytest.mark.parametrize("layers", [1, 2])
def test_its_logits_are_those_of_the_whole_one_with_the_other_layers_passing_through(base, layers):
    found = logits(truncated(base, layers))
    np.testing.assert_allclose(found, logits(silenced(base, layers)), atol=1e-5)
    assert np.abs(found - logits(base)).max() > 0.1


def test_adapters_meet_the_layers_that_are_left(base):
    short = truncated(base, 2)
    assert {path.split(".")[1] for path in lora.target_modules(Lora(2), short.model)} == {"0", "1"}
    adapters = tiny_adapters(short.model, targets=("q_proj",))
    assert np.abs(logits(short, lora.scaled(adapters, 1.0)) - logits(short)).max() > 1e-2


def test_nothing_takes_it_for_the_whole_one(base):
    models = [truncated(base, layers) for layers in (1, 2, 3)]
    assert truncated(base, 3) is base
    assert models[1].name == "tiny, first 2 of 3 layers"
    for part in ("name", "fingerprint", "size"):
        assert len({getattr(one, part) for one in models}) == 3


@pytest.mark.parametrize("layers", [-1, 0, 4])
def test_impossible_numbers_of_layers_are_refused(base, layers):
    with pytest.raises(UserError, match=f"cannot keep {layers} layers of tiny, which has 3; choose 1 to 3"):
        truncated(base, layers)
