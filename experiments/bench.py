"""Times the training step and whole rounds on the real model, beside what a user would pick instead.

    python -m experiments.bench --json
    python -m experiments.bench --suite peers --json        (needs `make peers`)
    python -m experiments.bench --suite aggregation
    python -m experiments.bench --suite secure --json --plot growth.png
    python -m experiments.bench --suite leakage
    python -m experiments.bench --suite growth --json --plot docs/results/growth

One JSON object a case: seconds, real and padded tokens/s, GFLOP/s, share of this machine's measured f32 matmul peak,
and peak memory. The private round (record-level DP-SGD at the sites) is set against the same round without privacy:
``ratio`` is the median of ratios of runs that took turns. The suite ``peers`` sets ours against what a user would pick
instead (``experiments/peer_cases.py``), and adds what is measured without a peer: the share of the peak, the cost of
privacy, and the time from the command to the first round. ``aggregation`` times every server algorithm for a cohort of
64, against the clients' work, and a round of a thousand; ``secure`` times secure aggregation against plain sums, in the
quickstart's round, and its growth with the cohort; ``leakage`` times how the attacks score candidates, against a
forward pass.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments.command_line import told
from experiments.growth_cases import growth_suite
from experiments.leak_cost import leakage_cases
from experiments.peer_cases import ADAPTERS, MECHANISM, NAMES, peer_cases, round_work, start_case
from experiments.secure_cost import plot_growth, secure_cases
from experiments.server_cost import COHORT, many_clients_case, server_cases
from fedjax_llm.errors import UserError, nearest, tell
from fedjax_llm.experiment.memory import release_freed_memory, set_up_process
from fedjax_llm.experiment.synthetic import dense_plan, local_training, training_flops
from fedjax_llm.experiment.timing import Work, matmul_peak, once, paired, spread, timed
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.models.loading import BaseModel, load
from fedjax_llm.runs.environment import peak_rss_bytes
from fedjax_llm.types import RoundState

_FORGET_PEAK = Path("/proc/self/clear_refs")
"""Linux: writing 5 here sets this process's peak of resident memory back to what it holds now."""


@dataclass(frozen=True)
class Bench:
    """Rows of 4 clients x 4 examples x 64 random tokens, rank 8 on q and v, AdamW, two local steps a round.

    Attributes:
      model: built-in name, hub id, folder or .gguf file.
      clients: C.
      steps: local steps a round.
      batch: B, examples a step.
      length: L, tokens an example.
      repeats: timed repeats after one warm-up.
      suite: what is measured: training ``steps`` and rounds, speed against ``peers``, the ``aggregation``, ``secure``
        aggregation, or how the attacks on ``leakage`` score.
      plot: draw the growth of ``secure`` aggregation into this file; that of ``growth``: .svg and .png.
      only: of the cases of ``peers``, those that are named; empty: all.
      turns: how often ours and each peer take turns.
      peer_python: the interpreter of the peers' environment.
      json: print JSON lines rather than a table.
    """

    model: str = "smollm2-135m-instruct"
    clients: int = 4
    steps: int = 2
    batch: int = 4
    length: int = 64
    repeats: int = 5
    suite: Literal["steps", "peers", "aggregation", "secure", "leakage", "growth"] = "steps"
    plot: Path | None = None
    only: tuple[str, ...] = ()
    turns: int = 3
    peer_python: Path = field(default_factory=lambda: Path(".venv-peers/bin/python"))
    json: bool = False

    @property
    def shapes(self) -> dict[str, Any]:
        """Of dense rounds."""
        return {"clients": self.clients, "steps": self.steps, "batch": self.batch, "length": self.length}


def peak_during(work: Work) -> int | None:
    """Peak resident memory of this process in bytes during one call; ``None`` where the system cannot tell."""
    release_freed_memory()
    try:
        _FORGET_PEAK.write_text("5")
    except OSError:
        return None
    once(work)
    return peak_rss_bytes()


def step_case(bench: Bench, base: BaseModel, plan: RoundPlan, state: RoundState, peak: float) -> dict[str, Any]:
    """One training step of all clients: gradients of a microbatch, and the optimisers' steps."""
    packed, trained = local_training(base, plan, state)
    batch, *_ = packed()
    seconds = statistics.median(timed(lambda: trained([batch]), bench.repeats))
    flops = training_flops(base.model, batch.tokens.size, len(batch.target_row))
    return figures("train_step", seconds, batch.real_tokens, batch.tokens.size, flops, peak)


def round_figures(
    case: str, bench: Bench, base: BaseModel, plan: RoundPlan, seconds: float, peak: float
) -> dict[str, Any]:
    """A case of whole rounds."""
    shape = plan.shapes[0]
    flops = bench.steps * training_flops(base.model, shape.rows * shape.length, shape.targets)
    return figures(case, seconds, round_tokens(bench), round_tokens(bench), flops, peak)


def round_tokens(bench: Bench) -> int:
    """Tokens of a round; none of them is padding."""
    return bench.clients * bench.steps * bench.batch * bench.length


