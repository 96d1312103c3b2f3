"""The algorithms that ask something of their clients, as plain NumPy in float64 over flat vectors: oracles."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Vector = np.ndarray
Memory = defaultdict[int, Vector]


class Work(NamedTuple):
    """A client of a round: its place, weight, learning rates, gradients at each step, loss and gradient over all."""

    place: int
    weight: float
    rates: Sequence[float]
    slope: Callable[[int, Vector], Vector]
    whole: Callable[[Vector], tuple[float, Vector]]


class Done(NamedTuple):
    """A client after its steps."""

    work: Work
    delta: Vector


class Rule(NamedTuple):
    """``local(g, y, x, state, own) -> g`` corrects steps; ``server(x, state, memory, clients) -> (x, state)``."""

    local: Callable[..., Vector]
    server: Callable[..., tuple[Vector, Vector]]


def plain_round(rule: Rule, x: Vector, state: Vector, memory: Memory, works: Sequence[Work]) -> tuple[Vector, Vector]:
    """One round, client by client and step by step; ``memory`` is written to."""
    clients = []
    for work in works:
        y = x
        for step, rate in enumerate(work.rates):
            y = y - rate * rule.local(work.slope(step, y), y, x, state, memory[work.place])
        clients.append(Done(work, y - x))
    return rule.server(x, state, memory, clients)


def fresh_memory(size: int) -> Memory:
    """Zeros for every client."""
    return defaultdict(lambda: np.zeros(size))


def average(clients: Sequence[Done], values: Sequence) -> np.ndarray:
    """The mean of one value a client, by their weights."""
    return np.average(values, axis=0, weights=[client.work.weight for client in clients])


def deltas(clients: Sequence[Done]) -> list[Vector]:
    """One a client."""
    return [client.delta for client in clients]


def uncorrected(g, y, x, state, own):
    """Plain steps."""
    return g


def fedavg() -> Rule:
    """McMahan et al. 2017."""
    return Rule(uncorrected, lambda x, state, memory, clients: (x + average(clients, deltas(clients)), state))


def scaffold(server_lr: float, participation: float) -> Rule:
    """Karimireddy et al. 2020, Algorithm 1 with option II."""

    def server(x, c, memory, clients):
        changes = []
        for client in clients:
            before = memory[client.work.place]
            after = before - c + (x - (x + client.delta)) / sum(client.work.rates)
            memory[client.work.place] = after
            changes.append(after - before)
        return x + server_lr * average(clients, deltas(clients)), c + participation * average(clients, changes)

    return Rule(lambda g, y, x, c, own: g - own + c, server)


def fednova(server_lr: float) -> Rule:
    """Wang et al. 2020 for plain SGD, whose gradients have the learning rates for weights."""

    def server(x, state, memory, clients):
        norms = [sum(client.work.rates) for client in clients]
        direction = average(clients, [client.delta / norm for client, norm in zip(clients, norms, strict=True)])
        return x + server_lr * average(clients, norms) * direction, state

    return Rule(uncorrected, server)


def mimelite(momentum: float) -> Rule:
    """Karimireddy et al. 2020 (Mime), SGD with momentum, without the SVRG correction."""

    def server(x, m, memory, clients):
        gradient = average(clients, [client.work.whole(x)[1] for client in clients])
        return average(clients, [x + client.delta for client in clients]), (1 - momentum) * gradient + momentum * m

    return Rule(lambda g, y, x, m, own: (1 - momentum) * g + momentum * m, server)


def feddyn(alpha: float, participation: float) -> Rule:
    """Acar et al. 2021, Algorithm 1."""

    def server(x, h, memory, clients):
        for client in clients:
            memory[client.work.place] = memory[client.work.place] - alpha * client.delta
        h = h - alpha * participation * average(clients, deltas(clients))
        return average(clients, [x + client.delta for client in clients]) - h / alpha, h

    return Rule(lambda g, y, x, h, own: g + alpha * (y - x) - own, server)


def qfedavg(q: float, learning_rate: float) -> Rule:
    """Li et al. 2020, Algorithm 2, before anything is cancelled."""

    def server(x, state, memory, clients):
        L, above, below = 1 / learning_rate, 0.0, 0.0
        for client in clients:
            loss, slope = client.work.whole(x)[0], -L * client.delta
            above = above + client.work.weight * loss**q * slope
            below += client.work.weight * (q * loss ** (q - 1) * (slope @ slope) + L * loss**q)
        return x - above / below, state

    return Rule(uncorrected, server)
