"""What secure aggregation costs, against summing updates in clear; and how that grows with the number of clients.

Part of ``python -m experiments.bench --suite secure``.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fedjax_llm.config import load
from fedjax_llm.experiment.planning import secure_of
from fedjax_llm.experiment.prepare import prepare
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.secure import client as clients
from fedjax_llm.secure import primitives, ring, server, sharing, simulation
from fedjax_llm.secure.messages import SERVER, Meeting, encode
from fedjax_llm.secure.odds import least_neighbours
from fedjax_llm.secure.sec_agg import SecAgg, Terms

VALUES = 460_800
"""Of SmolLM2's adapters of rank 8 on q and v."""
CLIENTS = 25
GROWTH = (8, 16, 32, 64, 128, 256, 512)
DISHONEST = DROPOUTS = 0.05
"""Shares of the clients that the sparse graph is made for: exposed with at most 2^-40, stuck with at most 1e-3."""
QUICKSTART = "configs/quickstart.py"


def secure_cases(repeats: int) -> Iterator[dict[str, Any]]:
    """All cases: one round of 25 clients, the quickstart's round, growth.

    Args:
      repeats: of the quickstart's rounds.
    """
    yield from round_cases()
    yield quickstart_case(repeats)
    for count in GROWTH:
        complete = SecAgg().make(count)
        sparse = SecAgg(neighbours=least_neighbours(count, DISHONEST, DROPOUTS)).make(count)
        yield {"case": f"growth/SecAgg/{count}", **growth_figures(complete)}
        yield {"case": f"growth/SecAgg+/{count}", **growth_figures(sparse)}


def round_cases() -> Iterator[dict[str, Any]]:
    """Masking, the whole protocol and its bytes for 25 clients on the complete graph."""
    rng = np.random.default_rng(0)
    names = [f"site-{c:02d}" for c in range(CLIENTS)]
    updates = rng.normal(0, 1e-3, (CLIENTS, VALUES)).astype(np.float32)
    weights, grid = np.ones(CLIENTS, np.float32), ring.grid(4.0, CLIENTS, float(CLIENTS))
    plain = statistics.median(_timed(lambda: updates.sum(axis=0)) for _ in range(5))
    vectors = ring.quantise(updates, weights, grid)
    began = time.perf_counter()
    session = _opened(SecAgg().make(CLIENTS), names)
    keys = time.perf_counter() - began
    masking = []
    for name, vector in zip(names, vectors, strict=True):
        data = session.inbox.pop(name)
        began = time.perf_counter()
        session.clients[name], answer = clients.mask(session.clients[name], data, vector, session.masks)
        masking.append(time.perf_counter() - began)
        simulation.deliver(session, name, answer)
    began = time.perf_counter()
    outcome = simulation.close(session)
    unmasking = time.perf_counter() - began
    error = np.abs(ring.read(outcome.total, grid).values / CLIENTS - updates.astype(np.float64).mean(axis=0)).max()
    yield {
        "case": f"masking/{CLIENTS}",
        "values": VALUES,
        "masks_seconds_a_client": round(masks_seconds(names), 5),
        "stage_seconds_a_client": round(statistics.median(masking), 5),
        "highest": round(max(masking), 5),
        "target": "below 0.01",
    }
    yield {
        "case": f"protocol/{CLIENTS}",
        "plain_sum_seconds": round(plain, 5),
        "keys_and_shares_seconds": round(keys, 4),
        "masking_seconds": round(sum(masking), 4),
        "unmasking_seconds": round(unmasking, 4),
        "largest_error": float(error),
        "error_bound": ring.error_bound(grid, CLIENTS, float(CLIENTS), float(np.abs(updates).max())),
    }
    received, sent = (max(both[place] for both in outcome.traffic.values()) for place in (0, 1))
    yield {
        "case": f"traffic/{CLIENTS}",
        "plain_upload_bytes": 4 * VALUES,
        "upload_bytes": sent,
        "expansion": round(sent / (4 * VALUES), 4),
        "download_bytes": received,
        "download_note": "beside the adapters, which are as large as a plain update",
    }


def masks_seconds(names: Sequence[str]) -> float:
    """Agreeing on the seeds of one client's masks and adding all of them, without shares and messages: the median."""
    session = _opened(SecAgg().make(len(names)), names)
    me = session.clients[names[0]]
    total, roster, meeting = np.zeros(session.meeting.values, np.uint32), me.roster, session.meeting
    assert roster is not None

    def mask() -> None:
        session.masks.add(total, me.seed, 1)
        own = primitives.private_key(me.mask_secret, "mask")
        bound = clients.dealers_hash(roster, range(len(names)))
        for other in roster.graph[me.place]:
            seed = clients.pair_seed(meeting, roster, own, me.place, other, bound)
            session.masks.add(total, seed, 1 if other > me.place else -1)

    return statistics.median(_timed(mask) for _ in range(25))


