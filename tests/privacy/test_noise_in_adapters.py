"""The noise that reaches the adapters through whole rounds: what the events claim, normal, and drawn only once.

Each check refuses right code with probability 1e-6 at most (``mutants.ALPHA``); the seeds are fixed.
"""

from typing import Any

import numpy as np
import pytest
from mutants import CLIP, MODEST, ODD, UP, UPLOADS, claimed_noise, noise_of, noise_problems, plan_of, sites_of

from fedjax_llm.federation.cohorts import cohort_of
from fedjax_llm.privacy.correlated import BandedToeplitz, BufferedToeplitz
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.local_dp import LocalDp

ROUNDS, SHAPE = 3, (4, 2400)
SITES = sites_of(a=[UP, ODD, MODEST], b=[ODD], c=[MODEST, UP], d=[UP] * 5)
"""They make two chunks of clients, the second with empty slots."""


def whitened(drawn: np.ndarray, coefficients: np.ndarray, steps: int) -> np.ndarray:
    """The independent normals that correlated noise [rounds, ...] of ``steps`` a round was made of, by plain NumPy."""
    total = len(drawn) * steps
    lags = np.subtract.outer(np.arange(total), np.arange(total))
    inverse = np.linalg.inv(np.where(lags >= 0, coefficients[np.abs(lags)], 0.0))
    per_round = inverse.reshape(len(drawn), steps, total).sum(1)
    return np.tensordot(np.linalg.inv(np.linalg.cholesky(per_round @ per_round.T)), drawn, 1)


def test_dp_sgd_calibrated_for_every_site():
    plan = plan_of(DpSgd(CLIP), SITES, setting="local", steps=2, rate=0.3, batch_size=2, epsilon=3.0)
    expected = claimed_noise(plan, 0.3)
    assert len(set(plan.mechanism.stddev)) == 3  # b and c sample all that they have
    drawn = noise_of(plan, ROUNDS)
    assert drawn.shape == (ROUNDS, 4, *SHAPE)
    assert noise_problems(drawn, expected[:, None, None]) == set()


def test_dp_sgd_from_step_to_step():
    """What the first of two steps adds is what a round of one step adds, since both draw with the same key."""
    one, two = (plan_of(DpSgd(CLIP, 1.5), SITES, setting="local", steps=steps) for steps in (1, 2))
    first, both = noise_of(one), noise_of(two)
    assert noise_problems(np.concatenate([first, both - first]), claimed_noise(one)[:, None, None]) == set()


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_dp_sgd_in_the_mean_over_sites(weighting: str):
    plan = plan_of(DpSgd(CLIP, 1.5), SITES, steps=2, weighting=weighting)
    weights = np.array([3, 1, 2, 5]) if weighting == "examples" else np.ones(4)
    drawn = noise_of(plan, ROUNDS)
    assert drawn.shape == (ROUNDS, *SHAPE)
    assert noise_problems(drawn, np.linalg.norm(claimed_noise(plan) * weights / weights.sum())) == set()


def test_dp_fedsgd():
    plan = plan_of(DpFedSgd(CLIP, 0.8), SITES, batch_size=2)
    assert noise_problems(noise_of(plan, ROUNDS), claimed_noise(plan)) == set()


@pytest.mark.parametrize("config", [DpFedAvg(CLIP, 0.8), DpFedAvg(CLIP, 0.8, scope="layers")])
def test_dp_fedavg(config: DpFedAvg):
    plan = plan_of(config, SITES, unit="site", cohort=2, steps=3)
    assert noise_problems(noise_of(plan, ROUNDS), claimed_noise(plan)) == set()


def test_local_dp_at_every_site():
    plan = plan_of(LocalDp(CLIP, 0.8), SITES, unit="site", aggregation=UPLOADS, steps=2)
    np.testing.assert_allclose(claimed_noise(plan), 0.8 * CLIP)
    drawn = noise_of(plan, ROUNDS)
    assert drawn.shape == (ROUNDS, 4, *SHAPE)
    assert noise_problems(drawn, claimed_noise(plan)[:, None, None]) == set()


def test_local_dp_in_the_mean_over_sites():
    plan = plan_of(LocalDp(CLIP, 0.8), SITES, unit="site")
    assert noise_problems(noise_of(plan, ROUNDS), 0.8 * CLIP / 2) == set()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (DpSgd(CLIP, 1.5), {"setting": "local"}),
        (DpFedSgd(CLIP, 0.8), {}),
        (LocalDp(CLIP, 0.8), {"unit": "site", "aggregation": UPLOADS}),
    ],
    ids=["steps", "sum", "deltas"],
)
def test_another_attempt_at_a_round_and_another_run_draw_other_noise(config: Any, options: dict):
    plan = plan_of(config, SITES, **options)
    other_run = plan._replace(secret_key=plan_of(DpFedSgd(CLIP, 0.8), SITES, seed=1).secret_key)
    drawn = np.concatenate([noise_of(plan), noise_of(plan, attempt=1), noise_of(other_run)])
    stddev = claimed_noise(plan)
    assert noise_problems(drawn, stddev[:, None, None] if stddev.ndim else stddev) == set()


def test_a_step_of_nobody_and_a_round_of_nobody_get_the_same_noise():
    steps = plan_of(DpSgd(CLIP, 1.5, sampling_probability=0.01), SITES, setting="local", steps=2)
    nobody = plan_of(DpFedAvg(CLIP, 0.8), SITES, unit="site", cohort=1)
    empty = next(number for number in range(1, 20) if not len(cohort_of(nobody, number)))
    assert noise_problems(noise_of(steps, 2), claimed_noise(steps)[:, None, None]) == set()
    drawn = noise_of(nobody, empty)
    assert drawn[-1].any()
    assert noise_problems(drawn, claimed_noise(nobody)) == set()


def test_correlated_noise_at_the_sites_over_steps_and_rounds():
    plan = plan_of(DpSgd(CLIP, 1.5, noise=BandedToeplitz(3)), SITES, setting="local", steps=2, rate=0.3)
    column = plan.mechanism.correlated.coefficients
    # All of a group takes part when it is its turn, which it is in every third step; one participation is charged.
    stddev = 1.5 * np.linalg.norm(column) * CLIP * 0.3 / (np.array([3, 1, 2, 5]) / 3)
    drawn = noise_of(plan, 4)
    assert noise_problems(whitened(drawn, column, 2), stddev[:, None, None]) == set()
    assert "dependence" in noise_problems(drawn, 1.0)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (DpFedSgd(CLIP, 0.8, noise=BandedToeplitz(3)), {}),
        (DpFedAvg(CLIP, 0.8, noise=BufferedToeplitz()), {"unit": "site", "cohort": 1, "turns": (2, 3)}),
    ],
    ids=["banded on sums of gradients", "buffered on sums of updates"],
)
def test_correlated_noise_at_the_server_over_rounds(config: Any, options: dict):
    plan = plan_of(config, SITES, number=6, **options)
    stddev = 0.8 * plan.mechanism.correlated.sensitivity * CLIP / plan.mechanism.weight
    drawn = noise_of(plan, 6)
    assert noise_problems(whitened(drawn, plan.mechanism.correlated.coefficients, 1), stddev) == set()
    assert "dependence" in noise_problems(drawn, stddev)
