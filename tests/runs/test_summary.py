"""The figures against a plain loop, and their intervals against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.runs import summary


def site(rng, records, shift=0.0, choices=0):
    tokens = rng.integers(1, 30, records)
    return {
        "records": [f"r{index}" for index in range(records)],
        "nll": list((rng.gamma(3, 1, records) + shift) * tokens),
        "tokens": [int(count) for count in tokens],
        "correct": [int(rng.integers(0, count + 1)) for count in tokens],
        "choice_records": [f"r{index}" for index in range(choices)],
        "choice_correct": [int(value) for value in rng.integers(0, 2, choices)],
    }


def evaluation(seed=0, sizes=None, shift=0.0):
    sizes = {"nerves": 40, "skin": 7} if sizes is None else sizes
    return {
        "sites": {
            name: site(np.random.default_rng([seed, index]), size, shift, size // 2)
            for index, (name, size) in enumerate(sizes.items())
        },
        "guessers": {"overlap": 0.27},
    }


def test_points_are_macro_means_of_token_weighted_means():
    given_ = evaluation()
    figures = summary.summarise_evaluation(given_, seed=1, resamples=50)
    nll, accuracy, choice = [], [], []
    for name, results in given_["sites"].items():
        total = sum(results["tokens"])
        nll.append(sum(results["nll"]) / total)
        accuracy.append(sum(results["correct"]) / total)
        choice.append(sum(results["choice_correct"]) / len(results["choice_correct"]))
        assert figures["sites"][name]["nll"] == pytest.approx(nll[-1], rel=1e-12)
        assert figures["sites"][name]["perplexity"] == pytest.approx(math.exp(nll[-1]), rel=1e-12)
    assert figures["nll"] == pytest.approx(sum(nll) / 2, rel=1e-12)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nll) / 2), rel=1e-12)
    assert figures["token_accuracy"] == pytest.approx(sum(accuracy) / 2, rel=1e-12)
    assert figures["choice_accuracy"] == pytest.approx(sum(choice) / 2, rel=1e-12)
    assert figures["guessers"] == {"overlap": 0.27}


def test_bounds_agree_with_a_plain_bootstrap_loop():
    given_ = evaluation()
    figures = summary.summarise_evaluation(given_, seed=1, resamples=4000)
    rng, drawn = np.random.default_rng(99), []
    for _ in range(4000):
        means = []
        for results in given_["sites"].values():
            rows = rng.integers(0, len(results["tokens"]), len(results["tokens"]))
            means.append(sum(results["nll"][row] for row in rows) / sum(results["tokens"][row] for row in rows))
        drawn.append(sum(means) / len(means))
    # Two independent sets of 4000 replicates: their 2.5% quantiles differ by about 0.03 standard deviations each
    # (standard error sqrt(.025 * .975 / 4000) / density(-1.96) = 0.042); six of those are never met by chance.
    tolerance = 6 * 0.042 * math.sqrt(2) * np.std(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert figures["nll_low"] == pytest.approx(low, abs=tolerance)
    assert figures["nll_high"] == pytest.approx(high, abs=tolerance)
    assert figures["perplexity_low"] == pytest.approx(math.exp(figures["nll_low"]))
    assert figures["perplexity_high"] == pytest.approx(math.exp(figures["nll_high"]))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 data sets of 60 records: a 95% interval holds the true mean in about 93% of them (percentile, n = 60).

    Fewer than 172 (86%) of 200 at a coverage of 93% has a binomial probability below 3e-4: the false-alarm rate. The
    seeds are fixed, so the outcome is too.
    """
    hits = 0
    for trial in range(200):
        rng = np.random.default_rng([7, trial])
        results = site(rng, 60)
        results["tokens"] = [1] * 60
        results["nll"] = list(rng.gamma(3, 1, 60))  # the true mean is 3
        results["correct"] = [0] * 60
        figures = summary.summarise_evaluation({"sites": {"s": results}}, seed=trial, resamples=400)
        hits += figures["nll_low"] <= 3 <= figures["nll_high"]
    assert 172 <= hits < 200


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
def test_bounds_enclose_sensible_values_and_repeat(seed, first, second):
    given_ = evaluation(seed, {"a": first, "b": second})
    figures = summary.summarise_evaluation(given_, seed=seed, resamples=60)
    assert figures == summary.summarise_evaluation(given_, seed=seed, resamples=60)
    per_record = [n / t for s in given_["sites"].values() for n, t in zip(s["nll"], s["tokens"], strict=True)]
    assert min(per_record) - 1e-9 <= figures["nll_low"] <= figures["nll_high"] <= max(per_record) + 1e-9
    for name in ("a", "b"):
        alone = summary.summarise_evaluation({"sites": {name: given_["sites"][name]}}, seed=seed, resamples=60)
        assert alone["sites"][name] == figures["sites"][name], "other sites do not matter"


def test_blocks_of_replicates_change_nothing_but_the_memory(monkeypatch):
    whole = summary.summarise_evaluation(evaluation(), seed=3, resamples=101)
    monkeypatch.setattr(summary, "_BLOCK", 100)
    parts = summary.summarise_evaluation(evaluation(), seed=3, resamples=101)
    assert parts["nll_low"] == pytest.approx(whole["nll_low"], rel=1e-12)