def quickstart_case(repeats: int) -> dict[str, Any]:
    """The quickstart's rounds with and without secure aggregation, taking turns; and the protocol's own time."""
    experiment = load(QUICKSTART)
    prepared = prepare(experiment, RunProgress(1, Console(file=io.StringIO())))
    assert prepared.plan is not None
    plain = prepared.plan._replace(measure_error=False)
    secured = plain._replace(secure=secure_of(SecAgg(), experiment, plain))
    state = initial_state(plain, prepared.adapters)

    def one(plan: Any) -> float:
        return _timed(lambda: jax.block_until_ready(run_round(plan, prepared.base.params, state)[0].adapters))

    one(plain), one(secured)
    pairs = [(one(plain), one(secured)) if r % 2 else (one(secured), one(plain))[::-1] for r in range(repeats)]
    usual = statistics.median(first for first, _ in pairs)
    size = sum(leaf.size for leaf in jax.tree.leaves(prepared.adapters)) + ring.EXTRA
    names = [client.name for client in plain.clients]
    alone = statistics.median(_timed(lambda: _protocol(names, size)) for _ in range(5))
    ratios = sorted(second / first for first, second in pairs)
    return {
        "case": "quickstart round",
        "clients": len(names),
        "values": size - ring.EXTRA,
        "round_seconds": round(usual, 3),
        "protocol_seconds": round(alone, 4),
        "added": round(alone / usual, 5),
        "target": "added at most 0.02",
        "ratio": round(statistics.median(ratios), 4),
        "low": round(ratios[0], 4),
        "high": round(ratios[-1], 4),
    }


def growth_figures(terms: Terms) -> dict[str, Any]:
    """What one client and the server take in a round of so many, from one client's and one secret's time.

    The other clients are there with their keys; what they deal to the one that is timed is drawn at random, since
    dealing for all would take hours on the complete graph.
    """
    names = [f"site-{c:03d}" for c in range(terms.clients)]
    own = simulation.identities(names)
    meeting = Meeting(terms, bytes(16), 1, VALUES + ring.EXTRA, 32)
    members, states = [], []
    for name in names:
        state, data = clients.advertise(meeting, name, own.keys[name], own.directory, bytes(32))
        states.append(state)
        members.append([name, *clients.decode("AdvertiseKeys", meeting, name, data)])
    keys = encode("Keys", meeting, SERVER, members)
    began = time.perf_counter()
    me, shared = clients.share(states[0], keys)
    sharing_seconds = time.perf_counter() - began
    assert me.roster is not None
    boxes = [_box(states[dealer], me, dealer) for dealer in me.roster.holders(0)]
    listed = encode("Shares", meeting, SERVER, [[c] for c in range(terms.clients)], boxes)
    vector, masks = np.zeros(meeting.values, np.uint32), primitives.Masks(meeting.values, 32)
    began = time.perf_counter()
    _, masked = clients.mask(me, listed, vector, masks)
    masking = time.perf_counter() - began
    dealt = sharing.dealt(bytes(16), terms.threshold, terms.neighbours + 1)
    opening = _timed(lambda: sharing.combined(dict(enumerate(dealt, 1)), terms.threshold)) + _timed(
        lambda: masks.add(vector, bytes(16), -1)
    )
    receiving = _timed(
        lambda: server.receive(
            server.Server(meeting, own.directory, tuple(names), 2, {}, frozenset(names)), names[0], masked
        )
    )
    unmask = (terms.neighbours + 1) * 20
    return {
        "clients": terms.clients,
        "neighbours": terms.neighbours,
        "threshold": terms.threshold,
        "client_share_seconds": round(sharing_seconds, 4),
        "client_mask_seconds": round(masking, 4),
        "server_seconds": round(terms.clients * (opening + receiving), 3),
        "upload_bytes": len(shared) + len(masked) + unmask,
        "download_bytes": len(keys) + len(listed),
    }


def plot_growth(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Client's and server's seconds, and bytes beside the update, over the number of clients.

    Args:
      cases: with ``growth/...`` among them.
      path: of the picture.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    measures: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("client, seconds a round", lambda c: c["client_share_seconds"] + c["client_mask_seconds"]),
        ("server, seconds a round", lambda c: c["server_seconds"]),
        (
            "client, kB a round beside the update",
            lambda c: (c["upload_bytes"] + c["download_bytes"] - 4 * VALUES) / 1e3,
        ),
    ]
    for axis, (label, measure) in zip(axes, measures, strict=True):
        for graph, colour in (("SecAgg", "#8d877c"), ("SecAgg+", "#b23a18")):
            found = [case for case in cases if case["case"].startswith(f"growth/{graph}/")]
            name = f"{graph} ({'complete' if graph == 'SecAgg' else 'sparse'} graph)"
            axis.plot([c["clients"] for c in found], [measure(c) for c in found], "o-", color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="clients", title=label)
        axis.set_xticks(GROWTH, [str(count) for count in GROWTH])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _box(dealer: clients.Client, holder: clients.Client, place: int) -> list[Any]:
    """What a dealer would seal for the holder, with random bytes for shares."""
    dealer = dealer._replace(roster=holder.roster, place=place)
    dealer = dealer._replace(agreed=clients.agreed_with(dealer, [holder.place]))
    _, *rest = clients.boxed(dealer, holder.place, primitives.fresh(), primitives.fresh())
    return [place, *rest]


def _opened(terms: Terms, names: Sequence[str], values: int | None = None) -> simulation.Session:
    """A round whose inputs can be sent, of ``VALUES`` numbers where nothing else is said."""
    values = VALUES + ring.EXTRA if values is None else values
    own = simulation.identities(names)
    return simulation.open_round(terms, own, names, session=bytes(16), round_number=1, model=bytes(32), values=values)


def _protocol(names: Sequence[str], size: int) -> None:
    """A whole round of the protocol."""
    session = _opened(SecAgg().make(len(names)), names, size)
    for name in names:
        simulation.submit(session, name, np.zeros(size, np.uint32))
    simulation.close(session)


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
