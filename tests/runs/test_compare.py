"""Runs side by side: the right figures, honest pairing, tables that can be read."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from private_runs import privacy
from rich.console import Console

from fedjax_llm.errors import UserError
from fedjax_llm.runs import compare, summary


def evaluation(shift, records=20, first=0, sites=("nerves", "[b]skin")):
    found = {}
    for place, site in enumerate(sites):
        rng = np.random.default_rng(place)
        tokens = rng.integers(1, 20, 100)
        nll = (rng.gamma(9, 0.3, 100) + shift) * tokens
        rows = slice(first, first + records)
        found[site] = {
            "records": [f"r{row}" for row in range(100)][rows], "nll": nll[rows].tolist(),
            "tokens": tokens[rows].tolist(), "correct": (tokens[rows] // 2).tolist(),
            "choice_records": [], "choice_correct": [],
        }  # fmt: skip
    return {"sites": found, "guessers": {}}


def make(folder, setting="federated", base=None, final=None, **changes):
    folder.mkdir(parents=True)
    figures = {
        "setting": setting, "rounds": 30, "tokens_trained": 192_000, "train_seconds": 930.0, "upload_bytes": 10**6,
        "download_bytes": 2 * 10**6, "seed": 0, "privacy": None,
    } | changes  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(figures))
    (folder / "evaluation.json").write_text(json.dumps({"base": base or evaluation(0), "final": final}))
    return folder


def shown(comparison):
    out = io.StringIO()
    compare.render(Console(file=out, width=80), comparison)
    return out.getvalue()


@pytest.fixture
def two(tmp_path):
    return [
        make(tmp_path / "base", "base"),
        make(tmp_path / "tuned", final=evaluation(-0.5)),
    ]


def test_figures_are_those_of_each_runs_own_model(two):
    found = compare.compare(two, seed=3)
    expected = summary.summarise_evaluation(evaluation(-0.5), 3)
    assert list(found.runs) == ["base", "tuned"]
    for name in ("nll", "nll_low", "perplexity_high", "token_accuracy", "choice_accuracy"):
        assert found.runs["tuned"][name] == expected[name]
    assert found.runs["tuned"] | {"setting": "federated", "tokens": 192_000, "bytes": 3 * 10**6} == found.runs["tuned"]
    assert (
        found.sites["nerves"]["base"]["nll"] == summary.summarise_evaluation(evaluation(0), 3)["sites"]["nerves"]["nll"]
    )
    assert found.warnings == ()
    json.dumps(dataclasses.asdict(found))


def test_differences_are_paired_with_the_first_run(two):
    found = compare.compare(two)
    assert list(found.differences) == ["tuned"]
    for interval in (found.differences["tuned"]["macro"], *found.differences["tuned"]["sites"].values()):
        assert list(interval.values()) == pytest.approx([-0.5] * 3)  # every record is half a nat better


def test_other_records_are_warned_of_and_only_shared_ones_paired(two, tmp_path):
    late = make(tmp_path / "late", final=evaluation(-0.25, first=5, sites=("nerves", "[b]skin", "eye")))
    found = compare.compare([*two, late])
    assert len(found.warnings) == 1
    assert "late was evaluated on other records than base (40 are in one of them only)" in found.warnings[0]
    assert "30 records that both have" in found.warnings[0]
    assert found.differences["late"]["macro"]["difference"] == pytest.approx(-0.25)
    assert set(found.differences["late"]["sites"]) == {"nerves", "[b]skin"}
    assert "base" not in found.sites["eye"]


def test_runs_without_a_common_record_or_token_count_are_not_paired(two, tmp_path):
    apart = make(tmp_path / "apart", final=evaluation(0, first=50))
    other = evaluation(0)
    other["sites"]["nerves"]["tokens"][0] += 1
    found = compare.compare([two[0], apart, make(tmp_path / "other", final=other)])
    assert found.differences == {}
    assert "0 records that both have" in found.warnings[0]
    assert "other and base cannot be paired" in found.warnings[1]


def test_tables_hold_everything_within_80_columns(two, tmp_path):
    more = [make(tmp_path / name, name, final=evaluation(-0.3)) for name in ("local", "centralised")]
    text = shown(compare.compare([*two, *more]))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("[b]skin", "192,000", "3 MB", "15m 30s", "-0.500", "[-0.500, -0.500]", "centralised", "minus base"):
        assert part in text, part
    assert "warning" not in text


def test_each_run_shows_its_guarantee_or_that_there_is_none(two, tmp_path):
    statement = privacy({"eye": 7.975, "skin": 2.0}, stopped="round 10 would exceed the budget")
    private = make(tmp_path / "private", final=evaluation(-0.3), privacy=statement, rounds_done=9)
    found = compare.compare([*two, private])
    guarantee = {"epsilon": 7.975, "delta": 1e-5, "unit": "record", "adjacency": "add or remove one record"}
    assert [run["privacy"] for run in found.runs.values()] == [None, None, guarantee]
    rows = [line.split() for line in shown(found).splitlines()]
    assert ["privacy", "none", "none", "epsilon", "7.98"] in rows
    assert ["+/-1", "record"] in rows
    assert ["delta", "1e-05"] in rows
    assert ["rounds", "30", "30", "9", "of", "30"] in rows
    assert found.warnings == ()


def test_epsilons_of_different_units_are_warned_of(tmp_path):
    runs = [
        make(tmp_path / "one", privacy=privacy({"eye": 8.0})),
        make(tmp_path / "two", privacy=privacy({"every site": 2.0}, unit="site", delta=1e-3)),
        make(tmp_path / "open"),
    ]
    (warning,) = compare.compare(runs).warnings
    assert "not of the same unit and delta" in warning
    assert "+/-1 record, delta 1e-05: one; +/-1 site, delta 0.001: two" in warning


def test_tables_of_many_sites_stay_short(tmp_path):
    names = [f"clinic {place}" for place in range(60)]
    runs = [make(tmp_path / name, final=evaluation(0, sites=names)) for name in ("one", "two")]
    text = shown(compare.compare(runs, resamples=20))
    assert text.count("... and 20 more sites") == 2
    assert len(re.findall(r"^clinic", text, re.MULTILINE)) == 80


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [make(tmp_path / "a" / "run"), make(tmp_path / "b" / "run")]
    assert list(compare.compare(paths).runs) == [str(path) for path in paths]


def test_what_cannot_be_compared_is_named(two, tmp_path):
    with pytest.raises(UserError, match="nothing to compare"):
        compare.compare([])
    (two[1] / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tuend is not the folder of a run.*; did you mean 'tuned'\?"):
        compare.compare([*two, tmp_path / "tuend"])
    (tmp_path / "begun").mkdir()
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        compare.compare([*two, tmp_path / "begun"])
    with pytest.raises(UserError, match="named 2 times"):
        compare.compare([two[0], two[0]])


def test_names_of_ones_own_are_taken_in_order_and_must_fit(two):
    assert list(compare.compare(two, names=["A", "B"]).runs) == ["A", "B"]
    for names in (["A"], ["A", "A"]):
        with pytest.raises(UserError, match="give each run one of its own"):
            compare.compare(two, names=names)
