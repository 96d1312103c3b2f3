"""One client's part in a round, where its records are in one place and the server in another.

A site trains its one client just as a round trains a chunk of one; the server adds up what the sites tell it, in the
order of the cohort. So a round that is played between them gives the bits of a round that trains one client at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.federation import effective, release
from fedjax_llm.federation.availability import Answers
from fedjax_llm.federation.joining import Part, assembled
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import moment_of, run_chunks
from fedjax_llm.types import Params, PyTree, RoundState


class OwnPart(NamedTuple):
    """What came of one client.

    Attributes:
      part: of the round; under secure aggregation its view holds nothing of the client.
      messages: leaves [1, ...], under secure aggregation, where they are to be masked; else ``()``.
      weights: f32 [1], of the message.
      live: which factors travel; ``None``: all.
    """

    part: Part
    messages: PyTree
    weights: Array
    live: dict[str, float] | None


def train_client(plan: RoundPlan, params: Params, state: RoundState, place: int, attempt: int = 0) -> OwnPart:
    """Trains one client for the round after ``state``.

    Args:
      plan: of the rounds.
      params: the frozen weights.
      state: after the round before, as far as clients are sent it.
      place: of the client among all.
      attempt: how often this round has been released with other noise before.
    """
    members, nobody, sent = np.array([place]), np.zeros(0, int), list[tuple[PyTree, Array]]()
    answers = Answers(members, nobody, nobody, np.zeros(1, int), 1.0)
    moment = moment_of(plan, params, state, answers, int(state.round) + 1, attempt)
    masked = None if plan.secure is None else lambda _, messages, weights: sent.append((messages, weights))
    part = run_chunks(plan, moment, state, members, 1, masked)
    messages, weights = sent[0] if sent else ((), jnp.zeros(1))
    return OwnPart(part, messages, weights, moment.live)


def put_together(plan: RoundPlan, state: RoundState, found: Sequence[Mapping[str, Any]]) -> Part:
    """What came of the clients that have answered.

    Args:
      plan: of the rounds.
      state: that the round began with.
      found: what each told of its part (``joining.told``), in the order of the cohort; it may be nobody.
    """
    nothing = Part(
        members=np.zeros(0, int),
        view=release.nothing(plan, state.adapters),
        ideal=effective.nothing(plan, state.adapters),
        adapters=state.adapters,
        client_state=dict(state.client_state),
        below_clip=jnp.float32(0),
        reports=[],
        padded_tokens=0,
    )
    if not found:
        return nothing
    members = np.concatenate([one["members"] for one in found]).astype(int)
    return assembled(plan, state, members, nothing, found)
