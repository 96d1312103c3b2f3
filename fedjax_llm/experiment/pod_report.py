"""Whether a round fits a TPU slice, what its chips send each other, and how long it should take: compiled, not run.

Times are rooflines (Williams et al. 2009): what arithmetic, memory and links would each take at the rates of the
maker's data sheet. The longest of the three is what it takes if they overlap perfectly. Bytes of memory are as the
compiler counts them, which takes some traffic within the chip for traffic with its memory; links are taken as if all
of a chip's worked for one exchange.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from fedjax_llm.config import Experiment
from fedjax_llm.experiment import collectives, pod
from fedjax_llm.experiment.pod import Pod, Program
from fedjax_llm.experiment.tpu_topology import Chip, chip_of, chips_in, devices_of

_ROOM = 0.95
"""Of a chip's memory, what a program can have; the rest is the runtime's."""
_ARGUMENTS = 0.7
"""Of a chip's memory, what weights and clients may take for a compilation to be worth its while."""
_DEPTHS = (8, 16)
"""Layers that are compiled where all of them take too long. Shallower models would mislead: their peak of memory is
at the output layer, that of deep ones at what the backward pass keeps."""
_MOST = 32
"""Layers that are compiled at most."""
SPARING = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false"}
"""The compiler's options where a round does not fit otherwise. For v5e it copies parts of the large matrices before the
first layer, so as to gather while it multiplies, and keeps the copies until the backward pass is through."""


class Roofline(NamedTuple):
    """Seconds of a program at a chip's peak rates, by what limits it."""

    arithmetic: float
    memory: float
    links: float

    @property
    def least(self) -> float:
        """Where all three overlap."""
        return max(self)


@dataclass(frozen=True)
class Planned:
    """A model's round on a slice.

    Attributes:
      model: its name.
      topology: the slice.
      mesh: devices over clients, fsdp, tensor.
      compiled_layers: how many layers were compiled; those of other depths were extrapolated.
      layers: of the model.
      weights, clients, temporaries: bytes on a chip.
      memory: of a chip, bytes.
      fits: whether they do.
      microbatch: rows and tokens of a row, over all chips.
      flops: of a microbatch on a chip.
      exchanges: (kind, axes, count, bytes) of each program of the round.
      step: the roofline of a microbatch.
      round: seconds of a round at least, with
      tokens_per_second: at most.
      compile_seconds: that compiling took.
      options: what the compiler has to be told for it (``SPARING``); empty where nothing.
    """

    model: str
    topology: str
    mesh: tuple[int, int, int]
    compiled_layers: tuple[int, ...]
    layers: int
    weights: int
    clients: int
    temporaries: int
    memory: int
    fits: bool
    microbatch: tuple[int, int]
    flops: float
    exchanges: dict[str, list[tuple[str, str, int, int]]]
    step: Roofline
    round: float
    tokens_per_second: float
    compile_seconds: float
    options: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"step": self.step._asdict()}


def planned(experiment: Experiment, topology: str) -> Planned:
    """Compiles a round for a slice, all layers of it.

    Args:
      experiment: see :func:`pod.pod_of`.
      topology: such as ``v5e:4x4``.

    Raises:
      UserError: the slice, the mesh or the model is not known or does not fit.
    """
    sized = pod.on(experiment, chips_in(topology))
    one = pod.pod_of(sized, devices_of(topology))
    return _whole(sized, topology, one)


def shortened(experiment: Experiment, topology: str) -> Planned | None:
    """The same in minutes: models of very many layers are extrapolated from two of the same width and fewer layers.

    Returns:
      What it takes; ``None`` where the weights alone leave too little room, which no compiler has to be asked.

    Raises:
      UserError: as above.
    """
    sized = pod.on(experiment, chips_in(topology))
    devices = devices_of(topology)
    full = pod.pod_of(sized, devices)
    layers = full.trainer.model.config.layers
    if sum(pod.argument_bytes(full).values()) > _ARGUMENTS * chip_of(topology).memory:
        return None
    if layers <= _MOST:
        return _whole(sized, topology, full)
    shallow = [pod.pod_of(sized, devices, layers) for layers in _DEPTHS]
    more = (layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])

    def extrapolated(options: Mapping[str, str]) -> Planned:
        first, second = (pod.compiled(one, options) for one in shallow)
        programs = [_between(a, b, more) for a, b in zip(first, second, strict=True)]
        return _summary(sized, topology, full, programs, _DEPTHS, options)

    return _fitting(extrapolated)


