"""The picture of growth: a column a thing that grows, and what is flat looks flat."""

import numpy as np
import pytest

from fedjax_llm.runs.growth_figures import growth_figure, write_growth


def case(axis, value, seconds, peak):
    return {"axis": axis, "value": value, "seconds": seconds, "work": 3e9 * value, "peak_rss_bytes": peak}


CASES = [case("clients", n, 0.5 * n, 2_000_000_000) for n in (100, 1, 10)] + [
    case("rank", n, 1 + 0.1 * n, peak) for n, peak in ((4, 3e9), (64, None))
]


def test_a_column_for_each_thing_that_grows_with_its_points_in_order():
    figure = growth_figure(CASES)
    panels = np.array(figure.axes).reshape(2, 2)
    assert [panel.get_xlabel() for panel in panels[1]] == ["clients", "rank"]
    measured, proportional = panels[0, 0].lines
    np.testing.assert_array_equal(measured.get_xydata(), [[1, 0.5], [10, 5], [100, 50]])
    np.testing.assert_allclose(proportional.get_ydata(), [0.5, 5, 50])  # the work of these is in proportion
    assert panels[0, 1].lines[1].get_ydata()[0] < panels[0, 1].lines[0].get_ydata()[0]  # and of those it is not


def test_memory_starts_at_zero_and_leaves_out_what_is_not_known():
    figure = growth_figure(CASES)
    flat, short = np.array(figure.axes).reshape(2, 2)[1]
    np.testing.assert_array_equal(flat.lines[0].get_ydata(), [2, 2, 2])
    assert (flat.get_ylim()[0], len(short.lines[0].get_xdata())) == (0, 1)


@pytest.mark.parametrize("name", ["growth", "growth.svg"])
def test_both_files_are_written_and_the_same_each_time(tmp_path, name):
    write_growth(CASES, tmp_path / name)
    first = (tmp_path / "growth.svg").read_text()
    assert "clients" in first
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    write_growth(CASES, tmp_path / name)
    assert (tmp_path / "growth.svg").read_text() == first
