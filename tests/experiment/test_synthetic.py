"""Rounds for benchmarks: exact shapes, and the same work with and without privacy."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import tiny_folder

from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.synthetic import dense_plan, plan_on, random_sites, training_flops
from fedjax_llm.federation.plan import Execution
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
    assert training_flops(base.model, rows * length, targets) == by_hand


def test_given_examples_are_packed_as_a_run_would(base):
    """Two sites of uneven texts: all tokens are trained on in each step, in a few shapes of their own lengths."""
    rng = np.random.default_rng(4)
    lengths = [(5, 9, 21), (6, 30, 13)]
    sites = [
        (f"s{s}", tuple(EncodedExample(f"{s}", rng.integers(3, 60, n).astype(np.int32), 3) for n in row))
        for s, row in enumerate(lengths)
    ]
    layout = Execution(tokens_per_microbatch=64, buckets=2)
    plan, state = plan_on(base, LORA, sites, steps=2, execution=layout)
    every = [example for _, examples in sites for example in examples]
    assert plan.shapes == choose_shapes(every, tokens_per_microbatch=64, buckets=2)
    _, report = run_round(plan, base.params, state)
    assert report.tokens == 2 * sum(map(sum, lengths)) < report.padded_tokens
    assert [client.examples for client in report.clients] == [6, 6]


def test_sites_of_different_sizes_are_refused(base):
    example = EncodedExample("a", np.arange(5, dtype=np.int32), 2)
    with pytest.raises(UserError, match="between 1 and 2 examples"):
        plan_on(base, LORA, [("a", (example,)), ("b", (example, example))], steps=1, execution=Execution())


@pytest.mark.parametrize(("layers", "megabytes", "there"), [((), 64, False), ((1,), 64, True), ((1,), 0, False)])
def test_a_plan_has_a_trunk_where_layers_lie_below_the_adapters(tmp_path, layers, megabytes, there):
    base = load(str(tiny_folder(tmp_path, num_hidden_layers=2)))
    lora, layout = replace(LORA, layers=layers), Execution(trunk_megabytes=megabytes)
    plan, _ = plan_on(base, lora, random_sites(base, 2, 1, 8), steps=1, execution=layout)
    assert (plan.trunk is not None) == there
    if plan.trunk is not None:
        assert (plan.trunk.layers, plan.trunk.used) == (1, 0)
