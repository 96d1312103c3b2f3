"""Who takes part in a round: by the run's key, or by a secret one under a mechanism that samples clients."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import mesh as meshes
from fedjax_llm.federation.availability import Answers, Availability, among, answers, buffered
from fedjax_llm.federation.local_work import secret
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.sampling import sample_clients, secret_round_key


def cohort_of(plan: RoundPlan, number: int, attempt: int = 0) -> np.ndarray:
    """Whoever may have sent something in a round, int, ascending: its cohort, and those who are late.

    Under a mechanism that samples clients that is a secret, and maybe nobody.
    """
    found = answers_of(plan, number, attempt)
    return np.union1d(found.cohort, found.late).astype(int)


def answers_of(plan: RoundPlan, number: int, attempt: int = 0) -> Answers:
    """Who takes part in a round, and who was selected in vain."""
    mechanism, federation, ids = plan.mechanism, plan.federation, [client.id for client in plan.clients]
    available = federation.availability or Availability()
    if mechanism is not None and mechanism.cohort_probability is not None:
        key = secret_round_key(secret(plan), number, attempt, "cohort")
        selected = sample_clients(key, len(ids), mechanism.cohort_probability)
        return among(plan.key, number, ids, selected, len(ids), available)
    if federation.asynchronous is not None and plan.setting == "federated":
        return buffered(plan.key, number, ids, plan.cohort, federation.asynchronous, available)
    return answers(plan.key, number, ids, plan.cohort, available if plan.setting == "federated" else Availability())


def slots_of(plan: RoundPlan) -> int:
    """Slots of clients that are trained at a time."""
    return meshes.slots(plan.execution.mesh, min(plan.execution.clients_per_chunk, most_of(plan)))


def slots_filled(plan: RoundPlan, members: np.ndarray, slots: int) -> Array:
    """Int [C]: who is in each slot, by the places of the clients. Empty slots point past the end of all clients.

    Reading from there clamps, and writing drops.
    """
    return jnp.asarray(np.concatenate([members, np.full(slots - len(members), len(plan.clients))]))


def most_of(plan: RoundPlan) -> int:
    """The largest cohort that a round may have."""
    sampled = plan.mechanism is not None and plan.mechanism.cohort_probability is not None
    return len(plan.clients) if sampled else plan.cohort
