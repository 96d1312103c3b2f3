"""What a user would pick instead: federated LoRA with PyTorch + PEFT, run by Flower or by a plain loop, on the CPU.

`make peers` installs what this needs. One JSON line a round on standard output; round 0 is the warm-up.

    .venv-peers/bin/python benchmarks/peft_peer.py --model DIR --examples FILE --no-flower
    .venv-peers/bin/python benchmarks/peft_peer.py --model DIR --examples FILE --steps 2 --rounds 3

A round: each client takes `--steps` AdamW steps (lr 1e-3) on LoRA adapters (r=8, alpha=16, on q_proj and v_proj), each
step on all of its examples, padded to the longest; then the server takes the mean, weighted by numbers of examples. The
file holds JSON lines `{"client": c, "tokens": [...], "prompt_length": n}`; the loss is on what follows the prompt.

    default          Flower; every call of a client loads the model anew, as FlowerTune does
    --cache-model    Flower; each worker process keeps its model
    --no-flower      no Flower: a loop over the clients in this process
    --private        with any of these: example-level DP-SGD inside each client by Opacus, with a loss for each example;
                     all of a client's examples take part in every step
    --layers 20 21   adapters in these layers only

Keys: `round_s` is the round by the wall clock, `train_s` and `load_s` are the clients' times summed, `round_tok_s` and
`train_tok_s` are real tokens over the first two. `rss_*_mb` are peaks of resident memory in MiB.
"""

import argparse
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # both are read at import
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from peft_loop import Options, adapter_state, cached_client, load_client, peak_memory, read_examples, train_client


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--examples", required=True, help="JSON lines of the clients' examples")
    parser.add_argument("--steps", type=int, default=1, help="local steps a round")
    parser.add_argument("--rounds", type=int, default=3, help="including the warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads a client; Flower runs as many as fit")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"], help="linear layers that get adapters")
    parser.add_argument("--layers", nargs="+", type=int, default=[], help="transformer layers that do; all by default")
    parser.add_argument("--private", action="store_true", help="DP-SGD by Opacus")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-flower", action="store_true", help="a plain loop over the clients")
    how.add_argument("--cache-model", action="store_true", help="Flower's workers keep their model")
    return parser.parse_args(arguments)


def report(name: str, number: int, seconds: float, clients: Sequence[dict]) -> None:
    """Prints a round as one JSON line."""
    total = {key: sum(client[key] for client in clients) for key in ("tokens", "train_s", "load_s", "loss")}
    line = {
        "peer": name,
        "round": number,
        "round_s": round(seconds, 3),
        "load_s": round(total["load_s"], 3),
        "train_s": round(total["train_s"], 3),
        "loss": round(total["loss"] / len(clients), 4),
        "clients": len(clients),
        "tokens": int(total["tokens"]),
        "round_tok_s": round(total["tokens"] / seconds, 1),
        "train_tok_s": round(total["tokens"] / total["train_s"], 1),
        "rss_main_mb": round(peak_memory()),
        "rss_client_mb": round(max(client["rss_mb"] for client in clients)),
    }
    print(json.dumps(line), flush=True)


def run_loop(name: str, options: Options, clients: int, rounds: int) -> None:
    """Rounds without Flower: the clients one after the other, all on one model."""
    client = load_client(options)
    state = adapter_state(client)
    for number in range(rounds):
        start = time.perf_counter()
        results = [train_client(client, options, state, client_id) for client_id in range(clients)]
        total = sum(figures["num-examples"] for _, figures in results)
        weighed = [(figures["num-examples"] / total, new) for new, figures in results]
        state = {key: sum(weight * new[key] for weight, new in weighed) for key in state}
        report(name, number, time.perf_counter() - start, [{**figures, "load_s": 0.0} for _, figures in results])


def run_flower(name: str, options: Options, clients: int, rounds: int, cache: bool) -> None:
    """Rounds by Flower's simulation engine: one Ray actor for each `options.threads` cores."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        start = time.perf_counter()
        client = (cached_client if cache else load_client)(options)
        load_s = time.perf_counter() - start
        state, number = message.content["arrays"].to_torch_state_dict(), int(context.node_config["partition-id"])
        state, figures = train_client(client, options, state, number)
        metrics = MetricRecord({**figures, "load_s": load_s})
        content = RecordDict({"arrays": ArrayRecord(OrderedDict(state)), "metrics": metrics})
        return Message(content=content, reply_to=message)

    class TimedFedAvg(FedAvg):
        """FedAvg that reports each round: from handing out the adapters until their mean is taken."""

        def configure_train(self, *arguments, **named) -> Iterable[Message]:
            self.start = time.perf_counter()
            return super().configure_train(*arguments, **named)

        def aggregate_train(self, server_round: int, replies: Iterable[Message]):
            replies = list(replies)
            failed = [str(reply.error) for reply in replies if not reply.has_content()]
            if failed:  # a round with fewer clients would pass for a fast one
                raise RuntimeError(f"{len(failed)} of {len(replies)} clients failed: {failed[0]}")
            mean = super().aggregate_train(server_round, replies)
            seconds = time.perf_counter() - self.start
            report(name, server_round - 1, seconds, [reply.content["metrics"] for reply in replies])
            return mean

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = TimedFedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        initial = ArrayRecord(OrderedDict(adapter_state(load_client(options))))
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)

    backend = {
        "client_resources": {"num_cpus": options.threads, "num_gpus": 0.0},
        "init_args": {"num_cpus": max(len(os.sched_getaffinity(0)), options.threads)},
    }
    run_simulation(server_app=server_app, client_app=client_app, num_supernodes=clients, backend_config=backend)


def main(arguments: Sequence[str] | None = None) -> None:
    """Times the peer that the command line names."""
    chosen = parse_arguments(arguments)
    options = Options(
        model=os.path.abspath(chosen.model),
        examples=os.path.abspath(chosen.examples),
        steps=chosen.steps,
        targets=tuple(chosen.targets),
        layers=tuple(chosen.layers),
        threads=chosen.threads,
        private=chosen.private,
    )
    runner = "no-flower" if chosen.no_flower else "flower+cache" if chosen.cache_model else "flower"
    name = f"{runner}+peft" + ("+opacus" if chosen.private else "")
    clients = len(read_examples(options.examples))
    if chosen.no_flower:
        run_loop(name, options, clients, chosen.rounds)
    else:
        run_flower(name, options, clients, chosen.rounds, chosen.cache_model)


if __name__ == "__main__":
    main()
