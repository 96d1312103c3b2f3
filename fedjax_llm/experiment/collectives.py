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
_ARRAY = re.compile(r"(?P<type>pred|[suf]\d+|bf16)\[(?P<sizes>[\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?P<groups>\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](T\([\d,]+\))?)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_BITS = {"pred": 8, "bf16": 16}


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
            found[Collective(match["kind"], axes, _bytes(match["result"], bool(match["start"])))] += 1
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
        passes = 2.0 if one.kind == "all-reduce" else 1.0
        total += count * passes * one.size * (devices - 1) / devices / links
    return total


def _axes(rest: str, mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the devices of the first group differ."""
    found = _GROUPS.search(rest)
    group = np.arange(mesh.size) if found is None else _first_group(found["groups"])
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return tuple(axis for axis, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1)


def _first_group(groups: str) -> np.ndarray:
    """Of ``{{0,1},{2,3}}`` or ``[2,2]<=[4]T(1,0)`` (an array of shape 4, transposed, in rows of 2)."""
    if groups.startswith("{"):
        first = groups[2:].split("}")[0]
        return np.array([int(word) for word in first.split(",") if word])
    shape, source = (_numbers(part) for part in re.findall(r"\[([\d,]+)\]", groups)[:2])
    ids = np.arange(math.prod(source)).reshape(source)
    if order := re.search(r"T\(([\d,]+)\)", groups):
        ids = ids.transpose(_numbers(order[1]))
    return ids.reshape(shape)[0]


def _numbers(text: str) -> list[int]:
    """``1,2`` as numbers."""
    return [int(word) for word in text.split(",")]


def _bytes(result: str, start: bool) -> int:
    """Of the result's arrays; what begins an exchange also lists its operands, of which the largest is the result."""
    sizes = [_array_bytes(match["type"], match["sizes"]) for match in _ARRAY.finditer(result)]
    return max(sizes, default=0) if start else sum(sizes)


def _array_bytes(kind: str, sizes: str) -> int:
    """Of one array."""
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind))
    return math.prod(_numbers(sizes)) * bits // 8 if sizes else bits // 8


def in_rows(found: Mapping[Collective, int]) -> Sequence[tuple[str, str, int, int]]:
    """(kind, axes, how many, bytes in all), the largest first."""
    totals: dict[tuple[str, str], list[int]] = {}
    for one, count in found.items():
        row = totals.setdefault((one.kind, " x ".join(one.axes)), [0, 0])
        row[0] += count
        row[1] += count * one.size
    rows = [(kind, axes, count, size) for (kind, axes), (count, size) in totals.items()]
    return sorted(rows, key=lambda row: -row[3])
