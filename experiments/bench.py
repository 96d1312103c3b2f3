"""Times the training step and whole rounds on the real model, beside what a user would pick instead.

    python -m experiments.bench --json
    python -m experiments.bench --peers        (needs `make peers`)

One JSON object a case: seconds, real and padded tokens/s, GFLOP/s, share of this machine's measured f32 matmul peak,
and peak memory; with ``--peers`` also the ratio to each peer, as the median of ratios of runs that took turns.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fedjax_llm import trees
from fedjax_llm.data.packing import pack
from fedjax_llm.errors import UserError, tell
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.synthetic import dense_plan, training_flops
from fedjax_llm.federation.rounds import RoundPlan, run_round
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel, converted_folder, load
from fedjax_llm.runs.environment import peak_rss_bytes
from fedjax_llm.training import client_update
from fedjax_llm.training.rows import Rows
from fedjax_llm.types import RoundState

PEERS = {"peft-loop": ("--no-flower",), "flower-peft": ()}
"""What a user would pick instead: a PyTorch + PEFT loop over the clients, and Flower around it."""


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
      peers: also time the peers, taking turns.
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
    peers: bool = False
    turns: int = 3
    peer_python: Path = field(default_factory=lambda: Path(".venv-peers/bin/python"))
    json: bool = False


def matmul_peak() -> float:
    """This machine's f32 matrix-product peak in FLOP/s: the best of several shapes of a transformer's layers."""
    multiply, best = jax.jit(lambda a, b: a @ b), 0.0
    for m, k, n in ((1024, 576, 1536), (2048, 2048, 2048), (1024, 576, 4096)):
        a, b = jnp.ones((m, k)), jnp.ones((k, n))
        seconds = min(timed(lambda: multiply(a, b), 10))  # noqa: B023
        best = max(best, 2.0 * m * k * n / seconds)
    return best


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, after one warm-up that is not counted."""
    jax.block_until_ready(work())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - began)
    return seconds


def step_case(bench: Bench, base: BaseModel, plan: RoundPlan, state: RoundState, peak: float) -> dict[str, Any]:
    """One training step of all clients: gradients of a microbatch, and the optimisers' steps."""
    work = [[list(client.examples[: bench.batch])] for client in plan.clients]
    (batch,) = pack(work, plan.shapes, clients=bench.clients)
    rows = Rows(*(jnp.asarray(getattr(batch, name)) for name in Rows._fields))
    begun = client_update.start(plan.trainer, trees.repeat(state.adapters, bench.clients))
    keys = jax.random.split(jax.random.key(0), bench.clients)
    rates = np.ones(bench.clients, np.float32)

    def step() -> Any:
        summed = client_update.accumulate(plan.trainer, base.params, begun, rows, keys)
        return client_update.step(plan.trainer, summed, begun.adapters, batch.finished, batch.denominator, rates)

    seconds = statistics.median(timed(step, bench.repeats))
    shape = plan.shapes[0]
    flops = training_flops(base, shape.rows, shape.length, shape.targets)
    return figures("train_step", seconds, batch.real_tokens, batch.tokens.size, flops, peak)


def round_case(bench: Bench, base: BaseModel, plan: RoundPlan, state: RoundState, peak: float) -> dict[str, Any]:
    """A whole round: sampling, packing, local training, aggregation."""
    seconds = statistics.median(timed(lambda: run_round(plan, base.params, state)[0].adapters, bench.repeats))
    tokens = bench.clients * bench.steps * bench.batch * bench.length
    shape = plan.shapes[0]
    flops = bench.steps * training_flops(base, shape.rows, shape.length, shape.targets)
    return figures("round", seconds, tokens, tokens, flops, peak)


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


def peer_cases(bench: Bench, base: BaseModel, ours: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Ours and each peer in turns on the same model and shapes; ratios of whole rounds, and of training alone.

    Args:
      bench: the shapes.
      base: the model.
      ours: seconds of one of our rounds, measured now.

    Raises:
      UserError: the peers' environment is not there, or a peer failed.
    """
    if not bench.peer_python.exists():
        raise UserError(f"{bench.peer_python} does not exist; `make peers` creates the peers' environment")
    for name, options in PEERS.items():
        rounds, trainings, own = [], [], []
        for _ in range(bench.turns):
            lines = run_peer(bench, base, options)
            rounds.append(statistics.median(line["round_s"] for line in lines))
            trainings.append(statistics.median(line["train_s"] for line in lines))
            own.append(statistics.median(ours() for _ in range(len(lines))))
        tokens = bench.clients * bench.steps * bench.batch * bench.length
        for part, theirs in (("round", rounds), ("training", trainings)):
            ratios = sorted(peer / mine for peer, mine in zip(theirs, own, strict=True))
            yield {
                "case": f"{name}/{part}",
                "ours": round(tokens / statistics.median(own), 1),
                "peer": round(tokens / statistics.median(theirs), 1),
                "ratio": round(statistics.median(ratios), 3),
                "low": round(ratios[0], 3),
                "high": round(ratios[-1], 3),
            }


def run_peer(bench: Bench, base: BaseModel, options: tuple[str, ...]) -> list[dict[str, Any]]:
    """The JSON lines of a peer's rounds on the same weights, without its warm-up round."""
    converted = converted_folder(base.fingerprint)
    folder = converted if converted.exists() else Path(bench.model)
    shapes = {"clients": bench.clients, "steps": bench.steps, "batch": bench.batch, "length": bench.length, "rounds": 4}
    command = [str(bench.peer_python), "benchmarks/peft_peer.py", "--model", str(folder), *options]
    command += [word for name, value in shapes.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) < 2:
        raise UserError(f"the peer {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return lines[1:]


def main() -> int:
    """Runs the command line; returns the exit status."""
    bench = tyro.cli(Bench, prog="python -m experiments.bench")
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
    use_compilation_cache()
    peak = matmul_peak()
    base = load(bench.model)
    shapes = {"clients": bench.clients, "steps": bench.steps, "batch": bench.batch, "length": bench.length}
    plan, state = dense_plan(base, Lora(rank=8, alpha=16, targets=("q_proj", "v_proj")), **shapes)
    yield step_case(bench, base, plan, state, peak)
    yield round_case(bench, base, plan, state, peak)
    if bench.peers:
        yield from peer_cases(bench, base, lambda: timed(lambda: run_round(plan, base.params, state)[0].adapters, 1)[0])


if __name__ == "__main__":
    sys.exit(main())
