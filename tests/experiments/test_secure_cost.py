"""The cases of ``bench --suite secure`` on a small vector: what they hold, and that they add up."""

from pathlib import Path

import pytest

from experiments import secure_cost
from fedjax_llm.secure import simulation
from fedjax_llm.secure.sec_agg import SecAgg


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few numbers, so that only the protocol takes time."""
    monkeypatch.setattr(secure_cost, "VALUES", 50)
    monkeypatch.setattr(secure_cost, "CLIENTS", 5)


def test_a_round_is_within_the_error_bound_and_counts_its_bytes():
    masking, protocol, traffic = secure_cost.round_cases()
    assert masking["masks_seconds_a_client"] > 0
    assert 0 <= protocol["largest_error"] <= protocol["error_bound"]
    assert traffic["upload_bytes"] > traffic["plain_upload_bytes"] == 200
    assert traffic["expansion"] == pytest.approx(traffic["upload_bytes"] / 200, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"neighbours": 4}], ids=["complete", "sparse"])
def test_the_bytes_of_one_client_are_those_of_a_whole_round(settings: dict[str, int]):
    terms = SecAgg(**settings).make(9)
    found = secure_cost.growth_figures(terms)
    names = [f"site-{c:03d}" for c in range(9)]
    session = secure_cost._opened(terms, names, 52)
    for name in names:
        simulation.submit(session, name, secure_cost.np.zeros(52, "<u4"))
    traffic = simulation.close(session).traffic[names[0]]
    # Not counted there: keys and a signature up; survivors and signatures down.
    assert found["upload_bytes"] < traffic[1] < found["upload_bytes"] + 600
    assert found["download_bytes"] < traffic[0] < found["download_bytes"] + 9 * 80 + 200


def test_growth_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cases = [
        {"case": f"growth/{graph}/{count}", **secure_cost.growth_figures(SecAgg(neighbours=neighbours).make(count))}
        for count in (7, 9)
        for graph, neighbours in (("SecAgg", None), ("SecAgg+", 4))
    ]
    secure_cost.plot_growth(cases, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
