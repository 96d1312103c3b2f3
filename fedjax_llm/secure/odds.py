"""How likely a sparse graph is to fail, where who drops out and who is dishonest does not depend on the graph.

A server that tries many keys of a colluder, or many sets of clients, until the graph suits it is not covered:
``SecAgg(colluders=...)`` or the complete graph is for that.

Bell et al. 2020 (ePrint 2020/704, section 3): the holders of a client's secrets are a random set, so that the dishonest
and the missing among them are hypergeometric. Bounds are unions over all clients.
"""

import math
from typing import NamedTuple

from fedjax_llm.errors import UserError
from fedjax_llm.secure.sec_agg import SecAgg, Terms


class Odds(NamedTuple):
    """Upper bounds on probabilities, for one round.

    Attributes:
      opened: that of some client both secrets can be opened, because so many of its holders are dishonest that they and
        two groups of honest ones reach the threshold twice; or that all neighbours that it may have left are dishonest.
      stuck: that of some client too few holders are left, so that the round is abandoned.
    """

    opened: float
    stuck: float


def odds(terms: Terms, dishonest: int, dropouts: int) -> Odds:
    """Of a round on a random graph.

    Args:
      terms: of the round.
      dishonest: clients that collude with the server, of all.
      dropouts: clients that leave, of all.
    """
    from scipy.stats import hypergeom  # a second to import

    n, k = terms.clients, terms.neighbours
    # A client holds a share of itself too; dishonest and missing are counted among its neighbours.
    opened = n * hypergeom.sf(min(2 * terms.threshold - k, terms.threshold) - 2, n - 1, min(dishonest, n - 1), k)
    # Who has left took along its own share of itself.
    stuck = (n - dropouts) * hypergeom.sf(k + 1 - terms.threshold, n - 1, min(dropouts, n - 1), k)
    if dropouts:
        stuck += dropouts * hypergeom.sf(k - terms.threshold, n - 1, dropouts - 1, k)
    return Odds(min(1.0, float(opened)), min(1.0, float(stuck)))


def least_neighbours(
    clients: int, dishonest: float, dropouts: float, opened: float = 2.0**-40, stuck: float = 1e-3
) -> int:
    """The least even number of neighbours with which a round is as safe and as sure as asked; n - 1 where none is.

    Args:
      clients: n.
      dishonest: share of the clients.
      dropouts: share of the clients.
      opened: at most this probability that somebody's input is exposed.
      stuck: at most this probability that the round is abandoned.

    Raises:
      UserError: a share is not in [0, 1).
    """
    if not 0 <= dishonest < 1 or not 0 <= dropouts < 1:
        raise UserError(f"shares of clients are {dishonest} and {dropouts}; they must be at least 0 and below 1")
    counts = math.ceil(dishonest * clients), math.ceil(dropouts * clients)
    for neighbours in range(2, clients - 1, 2):
        found = odds(SecAgg(neighbours=neighbours).make(clients), *counts)
        if found.opened <= opened and found.stuck <= stuck:
            return neighbours
    return clients - 1
