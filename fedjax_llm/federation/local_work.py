"""What the clients of a round train on, how fast, and with which weight: on the host."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from fedjax_llm.data.records import unit_name
from fedjax_llm.federation.clients import Client
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.sampling import (
    Cycle,
    attendance,
    round_key,
    sample_steps,
    sample_units,
    secret_round_key,
    unit_group,
)
from fedjax_llm.training.client_update import LocalTraining

Work = Sequence[Sequence[Any]]
"""The batches of a client's local steps: examples, or privacy units."""


def secret(plan: RoundPlan) -> Array:
    """The run's secret key."""
    assert plan.secret_key is not None, "a plan with a mechanism has a secret key"
    return plan.secret_key


def work_of(plan: RoundPlan, place: int, number: int, attempt: int, past: np.ndarray | None) -> Work:
    """The batches of a client's round: Poisson samples of its units under a mechanism that samples them.

    Args:
      plan: of the rounds.
      place: of the client among all.
      number: of the round.
      attempt: at the round.
      past: from :func:`past_rounds`.
    """
    client, local, mechanism = plan.clients[place], plan.local, plan.mechanism
    if mechanism is None or mechanism.sampling is None:
        steps = None if local.local_epochs is not None else local.local_steps
        key = jax.random.fold_in(round_key(plan.key, number, "order"), client.id)
        return sample_steps(key, client.examples, local.batch_size, steps, local.local_epochs)
    key = jax.random.fold_in(secret_round_key(secret(plan), number, attempt, "units"), client.id)
    probability = float(mechanism.sampling[place])
    cycle = None if past is None else _cycle(plan, place, int(past[place]))
    return sample_units(key, client.units, probability, local.local_steps, mechanism.examples_per_unit, cycle)


def at_once(steps: Work) -> Work:
    """All of a round's units as one step."""
    return [[unit for step in steps for unit in step]]


def past_rounds(plan: RoundPlan, number: int) -> np.ndarray | None:
    """In how many earlier rounds each client took part, int [N]; ``None`` where units do not take turns."""
    mechanism = plan.mechanism
    if mechanism is None or mechanism.correlated is None or mechanism.correlated.cyclic == 1:
        return None
    return attendance(plan.key, number - 1, len(plan.clients), plan.cohort).sum(axis=0)


def _cycle(plan: RoundPlan, place: int, past: int) -> Cycle:
    """Whose turn it is at a client that took part in ``past`` rounds before."""
    mechanism, client = plan.mechanism, plan.clients[place]
    assert mechanism is not None
    groups = mechanism.correlated.cyclic
    names = [unit_name(unit[0].record_id, unit[0].owner, mechanism.unit) for unit in client.units]
    member = np.array([unit_group(name, groups, client.id) for name in names])
    return Cycle(past * plan.local.local_steps, groups, member)


def public_denominators(plan: RoundPlan, members: np.ndarray) -> list[float] | None:
    """What the summed gradients of these clients' steps are divided by, where a mechanism fixes that."""
    mechanism = plan.mechanism
    if mechanism is None or mechanism.clipped != "gradients":
        return None
    return [float(mechanism.denominators[i]) for i in members]


def weights(plan: RoundPlan, clients: Sequence[Client], slots: int) -> np.ndarray:
    """f32 [C]: the clients' weights in the sum; zero in empty slots."""
    found, mechanism = np.zeros(slots, np.float32), plan.mechanism
    for c, client in enumerate(clients):
        if mechanism is not None and mechanism.noised in ("sum", "shares"):
            found[c] = 1.0 if mechanism.site_weights is None else mechanism.site_weights(len(client.examples))
        else:
            # What is public of a private site's size is its number of units.
            bounded = mechanism is not None and mechanism.clipped == "gradients"
            held = client.units if bounded else client.examples
            found[c] = len(held) if plan.federation.weighting == "examples" else 1.0
    return found


def learning_rates(local: LocalTraining, work: Sequence[Work], slots: int, number: int, rounds: int) -> np.ndarray:
    """[C, S]: factors of the base learning rate for every client and local step of round ``number``."""
    over_rounds = local.round_schedule.factor(number - 1, rounds)
    rates = np.zeros((slots, max(len(steps) for steps in work)))
    for c, steps in enumerate(work):
        rates[c, : len(steps)] = [over_rounds * local.local_schedule.factor(s, len(steps)) for s in range(len(steps))]
    return rates
