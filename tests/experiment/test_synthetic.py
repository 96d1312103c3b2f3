"""Rounds for benchmarks: exact shapes, and the same work with and without privacy."""

import jax
import numpy as np
import pytest
from tiny import tiny_folder

from fedjax_llm.experiment.synthetic import dense_plan, training_flops
from fedjax_llm.federation.rounds import run_round
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load
from fedjax_llm.privacy.dp_sgd import DpSgd

LORA = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj"))
SHAPES = {"clients": 3, "steps": 2, "batch": 2, "length": 8}
TOKENS = 3 * 2 * 2 * 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=1)))


@pytest.fixture(scope="module")
def rounds(base):
    """Adapters after a round, and its report: without privacy, with a mechanism that changes nothing, and with one."""

    def after(mechanism):
        plan, state = dense_plan(base, LORA, **SHAPES, mechanism=mechanism)
        ended, report = run_round(plan, base.params, state)
        return jax.tree.leaves(ended.adapters), report

    return {
        "plain": after(None),
        "harmless": after(DpSgd(clip_norm=1e4, noise_multiplier=1e-20)),
        "private": after(DpSgd(clip_norm=1e4, noise_multiplier=1.0)),
    }


@pytest.mark.parametrize("kind", ["plain", "private"])
def test_a_round_has_the_tokens_that_were_asked_for_and_no_padding(rounds, kind):
    report = rounds[kind][1]
    assert (report.tokens, report.padded_tokens) == (TOKENS, TOKENS)
    assert [client.examples for client in report.clients] == [4, 4, 4]


def test_without_noise_and_clipping_a_private_round_is_the_plain_one(rounds):
    for plain, harmless, private in zip(*(rounds[kind][0] for kind in ("plain", "harmless", "private")), strict=True):
        np.testing.assert_allclose(harmless, plain, atol=1e-5)
        assert np.abs(private - plain).max() > 1e-4


def test_operations_of_a_training_step(base):
    config = base.model.config
    width, mlp, keys = config.width, config.mlp_width, config.kv_heads * config.head_dim
    weights = 2 * width * width + 2 * width * keys + 3 * width * mlp  # q and o, k and v, the MLP's three
    rows, length, targets = 5, 8, 11
    by_hand = 2 * 2 * (weights * rows * length + width * config.vocab_size * targets)
    assert training_flops(base, rows, length, targets) == by_hand
