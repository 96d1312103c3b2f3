"""The benchmark: what is timed, and against what."""

import gc
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_folder

from experiments import bench
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import timing
from fedjax_llm.models.loading import load


class Clock:
    """Time that passes only in works."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def work(self, name, *seconds):
        """A work that takes these seconds, one after the other; the last for ever."""
        left = list(seconds)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return jnp.zeros(1)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_warm_up_is_not_counted(clock):
    assert timing.timed(clock.work("a", 50.0, 1.0, 2.0), 2) == [1.0, 2.0]


def test_pairs_take_turns_at_going_first(clock):
    pairs = timing.paired(clock.work("a", 50.0, 1.0, 2.0, 3.0), clock.work("b", 70.0, 10.0, 20.0, 30.0), 3)
    assert pairs == [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab"


def test_the_cost_of_privacy_is_the_median_over_pairs(clock, monkeypatch):
    monkeypatch.setattr(bench, "peak_during", lambda work: {"plain": 1000, "private": 1024}[work.__name__])
    plain, private = clock.work("a", 9.0, 10.0, 20.0, 40.0), clock.work("b", 9.0, 11.0, 30.0, 42.0)
    plain.__name__, private.__name__ = "plain", "private"
    seconds, found = bench.cost(plain, private, 3)
    assert seconds == 30.0
    assert found == {"ratio": 1.1, "low": 1.05, "high": 1.5, "memory_growth_bytes": 24}


def test_memory_that_the_system_cannot_tell_is_left_out(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_FORGET_PEAK", tmp_path / "missing" / "file")
    assert bench.cost(clock.work("a", 1.0), clock.work("b", 1.0), 1)[1]["memory_growth_bytes"] is None
    assert clock.calls == ["a", "b", "a", "b"]  # and nothing more is run for it


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels cannot forget a peak")
def test_a_peak_is_that_of_the_call_alone():
    large, small = 200 << 20, 20 << 20
    gc.collect()  # what other tests left behind must not go between the two calls
    high = bench.peak_during(lambda: np.ones(large, np.uint8)[:1])
    low = bench.peak_during(lambda: np.ones(small, np.uint8)[:1])
    assert abs((high - low) - (large - small)) < 20 << 20


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def test_every_case_is_measured(model_folder, monkeypatch, capsys):
    monkeypatch.setattr(bench, "set_up_process", lambda: None)
    monkeypatch.setattr(bench, "matmul_peak", lambda: 1e9)
    arguments = f"bench --model {model_folder} --clients 2 --steps 2 --batch 3 --length 8 --repeats 1 --json"
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert bench.main() == 0
    step, plain, private = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [case["case"] for case in (step, plain, private)] == ["train_step", "round", "private_round"]
    for case, tokens in ((step, 2 * 3 * 8), (plain, 2 * 2 * 3 * 8), (private, 2 * 2 * 3 * 8)):
        assert case["real_tokens_per_second"] == case["padded_tokens_per_second"]
        assert case["real_tokens_per_second"] == pytest.approx(tokens / case["seconds"], rel=0.05)
    assert private["target"] == "at most 1.05"
    adapters = bench.dense_plan(load(str(model_folder)), bench.ADAPTERS, clients=2, steps=2, batch=3, length=8)[1]
    one_row = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters.adapters))
    assert private["memory_growth_target"] == f"at most {2 * 3 * one_row}"


def small(model, *arguments):
    """Cases of the suite of peers, for a small model."""
    shapes = {"clients": 2, "steps": 2, "batch": 3, "length": 8, "repeats": 1}
    return list(bench.cases(bench.Bench(model=str(model), suite="peers", only=arguments, **shapes)))


def test_what_needs_no_peer_is_told_beside_the_peers(model_folder, monkeypatch):
    monkeypatch.setattr(bench, "set_up_process", lambda: None)
    monkeypatch.setattr(bench, "matmul_peak", lambda: 1e9)
    monkeypatch.setattr(bench, "peer_cases", lambda *arguments: pytest.fail("no peer was asked for"))
    share, cost = small(model_folder, "cost-of-privacy", "share-of-peak")
    assert (share["case"], share["target"], share["value"] > 0) == ("share-of-peak", "at least 0.75", True)
    assert (cost["case"], cost["target"]) == ("cost-of-privacy", "at most 1.05")
    assert cost["low"] <= cost["ratio"] <= cost["high"]


def test_a_case_that_does_not_exist_is_refused_with_the_nearest(model_folder):
    with pytest.raises(UserError, match=r"unknown case 'singels'.*singles"):
        small(model_folder, "singels")