def _whole(experiment: Experiment, topology: str, one: Pod) -> Planned:
    """With all layers compiled."""
    depth = (one.trainer.model.config.layers,)
    return _fitting(lambda told: _summary(experiment, topology, one, pod.compiled(one, told), depth, told))


def _fitting(compiled: Callable[[Mapping[str, str]], Planned]) -> Planned:
    """As the compiler does it by itself, where that fits; else as it does when it is told to spare memory."""
    found = compiled({})
    return found if found.fits else compiled(SPARING)


def elsewhere(found: Planned, topology: str) -> Planned:
    """The same programs on a larger slice of the same chips: there are more groups of clients, and each does the same.

    Only the sum at a round's end is spread over more devices; its share of a round is kept as it is.
    """
    groups = chips_in(topology) // (found.mesh[1] * found.mesh[2])
    assert chip_of(topology).memory == found.memory, "the same chips"
    return replace(
        found,
        topology=topology,
        mesh=(groups, *found.mesh[1:]),
        microbatch=(found.microbatch[0] * groups // found.mesh[0], found.microbatch[1]),
        tokens_per_second=found.tokens_per_second * groups / found.mesh[0],
    )


def _between(one: Program, other: Program, more: float) -> Program:
    """A program at a depth that was not compiled."""

    def at(a: float, b: float) -> float:
        return a + more * (b - a)

    kinds = set(one.exchanges) | set(other.exchanges)
    exchanges = type(one.exchanges)()
    sizes: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for kind in kinds:
        counts = one.exchanges[kind], other.exchanges[kind]
        if counts[0] and counts[1]:  # the same arrays, more often
            exchanges[kind] = round(at(*counts))
        else:  # arrays that grow with the depth
            for place, count in enumerate(counts):
                sizes.setdefault((kind.kind, kind.axes), [0.0, 0.0])[place] += count * kind.size
    for (kind, axes), (a, b) in sizes.items():
        exchanges[collectives.Collective(kind, axes, round(at(a, b)))] += 1
    return Program(
        name=one.name,
        arguments=round(at(one.arguments, other.arguments)),
        temporaries=round(at(one.temporaries, other.temporaries)),
        exchanges=exchanges,
        accessed=at(one.accessed, other.accessed),
        seconds=one.seconds + other.seconds,
    )


def _summary(
    experiment: Experiment,
    topology: str,
    one: Pod,
    programs: list[Program],
    compiled: tuple[int, ...],
    options: Mapping[str, str],
) -> Planned:
    """From programs to what they would take."""
    chip, mesh, held = chip_of(topology), one.trainer.mesh, pod.argument_bytes(one)
    assert mesh is not None
    flops = pod.training_flops(one)
    rooflines = [_roofline(chip, program, mesh, flops if program is programs[0] else 0.0) for program in programs]
    temporaries = max(program.temporaries for program in programs)
    rows, length = one.rows.tokens.shape
    local = experiment.training
    microbatches = math.ceil(one.slots * local.local_steps * local.batch_size / rows)
    seconds = microbatches * rooflines[0].least + local.local_steps * rooflines[1].least + rooflines[2].least
    used = held["weights"] + held["clients"] + temporaries
    return Planned(
        model=experiment.model.name,
        topology=topology,
        mesh=(mesh.shape["clients"], mesh.shape["fsdp"], mesh.shape["tensor"]),
        compiled_layers=compiled,
        layers=one.trainer.model.config.layers,
        weights=held["weights"],
        clients=held["clients"],
        temporaries=temporaries,
        memory=int(chip.memory),
        fits=used <= _ROOM * chip.memory,
        microbatch=(rows, length),
        flops=flops,
        exchanges={program.name: list(collectives.in_rows(program.exchanges)) for program in programs},
        step=rooflines[0],
        round=seconds,
        tokens_per_second=microbatches * rows * length / seconds,
        compile_seconds=sum(program.seconds for program in programs),
        options=options,
    )


def _roofline(chip: Chip, program: Program, mesh: Any, flops: float) -> Roofline:
    """What a program would take."""
    links = collectives.seconds(program.exchanges, mesh, chip.links)
    return Roofline(flops / chip.flops, program.accessed / chip.bandwidth, links)
