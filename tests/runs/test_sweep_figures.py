"""A sweep's estimates, targets and rows from invented cells, against the definitions; its tables and curves."""

import csv
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedjax_llm.runs import sweep_figures, sweep_plots, sweep_table
from fedjax_llm.runs.sweep_figures import estimate, first_reached, rows

SVG = "{http://www.w3.org/2000/svg}"


def cell(algorithm, data, seed, validation=(3.0, 2.0), nll=2.0, errors=(0.1, 0.2), nbytes=(10, 20), status="finished"):
    if status != "finished":
        reason = "it broke" if status == "failed" else None
        parts = {"status": status, "reason": reason, "figures": None, "curve": None}
    else:
        figures = dict.fromkeys((*sweep_figures.PLAIN, "base_nll"), 1.0)
        figures |= {"nll": nll, "validation": validation[-1], "aggregation_error": 0.0}
        numbers = list(range(1, len(validation) + 1))
        curve = {"round": numbers, "bytes": list(nbytes), "validation": list(validation)}
        curve["aggregation_error"] = list(errors)
        parts = {"status": status, "reason": None, "figures": figures, "curve": curve}
    return {"algorithm": algorithm, "data": data, "seed": seed} | parts


def row(found, algorithm, data="d"):
    (one,) = [row for row in found if (row["algorithm"], row["data"]) == (algorithm, data)]
    return one


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12))
def test_the_interval_is_students(values):
    found = estimate(values)
    assert (found["n"], found["interval"]) == (len(values), "t")
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-9)
    if np.std(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=1e-8), pytest.approx(high, abs=1e-8))


def test_fewer_than_three_seeds_give_a_range_and_none_nothing():
    assert estimate([2.0, 1.0]) == {"mean": 1.5, "low": 1.0, "high": 2.0, "n": 2, "interval": "range"}
    assert estimate([2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 1, "interval": "range"}
    assert estimate([]) is None


def test_a_target_is_reached_at_the_first_validated_round_at_or_below_it():
    curve = {"round": [1, 2, 3, 4], "bytes": [5, 10, 15, 20], "validation": [None, 2.0, None, 1.0]}
    assert first_reached(curve, 2.0) == (2, 10)
    assert first_reached(curve, 1.99) == (4, 20)
    assert first_reached(curve, 0.99) is None


def test_without_a_target_each_seed_has_that_of_the_first_algorithm():
    cells = [
        cell("one", "d", 0, validation=(3.0, 2.5)),
        cell("two", "d", 0, validation=(2.5, 9.0)),  # at once
        cell("three", "d", 0, validation=(9.0, 2.5)),
        cell("one", "d", 1, validation=(1.2, 1.0)),
        cell("two", "d", 1, validation=(2.5, 1.0)),  # would do in the other seed
        cell("three", "d", 1, validation=(2.5, 1.1)),
    ]
    found = rows(cells, None)
    assert row(found, "one")["rounds_to_target"]["mean"] == 2
    assert (row(found, "two")["rounds_to_target"]["mean"], row(found, "two")["reached"]) == (1.5, 2)
    assert row(found, "two")["bytes_to_target"]["mean"] == 15
    assert (row(found, "three")["rounds_to_target"], row(found, "three")["reached"]) == (None, 1)
    fixed = rows(cells, 2.5)
    assert row(fixed, "three")["rounds_to_target"]["mean"] == 1.5
    assert row(rows(cells, 0.5), "one")["reached"] == 0


def test_differences_are_paired_by_seed_and_what_failed_is_left_out():
    cells = [cell("one", "d", seed, nll=1.0 + seed) for seed in range(3)]
    cells += [cell("one", "d", 3, status="failed"), cell("one", "e", 0, nll=50.0)]
    cells += [cell("two", "d", seed, nll=1.5 + seed) for seed in range(4)]
    cells += [cell("two", "e", 0, status="unfinished")]
    found = rows(cells, None)
    two = row(found, "two")
    assert two["difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 3, "interval": "t"}
    assert two["nll"]["n"] == 4
    assert (row(found, "one")["failed"], row(found, "one")["difference"]) == ({"3": "it broke"}, None)
    assert (row(found, "two", "e")["unfinished"], row(found, "two", "e")["nll"]) == ([0], None)


def test_the_tables_hold_every_row_in_one_line_and_their_cells_stay_apart():
    cells = [cell("a|b", "d", seed, nll=seed) for seed in range(3)] + [cell("c", "d", 0, status="failed")]
    cells[-1]["reason"] = "one\ntwo | three"
    found = rows(cells, None)
    text = sweep_table.markdown("name", found, None)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 2
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(sweep_table.headings("a")) + 1}
    assert "| a\\|b | 3 | 1.000 [-1.484, 3.484] |" in text
    assert lines[-1].endswith("| failed with seed 0: one two \\| three |")
    parsed = list(csv.DictReader(io.StringIO(sweep_table.comma_separated(found))))
    assert [line["algorithm"] for line in parsed] == ["a|b", "c"]
    assert parsed[1]["note"] == "failed with seed 0: one\ntwo | three"
    assert float(parsed[0]["nll_high"]) == found[0]["nll"]["high"]


def test_a_line_is_the_mean_over_seeds_at_the_rounds_that_all_have():
    curves = [
        {"round": [1, 2, 3], "bytes": [10, 20, 30], "validation": [3.0, None, 1.0]},
        {"round": [1, 2, 3], "bytes": [20, 40, 60], "validation": [5.0, 9.0, 2.0]},
    ]
    np.testing.assert_array_equal(
        sweep_plots.over_seeds(curves, "bytes", "validation"), [[15, 4, 3, 5], [45, 1.5, 1, 2]]
    )
    assert sweep_plots.over_seeds([], "round", "validation").shape == (0, 4)


def test_the_curves_have_a_panel_a_skew_and_a_line_an_algorithm():
    algorithms = [f"algorithm {number}" for number in range(10)] + ["$5 & <more>"]
    cells = [cell(name, data, seed) for data in ("even", "skewed") for name in algorithms for seed in (0, 1)]
    cells.append(cell("failed", "even", 0, status="failed"))
    for draw in (sweep_plots.loss_by_round, sweep_plots.loss_by_bytes, sweep_plots.error_by_round):
        texts = ["".join(one.itertext()) for one in ET.fromstring(draw(cells)).iter(f"{SVG}text")]
        assert all(texts.count(name) == 1 for name in (*algorithms, "even", "skewed"))
        assert "failed" not in texts
        assert not any("math" in text for text in texts)  # a log axis labels its ticks for TeX
        assert draw(cells) == draw(cells)


def test_curves_without_an_error_or_without_bytes_are_drawn_all_the_same():
    cells = [
        cell("exact", "d", 0, errors=(0.0, 0.0)),
        cell("personal", "d", 0, errors=(None, None)),
        cell("alone", "d", 0, nbytes=(0, 0)),
    ]
    names = {
        draw: {"".join(one.itertext()) for one in ET.fromstring(draw(cells)).iter(f"{SVG}text")}
        for draw in (sweep_plots.error_by_round, sweep_plots.loss_by_bytes)
    }
    assert "exact" in names[sweep_plots.error_by_round]
    assert "personal" not in names[sweep_plots.error_by_round]
    assert "personal" in names[sweep_plots.loss_by_bytes]
    assert "alone" not in names[sweep_plots.loss_by_bytes]
    nothing = [cell("one", "d", 0, status="unfinished")]
    assert ET.fromstring(sweep_plots.loss_by_round(nothing)).tag == f"{SVG}svg"
