"""The part of ``experiments.plan`` that compiles for TPU slices."""

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from fedjax_llm.config import Experiment
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.pod import on
from fedjax_llm.experiment.pod_report import Planned, elsewhere, planned, shortened
from fedjax_llm.experiment.tpu_topology import chips_in, devices_of
from fedjax_llm.runs.progress import byte_size, duration, settings_table

SLICES = {
    "v5e": ("v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    "v5p": ("v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8"),
    "v6e": ("v6e:2x4", "v6e:4x4", "v6e:8x8", "v6e:16x16"),
}
"""8, 16, 64 and 256 chips of every kind."""
_SMALLEST = {"smollm2-135m-instruct": 1, "meta-llama/Llama-3.2-1B": 1}
"""How many chips a model's weights are spread over at least; 4, if not given."""


def show_topology(experiment: Experiment, topology: str, as_json: bool, console: Console) -> None:
    """Prints what a round takes on a slice, or on all of them."""
    if as_json:
        console = Console(stderr=True)
    if topology == "all":
        every = everywhere(experiment, console)
        if as_json:
            print("".join(json.dumps(one.to_json()) + "\n" for one in every), end="")
            return
        console.print(_table(every))
        for environment in sorted({told_to_compiler(one.options) for one in every if one.options}):
            console.print(f"*: run with {environment}", soft_wrap=True)
        return
    devices_of(topology)  # what is wrong with it is told at once
    with console.status(f"Compiling for {topology}: minutes for many layers ..."):
        found = planned(experiment, topology)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    console.print(settings_table(_rows(found), title=f"Compiled for {topology}, not run"))


def everywhere(experiment: Experiment, console: Console) -> list[Planned]:
    """The model on every slice, its weights over as few chips as hold them."""
    found, tensor = [], experiment.execution.mesh.tensor
    for kind, slices in SLICES.items():
        for fsdp in (2**n for n in range(9)):
            if fsdp < _SMALLEST.get(experiment.model.name, 4):
                continue
            smallest = next((one for one in slices if chips_in(one) >= max(2, fsdp * tensor)), None)
            if smallest is None:
                continue
            spread = on(experiment, chips_in(smallest), fsdp)
            with console.status(f"Compiling {experiment.model.name} for {smallest}, over {fsdp} chips ..."):
                try:
                    first = shortened(spread, smallest)
                except UserError as error:
                    console.print(f"{experiment.model.name}, {smallest}: {error}")
                    break
            if first is not None and first.fits:
                larger = slices[slices.index(smallest) :]
                found += [first if one == smallest else elsewhere(first, one) for one in larger]
                break
        else:
            console.print(f"{experiment.model.name} does not fit any slice of {kind}.")
    return found


def _rows(one: Planned) -> list[tuple[str, str]]:
    """What there is to say of one slice."""
    used, step = one.weights + one.clients + one.temporaries, one.step
    rows = [
        ("model", f"{one.model}, {one.layers} layers"),
        ("mesh", f"clients {one.mesh[0]} x fsdp {one.mesh[1]} x tensor {one.mesh[2]}"),
        ("microbatch", f"{one.microbatch[0]} rows x {one.microbatch[1]} tokens"),
        ("memory of a chip", f"{byte_size(used)} of {byte_size(one.memory)}: {'fits' if one.fits else 'DOES NOT FIT'}"),
        ("  base weights", byte_size(one.weights)),
        ("  clients' adapters and optimisers", byte_size(one.clients)),
        ("  temporaries", byte_size(one.temporaries)),
        ("operations of a microbatch", f"{one.flops / 1e12:,.2f} TFLOP a chip"),
    ]
    for program, exchanges in one.exchanges.items():
        for kind, axes, count, size in exchanges:
            rows.append((f"{program}: {kind} over {axes}", f"{count} times, {byte_size(size)} in all"))
    limits = f"arithmetic {step.arithmetic:.3f}, memory {step.memory:.3f}, links {step.links:.3f} s"
    return [
        *rows,
        ("a microbatch, at least", f"{step.least:.3f} s ({limits})"),
        ("a round, at least", duration(one.round)),
        ("tokens a second, at most", f"{one.tokens_per_second:,.0f}"),
        ("compiled in", duration(one.compile_seconds)),
        *([("to be run with", told_to_compiler(one.options))] if one.options else []),
    ]


def told_to_compiler(options: Mapping[str, str]) -> str:
    """The environment in which a run's programs are compiled with these options."""
    return "LIBTPU_INIT_ARGS=" + " ".join(f"--{name}={value}" for name, value in options.items())


def _table(every: Sequence[Planned]) -> Table:
    """A row for each slice."""
    table = Table(title="Compiled, not run; what it takes and does at most")
    for name in ("model", "slice", "clients x fsdp", "weights", "clients", "temporaries", "of", "step, s", "tokens/s"):
        table.add_column(name, justify="left" if name in ("model", "slice") else "right")
    for one in every:
        table.add_row(*_row(one))
    return table


def _row(one: Planned) -> list[str]:
    """A slice in the table."""
    sizes = [byte_size(size) for size in (one.weights, one.clients, one.temporaries, one.memory)]
    mesh = f"{one.mesh[0]} x {one.mesh[1]}"
    slice_ = one.topology + "*" * bool(one.options)
    return [one.model, slice_, mesh, *sizes, f"{one.step.least:.3f}", f"{one.tokens_per_second:,.0f}"]
