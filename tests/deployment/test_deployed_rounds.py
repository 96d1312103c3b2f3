"""Rounds over sites that share nothing but messages give the bits of the simulation."""

from pathlib import Path

import numpy as np
import pytest
from small_job import adapters, deployed, lines, private_job, same_bits, simulated, write_job

pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run over sites."""
    folder = tmp_path_factory.mktemp("private")
    deployed(folder, private_job(folder))
    return folder


CHANGES = {
    "fedavg": {},
    "fedadam": {"module": "fedadam", "algorithm": "FedAdam"},
    "a trunk below": {"lora": "Lora(rank=2, alpha=4.0, layers=(-1,))"},  # its states depend on shapes too
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_run_over_sites_gives_the_bits_of_the_simulation_of_one_client_at_a_time(change, tmp_path):
    job = write_job(tmp_path, **change)
    summary, simulation = deployed(tmp_path, job), simulated(tmp_path, job)
    assert same_bits(adapters(tmp_path / "run"), adapters(tmp_path / "simulation"))
    assert summary["final"] == simulation["final"]
    assert summary["base"] == simulation["base"]
    assert lines(tmp_path / "run") == lines(tmp_path / "simulation")


def test_so_does_a_private_one_and_its_ledger_says_the_same(private, tmp_path):
    simulation = simulated(tmp_path, private_job(tmp_path))
    assert same_bits(adapters(private / "run"), adapters(tmp_path / "simulation"))
    assert lines(private / "run") == lines(tmp_path / "simulation")
    assert lines(private / "run")[-1]["epsilon"]["max"] > 0
    assert simulation["privacy"] is not None


def test_the_simulation_of_all_clients_at_once_differs_by_the_rounding_of_sums_alone(private, tmp_path):
    simulated(tmp_path, private_job(tmp_path, chunk=4))
    one, other = adapters(private / "run"), adapters(tmp_path / "simulation")
    assert one.keys() == other.keys()
    for name, found in one.items():
        np.testing.assert_allclose(other[name], found, atol=1e-5)


def test_an_algorithm_that_sees_every_message_gets_them_in_the_order_of_the_cohort(tmp_path):
    job = write_job(tmp_path, module="geometric_median", algorithm="GeometricMedian")
    deployed(tmp_path, job)
    simulated(tmp_path, job)
    assert same_bits(adapters(tmp_path / "run"), adapters(tmp_path / "simulation"))


def test_under_secure_aggregation_the_sum_is_that_of_the_simulation(tmp_path):
    job = write_job(tmp_path, secure="SecAgg()")
    deployed(tmp_path, job)
    simulated(tmp_path, job)
    assert same_bits(adapters(tmp_path / "run"), adapters(tmp_path / "simulation"))
    assert all(line["secure"]["survivors"] == 3 for line in lines(tmp_path / "run"))
