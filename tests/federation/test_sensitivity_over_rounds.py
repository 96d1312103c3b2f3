"""What one unit can do to releases that belong together: correlated noise over rounds, and an adaptive clip norm.

Every gradient is known (``mutants.Linear``), and always the same, so that what a unit does in one round does not cancel
what it does in another.
"""

from dataclasses import replace
from functools import cache
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import (
    CLIP,
    DOWN,
    MODEST,
    ODD,
    UP,
    ZERO,
    example,
    gradients,
    joined,
    moves,
    plan_of,
    silent,
    sites_of,
    wrong,
)
from toy_private import SHOW, length

from fedjax_llm.data.records import EncodedExample
from fedjax_llm.experiment.protection import _separation
from fedjax_llm.federation import local_work, release, rounds
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.sampling import attendance
from fedjax_llm.privacy.correlated import BandedToeplitz, BufferedToeplitz
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.mechanism import AdaptiveClip
from fedjax_llm.types import Sum

ROUNDING = 1e-5
BANDS, ROUNDS = 3, 7  # two whole turns of the groups, and a part of one
CROWD = sites_of(a=[UP] * 4 + [MODEST], b=[ODD])
SITES, COHORTS = ("a", "b", "c"), 9  # with this seed b is in rounds 2, 4 and 7, and nobody in two that follow
BEYOND = 5  # a row of the table whose update is not finite


def declared(plan: RoundPlan) -> float:
    """What the noise before it is mixed was made for: its standard deviation over the charged noise multiplier."""
    (multiplier,) = {event.noise_multiplier for event in plan.mechanism.events.values()}
    return float(plan.mechanism.stddev[0]) * CLIP / multiplier


def weight(plan: RoundPlan, contributions: np.ndarray) -> float:
    """|C u| of contributions u [T, ...] to the sums of all steps."""
    column = plan.mechanism.correlated.coefficients
    lags = np.subtract.outer(np.arange(ROUNDS), np.arange(ROUNDS))
    return float(np.linalg.norm(np.tensordot(np.where(lags >= 0, column[lags], 0.0), contributions, 1)))


class Groups(NamedTuple):
    """A plan with amplified banded noise, its rounds without noise, and what its sums are divided by."""

    plan: RoundPlan
    alone: np.ndarray
    divisor: float

    def added(self, newcomer: EncodedExample) -> np.ndarray:
        """What one unit more at the first site adds to the sums of all rounds, [T, leaves, N]."""
        more = (moves(joined(silent(self.plan), [newcomer]), ROUNDS) - self.alone) * self.divisor
        return more[:, 0] if self.plan.setting == "local" else more


@cache
def in_groups(place: str, certain: bool = False) -> Groups:
    """With noise at the sites or at the server; ``certain``: a unit takes part whenever it is its group's turn."""
    config = {"sites": DpSgd, "server": DpFedSgd}[place](CLIP, 0.9, noise=BandedToeplitz(BANDS))
    setting = {"sites": "local", "server": "federated"}[place]
    plan = plan_of(config, CROWD, setting=setting, number=ROUNDS, batch_size=1)
    if certain:
        plan = plan._replace(mechanism=plan.mechanism._replace(sampling=np.ones(2)))
    divisor = plan.mechanism.denominators[0] if place == "sites" else plan.mechanism.weight
    return Groups(plan, moves(silent(plan), ROUNDS), float(divisor))


