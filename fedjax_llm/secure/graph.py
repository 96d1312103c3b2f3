"""Who masks with whom: everybody with everybody (SecAgg), or a sparse regular graph (SecAgg+, Bell et al. 2020).

The sparse graph is a ring with chords over an order of the clients that is drawn from the hash of everybody's keys, so
that all compute the same one and nobody chooses their neighbours alone.
"""

from collections.abc import Collection, Sequence

from fedjax_llm.secure.primitives import digest


def neighbours(names: Sequence[str], count: int, transcript: bytes) -> tuple[tuple[int, ...], ...]:
    """For each client its neighbours' places, in ascending order; being a neighbour is mutual.

    Args:
      names: of the clients, in the order that all know.
      count: k neighbours each, an even number; all others where there are no more than so many.
      transcript: hash of all keys.
    """
    n = len(names)
    if count >= n - 1:
        return tuple(tuple(j for j in range(n) if j != i) for i in range(n))
    order = sorted(range(n), key=lambda i: digest("order", transcript, names[i]))
    steps = [step for half in range(1, count // 2 + 1) for step in (half, -half)]
    found: list[tuple[int, ...]] = [()] * n
    for place, client in enumerate(order):
        found[client] = tuple(sorted(order[(place + step) % n] for step in steps))
    return tuple(found)


def connected(graph: Sequence[Sequence[int]], members: Collection[int]) -> bool:
    """Whether the members hang together; if not, the masks of each part cancel, and the parts' sums would be seen."""
    inside, rest = set(members), set(members)
    todo = [rest.pop()] if rest else []
    while todo:
        reached = rest.intersection(graph[todo.pop()])
        rest -= reached
        todo += reached
    return bool(inside) and not rest
