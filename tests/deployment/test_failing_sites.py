"""What becomes of a run when sites are killed, slow, wrong, or have spent their budget."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_job import (
    Disturbed,
    adapters,
    deployed,
    events,
    lines,
    private_job,
    quiet,
    same_bits,
    worker,
    workers,
    write_job,
)
from tiny import tiny_base

from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.messages import FAILED, Said
from fedjax_llm.deployment.site import Budget
from fedjax_llm.deployment.worker import Worker
from fedjax_llm.errors import UserError

pytestmark = pytest.mark.usefixtures("short_reports")
BUDGET = Budget(20.0, 1e-3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run of which nothing is amiss."""
    folder = tmp_path_factory.mktemp("undisturbed")
    deployed(folder, private_job(folder))
    return folder / "run"


def test_a_site_killed_in_a_round_comes_back_and_nothing_is_charged_twice(undisturbed, tmp_path):
    job, killed = private_job(tmp_path), []

    def hand(name: str, request: Said, reach) -> Said:
        if name == "hill" and request.word == "train" and request.values["round"] == 2 and not killed:
            killed.append(reach())  # it has trained, and dies with its answer
            transport.workers["hill"] = worker(tmp_path, job, "hill", BUDGET)
            return Said(FAILED, {"why": "the site's worker ended while it was asked"})
        return reach()

    transport = Disturbed(workers(tmp_path, job, BUDGET), hand)
    deployed(tmp_path, job, transport)
    assert killed
    assert (2, "hill", "failed", "the site's worker ended while it was asked") in events(tmp_path / "run")
    assert same_bits(adapters(tmp_path / "run"), adapters(undisturbed))
    assert lines(tmp_path / "run") == lines(undisturbed)
    assert transport.workers["hill"]._budget().standing().releases == 2


def test_a_slow_site_is_left_out_after_the_deadline(tmp_path):
    job = private_job(tmp_path)

    def hand(name: str, request: Said, reach) -> Said | None:
        late = name == "town" and request.word == "train" and request.values["round"] == 1
        return None if late else reach()

    deployed(tmp_path, job, Disturbed(workers(tmp_path, job), hand), Rules(deadline=2.0, at_least=2, pause=0.0))
    first, second = lines(tmp_path / "run")
    assert first["cohort"] == ["coast", "hill"]
    assert second["cohort"] == ["coast", "hill", "town"]
    assert [event[:3] for event in events(tmp_path / "run")] == [(1, "town", "late")]
    assert first["epsilon"]["accounts"].keys() == {"coast", "hill", "town"}  # who was asked is charged all the same


def test_or_waited_for_where_the_round_needs_it(undisturbed, tmp_path):
    job, asked = private_job(tmp_path), []

    def hand(name: str, request: Said, reach) -> Said | None:
        if name == "town" and request.word == "train" and request.values["round"] == 1:
            asked.append(name)
            if len(asked) < 4:
                return None
        return reach()

    rules = Rules(deadline=0.02, at_least=3, pause=0.0)
    deployed(tmp_path, job, Disturbed(workers(tmp_path, job), hand), replace(rules, join=None))
    assert len(asked) >= 4
    assert same_bits(adapters(tmp_path / "run"), adapters(undisturbed))


def wrong_settings(folder: Path) -> Worker:
    """A site that agreed to another job."""
    (folder / "other").mkdir()
    return worker(folder, private_job(folder / "other", rounds=3), "hill")


def wrong_model(folder: Path) -> Worker:
    """A site whose model is not the server's."""
    found = worker(folder, folder / "job.py", "hill")
    return Worker(found.site, lambda *_: replace(tiny_base(), fingerprint="1" * 64), quiet())


@pytest.mark.parametrize(("wrong", "word"), [(wrong_settings, "other settings"), (wrong_model, "other weights")])
def test_a_site_that_means_something_else_is_refused_with_the_reason_and_others_go_on(wrong, word, tmp_path):
    job = private_job(tmp_path)
    sites = workers(tmp_path, job) | {"hill": wrong(tmp_path)}
    summary = deployed(tmp_path, job, Disturbed(sites, lambda name, request, reach: reach()))
    assert summary["sites"].keys() == {"coast", "town"}
    ((number, site, what, why),) = events(tmp_path / "run")
    assert (number, site, what) == (0, "hill", "refused")
    assert word in why


def test_with_too_few_sites_nothing_is_begun(tmp_path):
    job = private_job(tmp_path)
    with pytest.raises(UserError, match="2 of 3 sites have joined, and the job needs 3"):
        deployed(tmp_path, job, Disturbed(workers(tmp_path, job), _without("hill")), Rules(at_least=3, join=0.05))
    assert not (tmp_path / "run").exists()


