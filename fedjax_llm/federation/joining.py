"""The end of a round on several hosts: each holds what came of its own clients, and then all hold the same.

A sum is added up in the order of the hosts, so that what travels does not grow with the cohort; a stack is put together
in the order of the cohort. What clients keep travels for those who took part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm import trees
from fedjax_llm.federation import release
from fedjax_llm.federation.effective import Ideal
from fedjax_llm.federation.hosts import Hosts
from fedjax_llm.federation.plan import ClientReport, RoundPlan
from fedjax_llm.types import PyTree, RoundState, Stack, Sum, View


class Part(NamedTuple):
    """What came of some clients of a cohort.

    Attributes:
      members: their places among all clients, in the order of the cohort.
      view: the server's; ``None`` where no client took part.
      ideal: for the error of averaging, where it is measured.
      adapters: of all sites [N, ...] in the setting local; else the server's, as they were.
      client_state: of all clients [N, ...], with what these keep.
      below_clip: see ``release.Updates``.
      reports: of these clients.
      padded_tokens: that they trained on.
    """

    members: np.ndarray
    view: View | None
    ideal: Ideal | None
    adapters: PyTree
    client_state: dict[str, PyTree]
    below_clip: Array
    reports: list[ClientReport]
    padded_tokens: int


def joined(hosts: Hosts, plan: RoundPlan, state: RoundState, cohort: np.ndarray, part: Part) -> Part:
    """What came of the whole cohort, the same on every host; ``part`` itself where there is one host.

    Args:
      hosts: all of which must call this.
      plan: of the rounds.
      state: that the round began with.
      cohort: all its members' places.
      part: of this host.
    """
    if hosts.count == 1:
        return part
    return assembled(plan, state, cohort, part, hosts.gather(told(plan, part)))


def assembled(
    plan: RoundPlan, state: RoundState, cohort: np.ndarray, part: Part, found: Sequence[Mapping[str, Any]]
) -> Part:
    """What came of a cohort from what some told of it, each of its own clients.

    Args:
      plan: of the rounds.
      state: that the round began with.
      cohort: all its members' places.
      part: of this host.
      found: from :func:`told` of every host, in the order in which sums are added up.
    """
    kept = _kept_by(plan, part)
    members = np.concatenate([one["members"] for one in found]).astype(int)
    place = {int(member): position for position, member in enumerate(cohort)}
    order = np.argsort([place[int(member)] for member in members])
    whole = _kept(kept, members, [one["kept"] for one in found])
    reports = [ClientReport(**report) for one in found for report in one["reports"]]
    return Part(
        members=members[order],
        view=_view(plan, state, [one["view"] for one in found], order),
        ideal=_ideal(part.ideal, [one["ideal"] for one in found]),
        adapters=whole.pop("adapters", part.adapters),
        client_state=whole,
        below_clip=jnp.float32(sum(np.float32(one["below_clip"]) for one in found)),
        reports=[reports[i] for i in order],
        padded_tokens=sum(one["padded_tokens"] for one in found),
    )


def told(plan: RoundPlan, part: Part) -> dict[str, Any]:
    """What a host tells the others of its clients: values that ``Hosts.gather`` takes."""
    index = jnp.asarray(part.members, jnp.int32)
    kept = _kept_by(plan, part)
    return {
        "members": np.asarray(part.members, np.int64),
        "view": None if part.view is None else jax.tree.leaves(part.view),
        "ideal": None if part.ideal is None else [part.ideal.total, part.ideal.weight],
        "kept": {name: jax.tree.leaves(trees.take(tree, index)) for name, tree in kept.items()},
        "below_clip": float(part.below_clip),
        "reports": [asdict(report) for report in part.reports],
        "padded_tokens": part.padded_tokens,
    }


def _kept_by(plan: RoundPlan, part: Part) -> dict[str, PyTree]:
    """What all clients keep [N, ...], with the adapters where those are their own."""
    own = {"adapters": part.adapters} if plan.setting == "local" else {}
    return part.client_state | own


def _view(plan: RoundPlan, state: RoundState, told: list[list[np.ndarray] | None], order: np.ndarray) -> View | None:
    """The view of the whole cohort from the leaves of the hosts' views."""
    views = [leaves for leaves in told if leaves is not None]
    if not views:
        return None
    message = release.message_like(plan, state)
    if plan.aggregation.view is Sum:
        total = [reduce(jnp.add, map(jnp.asarray, same)) for same in zip(*views, strict=True)]
        return jax.tree.structure(Sum(message, jnp.float32(0))).unflatten(total)
    stacked = [jnp.asarray(np.concatenate(same)[order]) for same in zip(*views, strict=True)]
    return jax.tree.structure(Stack(message, jnp.float32(0))).unflatten(stacked)


def _ideal(own: Ideal | None, told: list[Any]) -> Ideal | None:
    """The sums of all hosts."""
    if own is None:
        return None
    some = [total for total, _ in told if total]
    total = jax.tree.map(lambda *parts: reduce(jnp.add, map(jnp.asarray, parts)), *some) if some else {}
    return Ideal(total, jnp.float32(sum(np.float32(weight) for _, weight in told)))


def _kept(kept: dict[str, PyTree], members: np.ndarray, told: list[dict[str, Any]]) -> dict[str, PyTree]:
    """What clients keep, with the rows [M, ...] of all hosts' members put in."""
    index, whole = jnp.asarray(members, jnp.int32), {}
    for name, tree in kept.items():
        leaves, structure = jax.tree.flatten(tree)
        rows = [np.concatenate(same) for same in zip(*(one[name] for one in told), strict=True)]
        new = structure.unflatten(jnp.asarray(row, leaf.dtype) for row, leaf in zip(rows, leaves, strict=True))
        whole[name] = trees.put(tree, index, new)
    return whole
