"""Ours against the peers: both train on the same tokens, take turns, and failures are told."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_folder

from experiments import peer_cases
from experiments.peer_cases import GENERATE, NAMES, Setup
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import timing
from fedjax_llm.experiment.synthetic import plan_on
from fedjax_llm.federation.plan import Execution
from fedjax_llm.federation.rounds import run_round
from fedjax_llm.models.loading import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def base(folder):
    return load(str(folder))


@pytest.fixture(scope="module")
def cards():
    """Eight sites with two cards each, of 5 to 20 tokens, half of them prompt."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(5, 21, (8, 2))
    return [
        (f"site-{s}", tuple(EncodedExample(f"{s}", rng.integers(3, 60, n).astype(np.int32), n // 2) for n in row))
        for s, row in enumerate(lengths.tolist())
    ]


@pytest.fixture
def peer(tmp_path):
    """An interpreter that keeps what it is asked for and given, and answers: a warm-up of 99 s, then rounds of 8 s."""
    rounds = [json.dumps({"round_s": seconds, "train_s": seconds / 2}) for seconds in (99.0, 8.0, 8.0)]
    script = tmp_path / "python"
    keep = [f'echo "$@" >> {tmp_path}/asked', f'cat "$5" >> {tmp_path}/given', f"echo --- >> {tmp_path}/given"]
    script.write_text("\n".join(["#!/bin/sh", *keep, "echo loading", *(f"echo '{line}'" for line in rounds)]))
    script.chmod(0o755)
    return script


def run(base, folder, python, *only, turns=1):
    """Cases with clients of two examples of 8 random tokens."""
    return list(peer_cases.peer_cases(base, str(folder), python, turns, only, (3, 2, 8)))


def asked(python):
    """The commands and the examples of all runs of the peer."""
    given = (python.parent / "given").read_text().split("---\n")[:-1]
    examples = [[json.loads(line) for line in text.splitlines()] for text in given]
    return (python.parent / "asked").read_text().splitlines(), examples


def test_every_case_runs_ours_and_its_peer(base, folder, peer, cards, monkeypatch):
    monkeypatch.setattr(peer_cases, "flashcards", lambda base: cards)
    monkeypatch.setattr(peer_cases, "NEW_TOKENS", 3)
    plans = []
    for name in ("round_work", "training_work"):
        monkeypatch.setattr(peer_cases, name, lambda base, plan, state: lambda: plans.append(plan))
    found = run(base, folder, peer, *NAMES)
    assert [case["case"] for case in found] == list(NAMES)
    assert all({"ours", "peer", "ratio", "low", "high", "target"} <= case.keys() for case in found)
    assert [case["case"] for case in found if "fill_seconds" in case] == ["upper"]
    kinds = {id(plan): (plan.mechanism is not None, plan.trunk is not None) for plan in plans}
    private, trunk = map(list, zip(*kinds.values(), strict=True))
    assert private == [name.endswith("private") for name in NAMES[:-2]]
    assert trunk == [name == "upper" for name in NAMES[:-2]]
    commands, examples = asked(peer)
    options = {name: (command, lines) for name, command, lines in zip(NAMES, commands, examples, strict=True)}
    assert [name for name in NAMES if "--private" in options[name][0]] == ["dense-private", "cards-private"]
    assert [name for name in NAMES if "--no-flower" in options[name][0]] == ["dense-training"]
    assert [name for name in NAMES if "--cache-model" in options[name][0]] == ["singles-cached"]
    assert [name for name in NAMES if "--layers 1" in options[name][0]] == ["upper"]
    assert [name for name in NAMES if "--steps 2" in options[name][0]] == ["dense", "dense-training", "dense-private"]
    assert [name for name in NAMES if "generate_peer.py" in options[name][0]] == list(GENERATE.values())
    assert all(f"--model {folder}" in command for command in commands)
    # The peer is given the tokens that ours trains on; of single cards, each client has one.
    tokens = [example.tokens.tolist() for _, examples in cards for example in examples]
    for name, clients in (("cards", 8), ("singles", 16), ("upper", 8), ("generate-8", 8)):
        lines = options[name][1]
        assert [line["tokens"] for line in lines] == tokens
        assert {line["client"] for line in lines} == set(range(clients))
    rates = {case["case"]: case["peer"] for case in found}
    assert rates["dense"] == pytest.approx(2 * 3 * 2 * 8 / 8, abs=0.1)
    assert rates["dense-training"] == pytest.approx(2 * 3 * 2 * 8 / 4, abs=0.1)  # that peer's time of training
    assert rates["cards"] == pytest.approx(sum(map(len, tokens)) / 8, abs=0.1)


def test_ratios_are_of_pairs_that_take_turns_at_going_first(monkeypatch):
    now, calls, peers = [0.0], [], iter((10.0, 30.0, 80.0))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work():
        calls.append("o")
        now[0] += 100.0 if len(calls) == 1 else 10.0  # the first is the warm-up

    def other():
        calls.append("p")
        return next(peers)

    pairs = peer_cases.in_turns(work, other, 3, 2)
    assert "".join(calls) == "o" + "poo" + "oop" + "poo"
    assert pairs == [(10.0, 10.0), (10.0, 30.0), (10.0, 80.0)]
    found = peer_cases.figures("x", 60, pairs, 1.5)
    assert found == {
        "case": "x", "ours": 6.0, "peer": 2.0, "ratio": 3.0, "low": 1.0, "high": 8.0, "target": "at least 1.5"
    }  # fmt: skip


def test_training_alone_is_what_a_round_trains(base, cards):
    """One client's mean is its own: with a cohort of one, the round's adapters are those of training alone."""
    layout = Execution(tokens_per_microbatch=40, buckets=1)
    plan, state = plan_on(base, peer_cases.ADAPTERS, cards[:1], steps=3, execution=layout)
    after, _ = run_round(plan, base.params, state)
    alone = peer_cases.training_work(base, plan, state)()
    for one, other, before in zip(*map(jax.tree.leaves, (after.adapters, alone, state.adapters)), strict=True):
        np.testing.assert_allclose(one, other[0], atol=1e-5)
        assert np.abs(one - before).max() > 1e-4


def test_the_upper_third():
    assert [peer_cases.upper_third(layers) for layers in (30, 2)] == [tuple(range(20, 30)), (1,)]


@pytest.mark.parametrize("script", ["echo '{\"round_s\": 1}'; echo out of memory >&2; exit 1", "echo '{}'"])
def test_a_peer_that_fails_or_says_too_little_is_told(script, tmp_path, base, folder):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"the peer .*peft_peer.py.* failed") as told:
        peer_cases.run_peer(Setup(base, folder, python, 1, {}), "peft_peer.py", tmp_path / "file", [], "round_s")
    assert ("out of memory" in str(told.value)) == ("memory" in script)


def test_without_the_peers_environment_it_says_how_to_make_it(tmp_path, base, folder):
    with pytest.raises(UserError, match="make peers"):
        run(base, folder, tmp_path / "none", "dense")


def _command(tmp_path, monkeypatch, body):
    """Puts a script in the place of the interpreter; ``$OUT`` is the run's folder."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nfor word; do case $word in --out=*) OUT=${{word#--out=}};; esac; done\n{body}\n")
    python.chmod(0o755)
    monkeypatch.setattr(peer_cases.sys, "executable", str(python))


def test_the_first_round_itself_does_not_count(tmp_path, monkeypatch):
    line = json.dumps({"round": 1, "timing": {"seconds": 1000.0}})
    _command(tmp_path, monkeypatch, f"mkdir -p $OUT; echo '{line}' > $OUT/metrics.jsonl; exec sleep 600")
    assert -1000 < peer_cases.seconds_to_first_round() < -400  # and it does not wait for the run's end


def test_a_run_that_does_no_round_is_told(tmp_path, monkeypatch):
    _command(tmp_path, monkeypatch, "echo no such model >&2; exit 1")
    with pytest.raises(UserError, match="no such model"):
        peer_cases.seconds_to_first_round()


def test_half_a_line_is_no_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert peer_cases._first_line(path) == ""
    path.write_text('{"round": 1')
    assert peer_cases._first_line(path) == ""
    path.write_text('{"round": 1}\n{"rou')
    assert peer_cases._first_line(path) == '{"round": 1}'