def cost(plain: Work, private: Work, repeats: int) -> tuple[float, dict[str, Any]]:
    """What privacy costs a round.

    Returns:
      Seconds of a private round; and the ratio to a plain one, and by how many bytes the peak of resident memory is
      higher (``None`` where the system cannot tell).
    """
    pairs = paired(plain, private, repeats)
    plain_peak, private_peak = peak_during(plain), peak_during(private)
    growth = None if plain_peak is None or private_peak is None else private_peak - plain_peak
    ratios = spread(second / first for first, second in pairs)
    return statistics.median(second for _, second in pairs), ratios | {"memory_growth_bytes": growth}


def private_case(
    bench: Bench, base: BaseModel, plain: Work, private: Work, plan: RoundPlan, state: RoundState, peak: float
) -> dict[str, Any]:
    """A round with record-level DP-SGD, and its cost; memory may grow by the per-row gradients of the adapters."""
    seconds, found = cost(plain, private, bench.repeats)
    gradients = 4 * plan.shapes[0].rows * sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
    targets = {"target": "at most 1.05", "memory_growth_target": f"at most {gradients}"}
    return round_figures("private_round", bench, base, plan, seconds, peak) | found | targets


def figures(case: str, seconds: float, real: int, padded: int, flops: float, peak: float) -> dict[str, Any]:
    """One case as a JSON object."""
    return {
        "case": case,
        "seconds": round(seconds, 4),
        "real_tokens_per_second": round(real / seconds, 1),
        "padded_tokens_per_second": round(padded / seconds, 1),
        "gflops": round(flops / seconds / 1e9, 1),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(flops / seconds / peak, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> int:
    """Runs the command line; returns the exit status."""
    bench = tyro.cli(Bench, prog="python -m experiments.bench", description=told(__doc__))
    console = Console()
    try:
        for case in cases(bench):
            if bench.json:
                print(json.dumps(case), flush=True)
            else:
                table = Table.grid(padding=(0, 2))
                for key, value in case.items():
                    table.add_row(key, f"{value:,}" if isinstance(value, int | float) else str(value))
                console.print(table, "")
    except UserError as error:
        return tell(error)
    return 0


def cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """All cases of a run, as they are measured."""
    set_up_process()
    if bench.suite == "secure":
        yield from secure_suite(bench)
        return
    if bench.suite == "growth":
        yield from growth_suite(load(bench.model), peak_during, bench.plot)
        return
    if bench.suite == "leakage":
        yield from leakage_cases(load(bench.model), ADAPTERS, bench.length, bench.repeats)
        return
    if bench.suite == "peers":
        yield from peers_suite(bench)
        return
    peak = matmul_peak()
    base = load(bench.model)
    if bench.suite == "aggregation":
        plan, state = dense_plan(base, ADAPTERS, **bench.shapes)
        seconds = statistics.median(timed(round_work(base, plan, state), bench.repeats))
        yield from server_cases(plan, state.adapters, seconds * COHORT / bench.clients)
        yield many_clients_case(base, ADAPTERS)
        return
    yield from step_cases(bench, base, peak)


def step_cases(bench: Bench, base: BaseModel, peak: float) -> Iterator[dict[str, Any]]:
    """The training step, whole rounds, and whole rounds with privacy."""
    plan, state = dense_plan(base, ADAPTERS, **bench.shapes)
    private_plan, private_state = dense_plan(base, ADAPTERS, **bench.shapes, mechanism=MECHANISM)
    plain, private = round_work(base, plan, state), round_work(base, private_plan, private_state)
    yield step_case(bench, base, plan, state, peak)
    yield round_figures("round", bench, base, plan, statistics.median(timed(plain, bench.repeats)), peak)
    yield private_case(bench, base, plain, private, private_plan, private_state, peak)


def peers_suite(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ours against the peers, then what is measured without one.

    Raises:
      UserError: ``only`` names no case, or what :func:`peer_cases` raises.
    """
    alone = ("share-of-peak", "cost-of-privacy", "command-to-first-round")
    for name in bench.only:
        if name not in (*NAMES, *alone):
            raise UserError(f"unknown case {name!r}{nearest(name, (*NAMES, *alone))}")
    only, base = bench.only or (*NAMES, *alone), load(bench.model)
    dense = (bench.clients, bench.batch, bench.length)
    if set(only) & set(NAMES):
        yield from peer_cases(base, bench.model, bench.peer_python, bench.turns, only, dense)
    if set(only) & set(alone[:2]):
        step, _, private = step_cases(bench, base, matmul_peak())
        found = {
            "share-of-peak": {"value": step["share_of_peak"], "target": "at least 0.75"},
            "cost-of-privacy": {name: private[name] for name in ("ratio", "low", "high")} | {"target": "at most 1.05"},
        }
        yield from ({"case": name, **found[name]} for name in found if name in only)
    if alone[2] in only:
        yield start_case(bench.turns)


def secure_suite(bench: Bench) -> Iterator[dict[str, Any]]:
    """The cases of secure aggregation, and their picture if one is asked for."""
    found = []
    for case in secure_cases(bench.repeats):
        found.append(case)
        yield case
    if bench.plot is not None:
        plot_growth(found, bench.plot)


if __name__ == "__main__":
    sys.exit(main())
