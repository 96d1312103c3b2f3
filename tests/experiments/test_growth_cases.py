"""The cases of ``bench --suite growth`` on a tiny model: the rounds are those that they say."""

import pytest
from tiny import tiny_folder

from experiments.growth_cases import Point, growth_suite, measured, operations, plan_of, points
from fedjax_llm.federation.rounds import run_round
from fedjax_llm.models.loading import load


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("model"))))


def watched(work):
    """Runs it once, as a real one does."""
    work()
    return 123


@pytest.mark.parametrize("point", [Point("clients", 20, 20, 1, 8, 2, 1), Point("rank", 3, 2, 3, 16, 3, 2, 32)])
def test_a_case_counts_the_round_that_was_timed(base, point):
    case = measured(base, point, watched)
    assert case["real_tokens"] == point.clients * point.examples * point.length
    assert case["seconds_per_token"] == pytest.approx(case["seconds"] / case["real_tokens"], abs=1e-3)
    assert (case["peak_rss_bytes"], case["layers"], case["axis"]) == (123, point.layers, point.axis)
    assert case["padded_tokens"] >= case["real_tokens"]


def test_microbatches_keep_their_size_where_a_client_has_more(base):
    for examples in (4, 8, 16):
        plan, state = plan_of(base, Point("examples a client", examples, 1, examples, 8, 2, 2, microbatch=32))
        assert plan.shapes[0].rows * plan.shapes[0].length == 32
        _, report = run_round(plan, base.params, state)
        assert report.padded_tokens == report.tokens == 8 * examples


def test_every_axis_grows_and_changes_nothing_else():
    found = points(30)
    axes = list(dict.fromkeys(point.axis for point in found))
    assert axes == ["clients", "examples a client", "tokens an example", "rank", "layers"]
    for axis in axes:
        own = [point for point in found if point.axis == axis]
        assert [point.value for point in own] == sorted({point.value for point in own})
        fields = [(point.clients, point.examples, point.length, point.rank, point.layers) for point in own]
        varying = [column for column in zip(*fields, strict=True) if len(set(column)) > 1]
        assert varying == [tuple(point.value for point in own)]
    assert max(point.clients for point in found) == 1000


def test_work_is_that_of_layers_adapters_and_output_layer(base):
    config, point = base.model.config, Point("rank", 3, rank=3, layers=2)
    width, keys = config.width, config.kv_heads * config.head_dim
    layer = 2 * width * width + 2 * width * keys + 3 * width * config.mlp_width
    adapters = 3 * 2 * (2 * width + width + keys)
    assert operations(base, point, 10) == 10 * (4 * (2 * layer + width * config.vocab_size) + 6 * adapters)


def test_the_suite_draws_what_it_measured(base, monkeypatch, tmp_path):
    few = [Point("rank", rank, rank=rank) for rank in (1, 2)]
    case = {"axis": "rank", "seconds": 1.0, "work": 1e9, "peak_rss_bytes": 10**9}
    monkeypatch.setattr("experiments.growth_cases.points", lambda depth: few)
    monkeypatch.setattr("experiments.growth_cases.measured", lambda base, point, peak: case | {"value": point.value})
    found = list(growth_suite(base, watched, tmp_path / "growth"))
    assert [case["value"] for case in found] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"growth.svg", "growth.png"}
