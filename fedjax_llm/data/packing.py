"""Rows of many clients packed into few static shapes, with little padding and nothing truncated.

A client's steps must follow one another, but clients need not keep step with each other: every row carries its own
client's adapters. So the packer fills each microbatch from whatever rows are ready, whoever they belong to; a client's
next step becomes ready when the microbatch with the last row of its step is done.

On a mesh of devices a microbatch is cut into bins, one for each device that holds rows. Every device has client slots
of its own, and what a bin's arrays count (rows, units) is counted within it, so that no device needs another's rows.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedjax_llm.data.records import EncodedExample
from fedjax_llm.data.shared_rows import SharedRow, shared_rows, target_count

_MULTIPLE = 8
"""Row lengths are multiples of this: a vector register's width, and fewer distinct shapes."""


class Shape(NamedTuple):
    """The static shape of a microbatch: M rows of L tokens with K target slots."""

    rows: int
    length: int
    targets: int


@dataclass(frozen=True)
class Bins:
    """How a microbatch is cut into equal bins, one after the other.

    Attributes:
      groups: of client slots: slots [C] fall into so many equal parts, each with bins of its own.
      each: bins of a group.
    """

    groups: int = 1
    each: int = 1

    @property
    def count(self) -> int:
        """Bins of a microbatch."""
        return self.groups * self.each


ONE_BIN = Bins()


@dataclass(frozen=True)
class Microbatch:
    """What the device gets at a time (NumPy here), and who has finished a step after it.

    Attributes:
      tokens: int32 [M, L], padded on the right.
      client: int32 [M], the slot of the row's client; padding rows have slot 0 and no targets.
      step: int32 [M], the row's local step.
      index: int32 [M], the row's place in its step's batch.
      unit: int32 [M], the number within its bin of the privacy unit that the row belongs to; padding rows have the last
        number of a bin of so many rows, which no unit has where there is padding.
      rows: what each of the first rows holds, with an empty example where a bin before the last is not full; the rest
        are padding.
      target_row: int32 [K], the row of a target slot, within its bin.
      target_position: int32 [K], the position whose hidden state predicts it.
      target_token: int32 [K].
      target_weight: f32 [K]; zero in empty slots.
      finished: bool [C], clients whose step is complete with this microbatch.
      denominator: f32 [C], what a finished step's summed gradient is divided by; 1 elsewhere.
      finished_step: int32 [C], which step that was; 0 elsewhere.
      real_tokens: of all examples; what several begin with counts for each.
      position: int32 [M, L], the position of each token in its example; ``None``: that in the row.
      branch: int32 [M, L], the example's number in the row, and -1 for what a row's examples share and in padding;
        ``None``: every row has one example.
    """

    tokens: np.ndarray
    client: np.ndarray
    step: np.ndarray
    index: np.ndarray
    unit: np.ndarray
    rows: tuple[SharedRow, ...]
    target_row: np.ndarray
    target_position: np.ndarray
    target_token: np.ndarray
    target_weight: np.ndarray
    finished: np.ndarray
    denominator: np.ndarray
    finished_step: np.ndarray
    real_tokens: int
    position: np.ndarray | None = None
    branch: np.ndarray | None = None

    @property
    def examples(self) -> tuple[EncodedExample, ...]:
        """Of all rows, one after the other."""
        return tuple(example for row in self.rows for example in row.examples)


Unit = EncodedExample | tuple[EncodedExample, ...]
"""What is packed as a whole: an example, or the examples of one privacy unit, whose gradient is bounded together."""
_NOTHING = EncodedExample("", np.zeros(1, np.int32), 1)
"""The one row of a step without examples: it has no target, so its loss and its gradient are zero."""


class _Group(NamedTuple):
    """Rows of a client's step that wait to be packed into one microbatch: those of a unit, or one that units share."""

    client: int
    step: int
    index: int
    rows: tuple[SharedRow, ...]
    unit_size: int = 1

    @property
    def length(self) -> int:
        """Of its longest row."""
        return max(row.length for row in self.rows)


class _Row(NamedTuple):
    """A row of a bin: what it holds, the unit's number in the bin, the unit, and the row's place in it."""

    held: SharedRow
    number: int
    group: _Group
    place: int


