"""What devices send each other in a compiled program, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(
    rf"%(?P<name>[\w.-]+) = (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<rest>.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"(?P<type>pred|[a-z]+\d+\w*)\[(?P<sizes>[\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?P<groups>\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](T\([\d,]+\))?)")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>\{.*?\})\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')


class Collective(NamedTuple):
    """A kind of exchange.

    Attributes:
      kind: ``all-gather``, ``all-reduce``, ...
      axes: of the mesh, along which the devices of a group differ.
      size: bytes of its result on one device.
    """

    kind: str
    axes: tuple[str, ...]
    size: int


def collectives(text: str, mesh: Mesh) -> Counter[Collective]:
    """How often a program has each kind of exchange.

    An exchange that the compiler has spread over several fusions, so that it overlaps with computing, counts once.

    Args:
      text: of the optimised program (``Compiled.as_text``). Loops count once, as in the text.
      mesh: that it was compiled for.
    """
    found: Counter[Collective] = Counter()
    chains = set()
    for match in _INSTRUCTION.finditer(text):
        chain = _CHAIN.search(match["rest"])
        if chain is not None:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        axes = _axes(match["rest"], mesh)
        if axes:
            found[Collective(match["kind"], axes, _bytes(match["result"], match["kind"], bool(match["start"])))] += 1
    return found


def seconds(found: Mapping[Collective, int], mesh: Mesh, links: float) -> float:
    """How long exchanges take that nothing hides, by rings over all links of a chip.

    Args:
      found: from :func:`collectives`.
      mesh: of the program.
      links: bytes a second in and out of a chip.
    """
    total = 0.0
    for one, count in found.items():
        devices = math.prod(mesh.shape[axis] for axis in one.axes)
        total += count * one.size * _sent(one.kind, devices) / links
    return total


def _sent(kind: str, devices: int) -> float:
    """What a device of a ring sends, in sizes of the result."""
    if kind == "collective-permute":
        return 1.0
    if kind == "reduce-scatter":  # whose result is one of as many parts
        return devices - 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (devices - 1) / devices


def _axes(rest: str, mesh: Mesh) -> tuple[str, ...]:
    """The axes along which devices of a group differ, or a sender and who receives."""
    if pairs := _PAIRS.search(rest):
        groups = np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs["pairs"])])
    else:
        found = _GROUPS.search(rest)
        groups = np.arange(mesh.size)[None] if found is None else _first_group(found["groups"])[None]
    places = np.unravel_index(groups, mesh.devices.shape)
    return tuple(axis for axis, at in zip(mesh.axis_names, places, strict=True) if (at != at[:, :1]).any())


def _first_group(groups: str) -> np.ndarray:
    """Of ``{{0,1},{2,3}}`` or ``[2,2]<=[4]T(1,0)`` (an array of shape 4, transposed, in rows of 2)."""
    if groups.startswith("{"):
        return np.array(_numbers(groups[2:].split("}")[0]))
    shape, source = (_numbers(part) for part in re.findall(r"\[([\d,]+)\]", groups)[:2])
    ids = np.arange(math.prod(source)).reshape(source)
    if order := re.search(r"T\(([\d,]+)\)", groups):
        ids = ids.transpose(_numbers(order[1]))
    return ids.reshape(shape)[0]


def _numbers(text: str) -> list[int]:
    """``1,2`` as numbers."""
    return [int(word) for word in text.split(",")]


def _bytes(result: str, kind: str, start: bool) -> int:
    """Of the result's arrays; what begins an exchange lists its operands first, and may end with u32 scalars."""
    arrays = [(match["type"], match["sizes"]) for match in _ARRAY.finditer(result)]
    if start and kind != "all-reduce":
        arrays = [one for one in arrays if one != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_array_bytes(*one) for one in arrays)


def _array_bytes(kind: str, sizes: str) -> int:
    """Of one array."""
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(_numbers(sizes) if sizes else []) * bits // 8


def in_rows(found: Mapping[Collective, int]) -> Sequence[tuple[str, str, int, int]]:
    """(kind, axes, how many, bytes in all), the largest first."""
    totals: dict[tuple[str, str], list[int]] = {}
    for one, count in found.items():
        row = totals.setdefault((one.kind, " x ".join(one.axes)), [0, 0])
        row[0] += count
        row[1] += count * one.size
    rows = [(kind, axes, count, size) for (kind, axes), (count, size) in totals.items()]
    return sorted(rows, key=lambda row: -row[3])