@pytest.mark.parametrize("gradient", [UP, DOWN, ODD, MODEST])
@pytest.mark.parametrize("place", ["sites", "server"])
def test_over_a_turn_of_the_groups_a_unit_weighs_at_most_the_declared_sensitivity(place, gradient):
    groups = in_groups(place)
    added, bound = groups.added(example(f"new-{gradient}", gradient)), declared(groups.plan)
    for first in range(ROUNDS - BANDS + 1):
        turn = np.zeros_like(added)
        turn[first : first + BANDS] = added[first : first + BANDS]
        assert weight(groups.plan, turn) <= bound * (1 + ROUNDING)
    # The events charge a release for every turn that is begun.
    assert weight(groups.plan, added) <= bound * np.sqrt(-(-ROUNDS // BANDS)) * (1 + ROUNDING)


def test_a_unit_of_a_group_reaches_the_bound_and_one_without_a_group_exceeds_it():
    def heaviest(groups: Groups) -> float:
        """Over the first turn of the groups, by units of several of them."""
        turns = [groups.added(example(f"new-{name}", UP)) for name in range(4)]
        return max(weight(groups.plan, np.concatenate([turn[:BANDS], 0 * turn[BANDS:]])) for turn in turns)

    groups = in_groups("server", certain=True)
    assert heaviest(groups) == pytest.approx(declared(groups.plan), rel=ROUNDING)
    with wrong(local_work, "_cycle", lambda plan, place, number: None):
        ungrouped = groups._replace(alone=moves(silent(groups.plan), ROUNDS))
        assert heaviest(ungrouped) > 1.3 * declared(groups.plan)


def in_turn(config: Any, unit: str, claimed: tuple[int, int] | None = None) -> RoundPlan:
    """One site a round; the mechanism knows the participations of that schedule, or others."""
    present = attendance(jax.random.key(COHORTS), ROUNDS, len(SITES), 1)
    schedule = int(present.sum(0).max()), min(_separation(column, ROUNDS) for column in present.T)
    assert schedule == (3, 2)
    sites = sites_of(**{name: [UP] for name in SITES})
    return plan_of(config, sites, unit=unit, seed=COHORTS, number=ROUNDS, cohort=1, turns=claimed or schedule)


def heaviest_site(plan: RoundPlan) -> float:
    """The largest |C u| of a site's unit over all rounds: what changes if its data has no gradient."""
    plan, found = silent(plan), []
    whole = moves(plan, ROUNDS)
    for place, client in enumerate(plan.clients):
        empty = (replace(client.examples[0], tokens=np.array([ZERO, 1], np.int32)),)
        clients = [
            replace(other, examples=empty, units=(empty,)) if c == place else other
            for c, other in enumerate(plan.clients)
        ]
        found.append(
            weight(plan, (whole - moves(plan._replace(clients=tuple(clients)), ROUNDS)) * plan.mechanism.weight)
        )
    return max(found)


@pytest.mark.parametrize("noise", [BandedToeplitz(2, amplified=False), BufferedToeplitz(1)], ids=["banded", "buffered"])
@pytest.mark.parametrize(("mechanism", "unit"), [(DpFedSgd, "record"), (DpFedAvg, "site")])
def test_over_the_rounds_of_its_cohorts_a_unit_weighs_at_most_the_declared_sensitivity(noise, mechanism, unit):
    plan = in_turn(mechanism(CLIP, 0.9, noise=noise), unit)
    assert 0.8 * declared(plan) < heaviest_site(plan) <= declared(plan) * (1 + ROUNDING)


def test_a_site_that_takes_part_more_often_than_declared_exceeds_the_bound():
    plan = in_turn(DpFedAvg(CLIP, 0.9, noise=BandedToeplitz(2, amplified=False)), "site", claimed=(1, ROUNDS))
    assert heaviest_site(plan) > 1.5 * declared(plan)


def adaptive_plan(others: tuple[int, ...], cap: int | None, noise_multiplier: float) -> RoundPlan:
    """Sites with these kinds of gradient, all in every round."""
    adaptive = AdaptiveClip(0.6, 0.3, count_noise=0.05 * len(others))
    config = DpFedAvg(CLIP, noise_multiplier, adaptive=adaptive, examples_cap=cap)
    sites = sites_of(**{f"site-{i}": [kind] for i, kind in enumerate(others)})
    weighting = "uniform" if cap is None else "examples"
    return plan_of(config, sites, unit="site", aggregation=SHOW[Sum], weighting=weighting)


def released(plan: RoundPlan, norm: float = 1.0) -> tuple[Any, float]:
    """The sum of updates at a clip norm of ``norm`` times the first, and the count, blurred alike in all calls."""
    plan, adaptive = silent(plan), plan.mechanism.adaptive
    table = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.full_like(leaf[:1], inf)]), gradients())
    state = rounds.initial_state(plan, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), table))
    state = replace(state, privacy_state={"clip_norm": jnp.float32(norm * CLIP)})
    state, _ = rounds.run_round(plan, table, state)
    growth = np.log(float(state.privacy_state["clip_norm"]) / (norm * CLIP))
    return state.server_state.total, -growth / adaptive.learning_rate * plan.cohort


@pytest.mark.parametrize("newcomer", [UP, ODD, MODEST, ZERO, BEYOND])
@pytest.mark.parametrize(
    ("others", "cap", "examples", "norm"),
    [((UP, MODEST), None, 1, 1.0), ((UP, MODEST, BEYOND), 2, 1, 1.0), ((UP,), 2, 3, 3.0), ((ODD, UP), None, 2, 0.5)],
)
def test_a_site_moves_the_count_by_a_half_and_both_releases_by_what_is_charged(newcomer, others, cap, examples, norm):
    multiplier = 0.09 * len(others)
    plan = adaptive_plan(others, cap, multiplier)
    larger = joined(plan, [example(f"new-{i}", newcomer) for i in range(examples)])
    (here, count), (there, changed) = released(plan, norm), released(larger, norm)
    assert abs(changed - count) == pytest.approx(0.5, abs=1e-3)
    moved = length(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, here, there)) / (norm * CLIP)
    assert moved <= 1 + ROUNDING
    # Over their noise, as one release.
    together = np.hypot(moved / plan.mechanism.stddev[0], 0.5 / plan.mechanism.adaptive.count_noise)
    assert together <= (1 + ROUNDING) / multiplier


def test_a_count_that_is_not_centred_is_found():
    """Then a site that is not clipped moves it by one, and both releases by more than is charged."""
    right = release._updates

    def uncentred(*arguments):
        *_, weights, _ = arguments
        found = right(*arguments)
        return found._replace(below_clip=found.below_clip + jnp.sum(weights > 0) / 2)

    plan = adaptive_plan((UP, UP), None, 0.18)
    larger = joined(plan, [example("new", MODEST)])
    assert released(larger)[1] - released(plan)[1] == pytest.approx(0.5, abs=1e-3)
    with wrong(release, "_updates", uncentred):
        assert released(larger)[1] - released(plan)[1] == pytest.approx(1.0, abs=1e-3)
