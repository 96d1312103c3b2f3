"""The comparison of distributed noise with the central Gaussian, on a small sum."""

import json
import sys

import pytest

from experiments import mean_estimation
from experiments.mean_estimation import MeanEstimation, cases


def test_the_error_is_that_of_a_gaussian_with_enough_bits_and_more_with_few():
    asked = MeanEstimation(clients=20, values=200, epsilons=(4.0,), bits=(8, 16), repeats=10)
    found = {(case.kind, case.bits): case.figures() for case in cases(asked)}
    assert {bits for _, bits in found} <= {8, 16}
    for kind in ("skellam", "discrete gaussian"):
        fine = found[kind, 16]
        # 2,000 squares of normals: six standard deviations of their mean; and what powers of two and 256 places cost.
        assert abs(fine["ratio"] - 1) < 6 * (2 / 2000) ** 0.5 + 0.02
        if (kind, 8) in found:
            assert found[kind, 8]["ratio"] > fine["high"]


def test_the_command_prints_one_object_a_case(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    plot = tmp_path / "ratio.png"
    options = [
        "--clients",
        "5",
        "--values",
        "16",
        "--epsilons",
        "4",
        "--bits",
        "16",
        "--repeats",
        "2",
        "--json",
        "--plot",
    ]
    monkeypatch.setattr(sys, "argv", ["mean_estimation", *options, str(plot)])
    assert mean_estimation.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["discrete gaussian/epsilon 4/16 bits", "skellam/epsilon 4/16 bits"]
    assert all(line["low"] <= line["ratio"] <= line["high"] for line in lines)
    assert plot.stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["mean_estimation", "--bits", "4"])
    assert mean_estimation.main() != 0
