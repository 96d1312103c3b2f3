"""Secure aggregation in an experiment: how many clients may leave, how many may be dishonest, who masks with whom.

SecAgg: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (ePrint 2017/281).
SecAgg+: Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (ePrint 2020/704).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from fedjax_llm.errors import UserError


class Terms(NamedTuple):
    """What the clients of a round agree on.

    Attributes:
      clients: n, that are selected.
      neighbours: k, with whom each has a mask in common; n - 1 on the complete graph.
      threshold: t, shares that open a secret; the k neighbours and the client itself hold one each.
      survivors: the least clients whose inputs a sum may hold.
      colluders: of the holders of any secret, how many may tell the server all they know.
    """

    clients: int
    neighbours: int
    threshold: int
    survivors: int
    colluders: int


@dataclass(frozen=True)
class SecAgg:
    """The server sees sums alone.

    Attributes:
      threshold: shares that open a secret, of ``neighbours + 1``; ``None``: above two thirds.
      neighbours: of each client; ``None``: all others.
      survivors: the least clients in a sum, or the round is abandoned; ``None``: as large a share of the clients as the
        threshold is of the holders.
      colluders: clients that may pool what they know with the server.
      bound: the largest absolute value that a number of an update may have; larger ones are cut, and counted. Not used
        with distributed noise, whose mechanism clips.
    """

    threshold: int | None = None
    neighbours: int | None = None
    survivors: int | None = None
    colluders: int = 0
    bound: float = 4.0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        least = {"threshold": 2, "neighbours": 2, "survivors": 2, "colluders": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"secure.{name} is {value}; it must be at least {bound}")
        if not 0 < self.bound < math.inf:
            raise UserError(f"secure.bound is {self.bound}; it must be positive and finite")

    def make(self, clients: int) -> Terms:
        """The terms of a round of so many selected clients.

        Raises:
          UserError: they cannot be met, or would protect nobody.
        """
        if clients < 3:
            raise UserError(
                f"secure aggregation of {clients} clients hides nothing: of a sum of two each knows the other's part. "
                "Let at least 3 sites take part in a round, or set secure to None"
            )
        neighbours = clients - 1 if self.neighbours is None else self.neighbours
        if neighbours > clients - 1:
            raise UserError(f"secure.neighbours is {neighbours}, but a client has only {clients - 1} others in a round")
        sparse = neighbours < clients - 1
        if sparse and neighbours % 2:
            raise UserError(
                f"secure.neighbours is {neighbours}, and if a client leaves before the graph is drawn an odd number of "
                f"clients cannot have an odd number of neighbours each. Set it to {neighbours - 1} or {neighbours + 1}"
            )
        holders = neighbours + 1
        threshold = min(holders, 2 * holders // 3 + 1) if self.threshold is None else self.threshold
        # On the ring one more: colluders, and clients that are said to have left, must not cut it into arcs.
        least = max((holders + self.colluders + sparse) // 2 + 1, self.colluders + 2)
        if not least <= threshold <= holders:
            raise UserError(
                f"secure.threshold is {threshold} of {holders} shares (secure.neighbours and the client itself) with "
                f"{self.colluders} colluders: it must be from {least} to {holders}, or the server could ask one part "
                "of the holders for a client's seed and the others for its key, and unmask it, or have none but "
                "colluders left around it"
            )
        survivors = math.ceil(clients * threshold / holders) if self.survivors is None else self.survivors
        # Above half: two lists of survivors cannot both be signed by so many.
        least = max(2 + self.colluders, (clients + self.colluders) // 2 + 1, threshold)
        if not least <= survivors <= clients:
            raise UserError(
                f"secure.survivors is {survivors} of {clients} clients, with a threshold of {threshold} and "
                f"{self.colluders} colluders: it must be from {least} to {clients}, or colluders could subtract all "
                "inputs but one, or the server could tell different parts of the clients different survivors"
            )
        return Terms(clients, neighbours, threshold, survivors, self.colluders)