def _without(site: str):
    return lambda name, request, reach: None if name == site else reach()


def _changed(change):
    """The hand that changes what the site hill says of its first round."""

    def hand(name: str, request: Said, reach) -> Said:
        said = reach()
        return change(said) if (name, said.word, request.values.get("round")) == ("hill", "trained", 1) else said

    return hand


def with_array(said: Said, change) -> Said:
    return replace(said, arrays=[change(np.array(said.arrays[0])), *said.arrays[1:]])


def poisoned(array: np.ndarray) -> np.ndarray:
    array.flat[0] = np.nan
    return array


WRONG = {
    "shape": (lambda said: with_array(said, lambda array: array[:-1]), "has the shape"),
    "dtype": (lambda said: with_array(said, lambda array: array.astype(np.float64)), "is of float64"),
    "not finite": (lambda said: with_array(said, poisoned), "not finite"),
    "too few": (lambda said: replace(said, arrays=said.arrays[1:]), "were expected"),
    "weight": (lambda said: replace(said, arrays=[*said.arrays[:-1], np.float32(50.0)]), "has the weight 50"),
    "another's": (lambda said: replace(said, values=said.values | {"members": np.array([0])}), "another site"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_update_that_is_not_one_is_refused_and_named(kind, tmp_path):
    change, words = WRONG[kind]
    job = private_job(tmp_path, rounds=1)
    deployed(tmp_path, job, Disturbed(workers(tmp_path, job), _changed(change)))
    ((number, site, what, why),) = events(tmp_path / "run")
    assert (number, site, what) == (1, "hill", "refused")
    assert words in why
    assert lines(tmp_path / "run")[0]["cohort"] == ["coast", "town"]
    assert all(np.isfinite(array).all() for array in adapters(tmp_path / "run").values())


def test_a_site_whose_own_budget_is_spent_takes_no_part_and_others_go_on(tmp_path):
    job = private_job(tmp_path)
    sites = workers(tmp_path, job, BUDGET) | {"hill": worker(tmp_path, job, "hill", Budget(6.0, 1e-3))}
    summary = deployed(tmp_path, job, Disturbed(sites, lambda name, request, reach: reach()))
    assert lines(tmp_path / "run")[0]["cohort"] == ["coast", "hill", "town"]
    assert lines(tmp_path / "run")[1]["cohort"] == ["coast", "town"]
    ((number, site, what, why),) = events(tmp_path / "run")
    assert (number, site, what) == (2, "hill", "refused")
    assert "above its budget of 6" in why
    assert sites["hill"]._budget().standing().spent <= 6.0
    assert summary["privacy"]["epsilon"] > 6.0


def test_a_site_with_a_budget_refuses_a_job_without_privacy(tmp_path):
    job = write_job(tmp_path)
    sites = workers(tmp_path, job) | {"hill": worker(tmp_path, job, "hill", BUDGET)}
    deployed(tmp_path, job, Disturbed(sites, lambda name, request, reach: reach()))
    assert "no differential privacy" in events(tmp_path / "run")[0][3]
    assert lines(tmp_path / "run")[0]["cohort"] == ["coast", "town"]


def test_under_secure_aggregation_the_sum_is_of_those_who_stay(tmp_path):
    job = write_job(tmp_path, secure="SecAgg(threshold=2, survivors=2)", rounds=1)

    def hand(name: str, request: Said, reach) -> Said | None:
        return None if name == "hill" and request.values.get("stage") == 2 else reach()

    deployed(tmp_path, job, Disturbed(workers(tmp_path, job), hand), Rules(deadline=2.0, pause=0.0))
    (line,) = lines(tmp_path / "run")
    assert line["secure"]["dropped"] == ["hill"]
    assert line["cohort"] == ["coast", "town"]
    assert line["update_norm"] > 0


def test_and_with_too_few_of_them_nothing_is_opened(tmp_path):
    job = write_job(tmp_path, secure="SecAgg()", rounds=1)

    def hand(name: str, request: Said, reach) -> Said | None:
        return None if name == "hill" and request.values.get("stage") == 2 else reach()

    deployed(tmp_path, job, Disturbed(workers(tmp_path, job), hand), Rules(deadline=2.0, pause=0.0))
    (line,) = lines(tmp_path / "run")
    assert "are left" in line["secure"]["abandoned"]
    assert line["update_norm"] == 0