def test_a_single_record_has_an_interval_without_width():
    figures = summary.summarise_evaluation(evaluation(sizes={"a": 1}), seed=0, resamples=50)
    assert figures["nll_low"] == pytest.approx(figures["nll"]) == figures["nll_high"]


def test_without_choices_there_is_no_choice_accuracy():
    given_ = evaluation(sizes={"a": 8, "b": 1})  # b has no question
    figures = summary.summarise_evaluation(given_, seed=0, resamples=50)
    assert figures["sites"]["b"]["choice_accuracy"] is None
    assert figures["choice_accuracy"] == figures["sites"]["a"]["choice_accuracy"]
    assert summary.summarise_evaluation(evaluation(sizes={"b": 1}), 0, 50)["choice_accuracy_low"] is None


def test_paired_difference_is_of_records_not_of_positions():
    base, final = evaluation(sizes={"a": 30}), evaluation(sizes={"a": 30})
    results = final["sites"]["a"]
    results["nll"] = [value - 0.5 * count for value, count in zip(results["nll"], results["tokens"], strict=True)]
    order = np.random.default_rng(0).permutation(30)
    for name in ("records", "nll", "tokens", "correct"):
        results[name] = [results[name][row] for row in order]
    found = summary.paired_difference(base, final, seed=0, resamples=200)["a"]
    # every record is better by exactly half a nat a token, so no resampling can give anything else
    assert [found[name] for name in ("difference", "low", "high")] == pytest.approx([-0.5] * 3)


def test_paired_bounds_agree_with_a_plain_loop_and_the_macro_mean_is_of_the_sites():
    base, final = evaluation(1), evaluation(1)
    rng = np.random.default_rng(5)
    for results in final["sites"].values():
        results["nll"] = list(np.array(results["nll"]) + rng.normal(-2, 6, len(results["nll"])))
    found = summary.paired_difference(base, final, seed=0, resamples=4000)
    for name, interval in found.items():
        before, after = base["sites"][name], final["sites"][name]
        change, tokens = np.subtract(after["nll"], before["nll"]), np.array(before["tokens"])
        rows = rng.integers(0, len(tokens), (4000, len(tokens)))
        drawn = change[rows].sum(1) / tokens[rows].sum(1)
        tolerance = 6 * 0.042 * math.sqrt(2) * drawn.std()
        assert interval["difference"] == pytest.approx(change.sum() / tokens.sum(), rel=1e-12)
        assert interval["low"] == pytest.approx(np.quantile(drawn, 0.025), abs=tolerance)
        assert interval["high"] == pytest.approx(np.quantile(drawn, 0.975), abs=tolerance)
    macro = summary.macro_paired_difference(base, final, seed=0, resamples=4000)
    assert macro["difference"] == pytest.approx(np.mean([one["difference"] for one in found.values()]), rel=1e-12)
    assert min(one["low"] for one in found.values()) < macro["low"] < macro["difference"] < macro["high"]


def test_what_cannot_be_paired_is_refused():
    base = evaluation(sizes={"a": 3})
    with pytest.raises(UserError, match="same sites"):
        summary.paired_difference(base, evaluation(sizes={"b": 3}), seed=0)
    with pytest.raises(UserError, match="same records"):
        summary.paired_difference(base, evaluation(sizes={"a": 4}), seed=0)
    other = evaluation(sizes={"a": 3})
    other["sites"]["a"]["tokens"][0] += 1
    with pytest.raises(UserError, match="different answer tokens"):
        summary.paired_difference(base, other, seed=0)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="no record at all"):
        summary.summarise_evaluation(evaluation(sizes={"a": 0}), seed=0)
    broken = evaluation(sizes={"a": 3})
    broken["sites"]["a"]["nll"].pop()
    with pytest.raises(UserError, match="nll has 2 entries for 3 records"):
        summary.summarise_evaluation(broken, seed=0)


def test_restrict_keeps_the_wanted_order():
    part = summary.restrict(evaluation(sizes={"a": 5}), {"a": ["r3", "r1"]})
    whole = evaluation(sizes={"a": 5})["sites"]["a"]
    assert part["sites"]["a"]["records"] == ["r3", "r1"]
    assert part["sites"]["a"]["nll"] == [whole["nll"][3], whole["nll"][1]]


def test_sites_of_one_record_each_are_drawn_themselves():
    rng = np.random.default_rng(3)
    losses = rng.gamma(4.0, 5.0, 90)
    sites = {
        f"site-{i}": {"records": ["r"], "nll": [float(loss)], "tokens": [10], "correct": [4]}
        for i, loss in enumerate(losses)
    }
    shorter = {name: {**found, "nll": [0.5 * found["nll"][0]]} for name, found in sites.items()}
    macro = summary.summarise_evaluation({"sites": sites}, seed=1)
    spread = (macro["nll_high"] - macro["nll_low"]) / 2
    assert spread == pytest.approx(1.96 * losses.std() / 10 / np.sqrt(90), rel=0.1)
    paired = summary.macro_paired_difference({"sites": sites}, {"sites": shorter}, seed=1)
    assert paired["low"] < paired["difference"] < paired["high"] < 0
