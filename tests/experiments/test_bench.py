"""The benchmark: what is timed against what, and how peers are run."""

import gc
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_folder

from experiments import bench
from experiments.bench import Bench
from fedjax_llm.errors import UserError
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
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_warm_up_is_not_counted(clock):
    assert bench.timed(clock.work("a", 50.0, 1.0, 2.0), 2) == [1.0, 2.0]


def test_pairs_take_turns_at_going_first(clock):
    pairs = bench.paired(clock.work("a", 50.0, 1.0, 2.0, 3.0), clock.work("b", 70.0, 10.0, 20.0, 30.0), 3)
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


@pytest.fixture
def peer(tmp_path):
    """An interpreter that notes what it is asked for, and answers with rounds: a warm-up of 99 s, then two of 8 s."""
    rounds = [json.dumps({"round_s": seconds, "train_s": seconds / 2}) for seconds in (99.0, 8.0, 8.0)]
    script = tmp_path / "python"
    lines = ["#!/bin/sh", f'echo "$@" >> {tmp_path}/asked', "echo loading", *(f"echo '{line}'" for line in rounds)]
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    return script


def test_private_peers_are_set_against_the_private_round(clock, peer, model_folder):
    settings = Bench(model=str(model_folder), clients=2, steps=3, batch=1, length=8, turns=2, peer_python=peer)
    base = load(str(model_folder))
    found = list(bench.peer_cases(settings, base, clock.work("plain", 4.0), clock.work("private", 5.0)))
    ratios = {case["case"]: (case["ratio"], case.get("target")) for case in found}
    assert ratios == {
        "peft-loop/round": (2.0, "at least 1.0"),
        "peft-loop/training": (1.0, None),
        "flower-peft/round": (2.0, "at least 1.15"),
        "flower-peft/training": (1.0, None),
        "peft-loop-opacus/round": (1.6, None),
        "peft-loop-opacus/training": (0.8, None),
        "flower-peft-opacus/round": (1.6, "at least 1.5"),
        "flower-peft-opacus/training": (0.8, None),
    }
    assert {"ours": 12.0, "peer": 6.0, "low": 2.0, "high": 2.0}.items() <= found[0].items()  # 48 tokens in 4 s and 8 s
    asked = (peer.parent / "asked").read_text().splitlines()
    assert len(asked) == 2 * len(bench.PEERS)
    assert ["--private" in line for line in asked[::2]] == [False, False, True, True]
    assert ["--no-flower" in line for line in asked[::2]] == [True, False, True, False]
    assert all(f"--model {model_folder}" in line for line in asked)
    assert all("--clients 2 --steps 3 --batch 1 --length 8" in line for line in asked)


@pytest.mark.parametrize("script", ["echo '{\"round_s\": 1}'; echo out of memory >&2; exit 1", "echo '{}'"])
def test_a_peer_that_fails_or_says_too_little_is_told(script, tmp_path, model_folder):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"the peer .*--no-flower.* failed"):
        bench.run_peer(Bench(model=str(model_folder), peer_python=python), load(str(model_folder)), ("--no-flower",))


def test_without_the_peers_environment_it_says_how_to_make_it(tmp_path, model_folder):
    settings = Bench(model=str(model_folder), peer_python=tmp_path / "none")
    with pytest.raises(UserError, match="make peers"):
        next(bench.peer_cases(settings, load(str(model_folder)), lambda: None, lambda: None))


def test_every_case_is_measured(model_folder, monkeypatch, capsys):
    monkeypatch.setattr(bench, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(bench, "matmul_peak", lambda: 1e9)
    arguments = f"bench --model {model_folder} --clients 2 --steps 2 --batch 3 --length 8 --repeats 1 --json"
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert bench.main() == 0
    step, plain, private = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [case["case"] for case in (step, plain, private)] == ["train_step", "round", "private_round"]
    for case, tokens in ((step, 2 * 3 * 8), (plain, 2 * 2 * 3 * 8), (private, 2 * 2 * 3 * 8)):
        assert case["real_tokens_per_second"] == case["padded_tokens_per_second"]
        assert case["real_tokens_per_second"] == pytest.approx(tokens / case["seconds"], rel=0.05)
    assert private["target"] == "at most 1.1"
    adapters = bench.dense_plan(load(str(model_folder)), bench.ADAPTERS, clients=2, steps=2, batch=3, length=8)[1]
    one_row = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters.adapters))
    assert private["memory_growth_target"] == f"at most {2 * 3 * one_row}"
