"""Bytes on the wire: what a run exchanges, and what exchanging the whole model would have taken."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax

from fedjax_llm import lora as low_rank
from fedjax_llm.federation.availability import Answers
from fedjax_llm.federation.plan import RoundPlan, Traffic
from fedjax_llm.types import PyTree


def travelling(tree: PyTree, live: Mapping[str, float] | None = None) -> list[tuple[str | None, Any]]:
    """The leaves that travel, with their keys: all but factors for which ``live`` holds zero."""
    found = [(getattr(path[-1], "key", None) if path else None, leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    return [(name, leaf) for name, leaf in found if live is None or live.get(name or "", 1.0)]


def tree_bytes(leaves: Sequence[tuple[str | None, Any]], share: Fraction = Fraction(1)) -> int:
    """Bytes of leaves.

    Args:
      leaves: from :func:`travelling`: keys, and arrays or their shapes and types.
      share: of the components of factors ``a`` and ``b`` that there are: rank over R.
    """
    sizes = [(name in ("a", "b"), math.prod(leaf.shape) * leaf.dtype.itemsize) for name, leaf in leaves]
    return sum(int(nbytes * share) if factor else nbytes for factor, nbytes in sizes)


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
    download = tree_bytes(travelling(adapters), share) + tree_bytes(travelling(received)) + extra
    leaves = travelling(message, live)
    if plan.codec is not None:
        return Traffic(download, plan.codec.nbytes([leaf for _, leaf in leaves]))
    return Traffic(download, tree_bytes(leaves, share))


def in_vain(
    plan: RoundPlan,
    adapters: PyTree,
    received: PyTree,
    message: PyTree,
    live: Mapping[str, float] | None,
    ranks: Sequence[int],
    answers: Answers,
) -> dict[str, Any]:
    """Who was selected in vain in a round, the bytes that took, and how long the round was: fields of a report.

    Args:
      plan: of the rounds.
      adapters: the server's, as far as they travel.
      received: what the server sends beside them.
      message: like that of one client.
      live: which factors are trained in the round.
      ranks: of all clients, [N]; empty: all are full.
      answers: who was selected in vain.
    """
    messages = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), message)

    def traffic(client: int) -> Traffic:
        return traffic_of(plan, adapters, received, messages, live, ranks[client] if ranks else 0)

    silent, late = answers.silent.tolist(), answers.late.tolist()
    download = sum(traffic(client).download for client in silent + late)
    wasted = Traffic(download, sum(traffic(client).upload for client in late))
    names = {"silent": silent, "late": late}
    found = {kind: tuple(plan.clients[client].name for client in places) for kind, places in names.items()}
    return found | {"wasted": wasted, "elapsed": answers.elapsed}


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