def choose_shapes(
    examples: Sequence[EncodedExample | SharedRow],
    *,
    tokens_per_microbatch: int,
    buckets: int,
    rows_of_unit: int = 1,
    bins: int = 1,
) -> tuple[Shape, ...]:
    """A few shapes, cut from the data's own lengths so that padding is least.

    Args:
      examples: those that may have to be packed, or rows of them; the longest must fit.
      tokens_per_microbatch: M * L of every shape, about, in each bin; it bounds the memory of a training step.
      buckets: how many shapes at most. Each one is compiled once.
      rows_of_unit: how many rows must fit together, whatever the memory.
      bins: of every microbatch.

    Returns:
      Shapes of increasing length. Each has target slots for somewhat more than its rows have on average.

    Examples:
      >>> texts = [EncodedExample(str(length), np.zeros(length, np.int32), length - 8) for length in (20, 24, 100)]
      >>> [(shape.rows, shape.length) for shape in choose_shapes(texts, tokens_per_microbatch=256, buckets=2)]
      [(11, 24), (2, 104)]
    """
    likely = [one if isinstance(one, SharedRow) else SharedRow((one,)) for one in examples]
    lengths = np.array([_round_up(row.length) for row in likely])
    targets = np.array([row.targets for row in likely])
    edges = _least_padding(lengths, buckets)
    shapes, shorter = [], 0
    for edge in edges:
        inside = (lengths > shorter) & (lengths <= edge)
        rows = max(rows_of_unit, round(tokens_per_microbatch / edge))
        wanted = max(rows_of_unit * int(targets[lengths <= edge].max()), int(1.15 * rows * targets[inside].mean()))
        shapes.append(Shape(bins * rows, int(edge), bins * min(_round_up(wanted, 32), rows * int(edge))))
        shorter = edge
    return tuple(shapes)


