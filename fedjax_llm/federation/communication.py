"""Bytes on the wire: what a run exchanges, and what exchanging the whole model would have taken."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import jax

from fedjax_llm import lora as low_rank
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.types import PyTree


class Traffic(NamedTuple):
    """What one client receives and sends in one round, in bytes."""

    download: int
    upload: int


def tree_bytes(tree: PyTree, live: Mapping[str, float] | None = None, share: Fraction = Fraction(1)) -> int:
    """Bytes of a tree's leaves.

    Args:
      tree: arrays, or their shapes and types.
      live: factor -> 0 if it does not travel; other leaves always do.
      share: of the components of factors ``a`` and ``b`` that there are: rank over R.
    """
    total = 0
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        name = getattr(path[-1], "key", None) if path else None
        if live is not None and name in live and not live[name]:
            continue
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += int(nbytes * share) if name in ("a", "b") else nbytes
    return total


def traffic_of(
    plan: RoundPlan, adapters: PyTree, received: PyTree, messages: PyTree, live: Mapping[str, float] | None, rank: int
) -> Traffic:
    """What a client of a round exchanges: nothing where the setting is not federated.

    The setting centralised moves the data itself to one place, which no number of bytes makes comparable.

    Args:
      plan: of the rounds.
      adapters: the server's, as far as they travel.
      received: what the server sends beside them.
      messages: what a chunk of clients sends, leaves [C, ...].
      live: which factors are trained in the round.
      rank: of the client's adapters.
    """
    if plan.setting != "federated":
        return Traffic(0, 0)
    algorithm = plan.aggregation
    share = Fraction(rank, low_rank.rank_of(low_rank.join(adapters, plan.frozen))) if plan.ranks else Fraction(1)
    extra = 0 if algorithm.download is None else algorithm.download(plan.cohort, adapters)
    message = adapters  # a delta takes the room of the adapters, in their type
    if algorithm.client.report is not None:
        message = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), messages)
    download = tree_bytes(adapters, share=share) + tree_bytes(received) + extra
    return Traffic(download, tree_bytes(message, live, share))


def seconds(nbytes: float, bandwidth_mbps: float) -> float:
    """Time on a line of ``bandwidth_mbps`` megabits a second."""
    return nbytes * 8 / (bandwidth_mbps * 1e6)


def totals(
    download: int, upload: int, longest: int, full_model: int, client_rounds: int, rounds: int, bandwidth_mbps: float
) -> dict[str, float | int | None]:
    """The figures of a run.

    Args:
      download: bytes that all clients received in all rounds.
      upload: bytes that they sent.
      longest: the sum over rounds of the most that one client received and sent.
      full_model: bytes of one copy of the whole model, for comparison; 0 where nothing is exchanged.
      client_rounds: the sum over rounds of the clients that took part.
      rounds: that were run.
      bandwidth_mbps: of a client's line; the clients of a round send side by side.

    Returns:
      ``upload_bytes``, ``download_bytes``, ``full_model_bytes`` (2 x client rounds x model), their ratio
      ``communication_ratio``, and seconds at the bandwidth, for the adapters and for the full model.
    """
    full = 2 * full_model * client_rounds
    return {
        "upload_bytes": upload,
        "download_bytes": download,
        "full_model_bytes": full,
        "communication_ratio": full / (download + upload) if download + upload else None,
        "bandwidth_mbps": bandwidth_mbps,
        "communication_seconds": seconds(longest, bandwidth_mbps),
        "full_model_seconds": seconds(2 * full_model * rounds, bandwidth_mbps),
    }
