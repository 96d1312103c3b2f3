"""Whole rounds with malicious clients: who is attacked, whatever the layout, and which algorithms bear it."""

from functools import cache

import jax
import numpy as np
import pytest
from toy_rounds import KEY, LAYOUTS, play, toy_model, toy_plan, toy_trainer

from fedjax_llm.adversaries.gaussian import GaussianUpdate
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.aggregation.coordinate_median import CoordinateMedian
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.geometric_median import GeometricMedian
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.aggregation.norm_bound import NormBound
from fedjax_llm.aggregation.trimmed_mean import TrimmedMean
from fedjax_llm.federation.sampling import round_key, sample_cohort
from fedjax_llm.training.client_update import LocalTraining

LOCAL = LocalTraining(batch_size=3, local_steps=2)
NOBODY = (False,) * 5


def malicious(*sites: int) -> tuple[bool, ...]:
    return tuple(site in sites for site in range(5))


def played(algorithm, attack=None, who=NOBODY, cohort: int = 5, layout: str = "together", rounds: int = 1):
    """The server's adapters after rounds of five clients of which some attack."""
    plan = toy_plan(toy_trainer(), LOCAL, cohort=cohort, layout=layout, aggregation=algorithm.make())
    if attack is not None:
        plan = plan._replace(corrupt=attack.make().corrupt, malicious=who)
    return play(plan, rounds)[0].adapters


def distance(one, other) -> float:
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))))


@cache
def honest():
    """The adapters before and after one round of FedAvg without an attack, and the distance between them."""
    before, after = toy_model()[2], played(FedAvg())
    return before, after, distance(before, after)


@pytest.mark.parametrize(
    "algorithm", [CoordinateMedian(), TrimmedMean(0.2), Krum(1), Krum(1, keep=2), GeometricMedian()], ids=str
)
def test_robust_algorithms_bear_one_of_five_and_the_mean_does_not(algorithm):
    before, after, moved = honest()
    attack = (SignFlip(100.0), malicious(3))  # the client with the most examples
    assert distance(played(FedAvg(), *attack), before) > 20 * moved
    found = played(algorithm, *attack)
    assert 0.1 * moved < distance(found, before) < 3 * moved
    assert distance(found, after) < 2 * moved


def test_a_norm_bound_bounds_what_attackers_reach():
    before, _, moved = honest()
    assert distance(played(NormBound(moved), SignFlip(100.0), malicious(3)), before) <= moved * (1 + 1e-5)


def test_attacked_rounds_do_not_depend_on_the_layout():
    attack = (GaussianUpdate(), malicious(0, 3))
    found = [played(TrimmedMean(0.4), *attack, cohort=4, layout=layout, rounds=2) for layout in LAYOUTS]
    assert distance(found[0], toy_model()[2]) > 1e-3
    assert max(distance(one, found[0]) for one in found[1:]) < 1e-5


def test_malicious_clients_outside_the_cohort_harm_nobody():
    inside = sample_cohort(round_key(KEY, 1, "cohort"), 5, 3).tolist()
    outside = set(range(5)) - set(inside)
    peace = played(FedAvg(), cohort=3)
    assert distance(played(FedAvg(), SignFlip(100.0), malicious(*outside), cohort=3), peace) < 1e-6
    assert distance(played(FedAvg(), SignFlip(100.0), malicious(inside[0]), cohort=3), peace) > 1e-2