def _round_up(value: int, multiple: int = _MULTIPLE) -> int:
    return -(-value // multiple) * multiple


def _least_padding(lengths: np.ndarray, buckets: int) -> list[int]:
    """Bucket edges that minimise the summed padding, by dynamic programming over the distinct lengths."""
    edges, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    n = len(edges)
    # cost[j]: least padded tokens of the first j lengths with the buckets so far; cuts[k][j]: where the last starts
    cost = np.concatenate([[0.0], np.full(n, np.inf)])
    cuts = []
    for _ in range(min(buckets, n)):
        # options[i, j]: the last bucket holds lengths i to j - 1, all padded to edges[j - 1]
        options = cost[:, None] + (before[None, :] - before[:, None]) * np.concatenate([[0], edges])[None, :]
        options[np.tril_indices(n + 1)] = np.inf
        cuts.append(options.argmin(axis=0))
        cost = options.min(axis=0)
    chosen, end = [], n
    for cut in reversed(cuts):
        chosen.append(int(edges[end - 1]))
        end = int(cut[end])
    return sorted(set(chosen))


def pack(
    work: Sequence[Sequence[Sequence[Unit]]],
    shapes: Sequence[Shape],
    *,
    clients: int,
    per_token: bool = False,
    denominators: Sequence[float] | None = None,
    bins: Bins = ONE_BIN,
    share: int = 0,
) -> Iterator[Microbatch]:
    """Packs every example of every step of every client, each exactly once.

    Args:
      work: ``work[c][s]`` are the units of step ``s`` of the client in slot ``c``: examples, or tuples of examples that
        stay in one microbatch and weigh as much as one example together. A step without any takes one empty row, so
        that it is finished like the others.
      shapes: from :func:`choose_shapes`; the longest must hold the longest example.
      clients: C, the number of slots.
      per_token: weigh every target token of a step alike (divide by the step's tokens), rather than every example
        alike (mean over an example's tokens, divide by the step's examples).
      denominators: what the summed gradients of each client's steps are divided by, in place of the realised batch.
      bins: of every microbatch; shapes and slots are multiples of them.
      share: tokens of a row in which several examples of a step may stand, where each is a unit; 0: none do.

    Yields:
      Microbatches, in the order in which they must be run.
    """
    waiting: list[list[_Group]] = [[] for _ in range(bins.groups)]
    left = np.zeros(clients, np.int64)  # rows of a client's open step that are not packed yet
    opened = np.zeros(clients, np.int64)  # the number of the open step

    def open_step(client: int, step: int) -> None:
        if step < len(work[client]):
            groups = _groups(client, step, work[client][step] or (_NOTHING,), share)
            waiting[client * bins.groups // clients] += groups
            left[client], opened[client] = len(groups), step

    for client in range(len(work)):
        open_step(client, 0)
    while any(waiting):
        shape, chosen = _next_groups(waiting, shapes, bins)
        taken = {id(group) for part in chosen for group in part}
        waiting = [[group for group in part if id(group) not in taken] for part in waiting]
        for group in itertools.chain(*chosen):
            left[group.client] -= 1
        done = sorted({group.client for group in itertools.chain(*chosen) if left[group.client] == 0})
        if denominators is None:
            divide = {c: _denominator(work[c][int(opened[c])], per_token) for c in done}
        else:
            divide = {c: denominators[c] for c in done}
        steps = {c: int(opened[c]) for c in done}
        yield _assemble(chosen, shape, clients, per_token, divide, steps, share > 0)
        for client in done:
            open_step(client, int(opened[client]) + 1)


def _groups(client: int, step: int, units: Sequence[Unit], share: int) -> list[_Group]:
    """What of a step must stay together: units, or shared rows of examples that are units."""
    alone = [unit for unit in units if isinstance(unit, EncodedExample)]
    if share and len(alone) == len(units):
        return [_Group(client, step, place, (row,)) for place, row in enumerate(shared_rows(alone, share))]
    found, index = [], 0
    for unit in units:
        own = unit if isinstance(unit, tuple) else (unit,)
        found.append(_Group(client, step, index, tuple(SharedRow((one,)) for one in own), len(own)))
        index += len(own)
    return found


def _denominator(units: Sequence[Unit], per_token: bool) -> float:
    """What a step's summed gradient is divided by: its units, or its target tokens."""
    if not per_token:
        return float(max(len(units), 1))
    return float(sum(target_count(one) for unit in units for one in (unit if isinstance(unit, tuple) else (unit,))))


def _next_groups(
    waiting: Sequence[Sequence[_Group]], shapes: Sequence[Shape], bins: Bins
) -> tuple[Shape, list[list[_Group]]]:
    """The shape that the waiting rows fill best, and the rows of every bin: long ones wait until there are enough."""
    ordered = [
        sorted(part, key=lambda group: (-group.length, group.step, group.client, group.index)) for part in waiting
    ]

    def filled(option: tuple[Shape, list[list[_Group]]]) -> float:
        shape, parts = option
        groups = itertools.chain(*parts)
        return sum(row.length for group in groups for row in group.rows) / (shape.rows * shape.length)

    options = [(shape, [one for part in ordered for one in _fill(part, shape, bins)]) for shape in shapes]
    shape, chosen = max(options, key=filled)
    assert any(chosen), "the longest shape holds every unit"
    return shape, chosen


def _fill(ordered: Sequence[_Group], shape: Shape, bins: Bins) -> list[list[_Group]]:
    """The longest waiting units that fit a group's bins of a shape, within rows and target slots of each."""
    chosen: list[list[_Group]] = [[] for _ in range(bins.each)]
    slots = [shape.targets // bins.count] * bins.each
    rows = [shape.rows // bins.count] * bins.each
    for group in ordered:
        wanted = sum(row.targets for row in group.rows)
        for place in range(bins.each):
            if len(group.rows) <= rows[place] and group.length <= shape.length and wanted <= slots[place]:
                chosen[place].append(group)
                slots[place] -= wanted
                rows[place] -= len(group.rows)
                break
    return chosen


def _assemble(
    chosen: Sequence[Sequence[_Group]],
    shape: Shape,
    clients: int,
    per_token: bool,
    denominators: dict[int, float],
    steps: dict[int, int],
    shared: bool,
) -> Microbatch:
    """Lays rows out as arrays, bin after bin."""
    bins = len(chosen)
    filled = [[_Row(one, number, group, place) for number, group in enumerate(groups)
               for place, one in enumerate(group.rows)] for groups in chosen]  # fmt: skip
    size = Shape(shape.rows // bins, shape.length, shape.targets // bins)
    parts = [_lay_out(rows, size, per_token) for rows in filled]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not shared:
        del arrays["position"], arrays["branch"]
    finished, denominator = np.zeros(clients, bool), np.ones(clients, np.float32)
    finished_step = np.zeros(clients, np.int32)
    for c, value in denominators.items():
        finished[c], denominator[c], finished_step[c] = True, value, steps[c]
    held: list[SharedRow] = []
    for place, rows in enumerate(filled):  # nothing where the bins before end early
        held += [SharedRow((_NOTHING,))] * (place * size.rows - len(held)) + [row.held for row in rows]
    return Microbatch(
        **arrays,
        rows=tuple(held),
        finished=finished,
        denominator=denominator,
        finished_step=finished_step,
        real_tokens=sum(len(one.tokens) for row in held for one in row.examples if one is not _NOTHING),
    )


def _lay_out(rows: Sequence[_Row], shape: Shape, per_token: bool) -> dict[str, np.ndarray]:
    """The arrays of one bin."""
    tokens = np.zeros((shape.rows, shape.length), np.int32)
    at, branch = np.zeros_like(tokens), np.full_like(tokens, -1)
    client, step, index = (np.zeros(shape.rows, np.int32) for _ in range(3))
    unit = np.full(shape.rows, shape.rows - 1, np.int32)
    target_row, position, token = (np.zeros(shape.targets, np.int32) for _ in range(3))
    weight = np.zeros(shape.targets, np.float32)
    slot = 0
    for m, (held, number, group, place) in enumerate(rows):
        client[m], step[m], index[m], unit[m] = group.client, group.step, group.index + place, number
        for branching, (example, right) in enumerate(held.placed()):
            count, length = target_count(example), len(example.tokens)
            own = slice(right + (held.shared if branching else 0), right + length)
            tokens[m, own] = example.tokens[own.start - right :]
            at[m, own], branch[m, own] = np.arange(own.start - right, length), branching
            taken = slice(slot, slot + count)
            target_row[taken], token[taken] = m, example.tokens[length - count :]
            position[taken] = np.arange(length - count - 1, length - 1) + right
            weight[taken] = 1.0 if per_token else 1.0 / (max(count, 1) * group.unit_size)
            slot += count
        branch[m, : held.shared] = -1
    return {
        "tokens": tokens, "client": client, "step": step, "index": index, "unit": unit, "target_row": target_row,
        "target_position": position, "target_token": token, "target_weight": weight, "position": at, "branch": branch,
    }  # fmt: skip
