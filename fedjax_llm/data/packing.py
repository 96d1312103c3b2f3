"""Rows of many clients packed into few static shapes, with little padding and nothing truncated.

A client's steps must follow one another, but clients need not keep step with each other: every row carries its own
client's adapters. So the packer fills each microbatch from whatever rows are ready, whoever they belong to; a client's
next step becomes ready when the microbatch with the last row of its step is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedjax_llm.data.records import EncodedExample

_MULTIPLE = 8
"""Row lengths are multiples of this: a vector register's width, and fewer distinct shapes."""


class Shape(NamedTuple):
    """The static shape of a microbatch: M rows of L tokens with K target slots."""

    rows: int
    length: int
    targets: int


@dataclass(frozen=True)
class Microbatch:
    """What the device gets at a time (NumPy here), and who has finished a step after it.

    Attributes:
      tokens: int32 [M, L], padded on the right.
      client: int32 [M], the slot of the row's client; padding rows have slot 0 and no targets.
      step: int32 [M], the row's local step.
      index: int32 [M], the row's place in its step's batch.
      target_row: int32 [K], the row of a target slot.
      target_position: int32 [K], the position whose hidden state predicts it.
      target_token: int32 [K].
      target_weight: f32 [K]; zero in empty slots.
      finished: bool [C], clients whose step is complete with this microbatch.
      denominator: f32 [C], what a finished step's summed gradient is divided by; 1 elsewhere.
      finished_step: int32 [C], which step that was; 0 elsewhere.
      real_tokens: how many tokens are not padding.
    """

    tokens: np.ndarray
    client: np.ndarray
    step: np.ndarray
    index: np.ndarray
    target_row: np.ndarray
    target_position: np.ndarray
    target_token: np.ndarray
    target_weight: np.ndarray
    finished: np.ndarray
    denominator: np.ndarray
    finished_step: np.ndarray
    real_tokens: int


class _Row(NamedTuple):
    """One (client, example) pair that waits to be packed."""

    client: int
    step: int
    index: int
    example: EncodedExample


def target_count(example: EncodedExample) -> int:
    """How many of an example's tokens are predicted: all of the answer, but never the first token of all."""
    return len(example.tokens) - max(example.prompt_length, 1)


def choose_shapes(examples: Sequence[EncodedExample], *, tokens_per_microbatch: int, buckets: int) -> tuple[Shape, ...]:
    """A few shapes, cut from the data's own lengths so that padding is least.

    Args:
      examples: those that may have to be packed; the longest of them must fit.
      tokens_per_microbatch: M * L of every shape, about; it bounds the memory of a training step.
      buckets: how many shapes at most. Each one is compiled once.

    Returns:
      Shapes of increasing length. Each has target slots for somewhat more than its rows have on average.
    """
    lengths = np.array([_round_up(len(example.tokens)) for example in examples])
    targets = np.array([target_count(example) for example in examples])
    edges = _least_padding(lengths, buckets)
    shapes, shorter = [], 0
    for edge in edges:
        inside = (lengths > shorter) & (lengths <= edge)
        rows = max(1, round(tokens_per_microbatch / edge))
        wanted = max(int(targets[lengths <= edge].max()), int(1.15 * rows * targets[inside].mean()))
        shapes.append(Shape(rows, int(edge), min(_round_up(wanted, 32), rows * int(edge))))
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
    work: Sequence[Sequence[Sequence[EncodedExample]]],
    shapes: Sequence[Shape],
    *,
    clients: int,
    per_token: bool = False,
) -> Iterator[Microbatch]:
    """Packs every example of every step of every client, each exactly once.

    Args:
      work: ``work[c][s]`` are the examples of step ``s`` of the client in slot ``c``. A step must not be empty.
      shapes: from :func:`choose_shapes`; the longest must hold the longest example.
      clients: C, the number of slots.
      per_token: weigh every target token of a step alike (divide by the step's tokens), rather than every example
        alike (mean over an example's tokens, divide by the step's examples).

    Yields:
      Microbatches, in the order in which they must be run.
    """
    waiting: list[_Row] = []
    left = np.zeros(clients, np.int64)  # rows of a client's open step that are not packed yet
    opened = np.zeros(clients, np.int64)  # the number of the open step

    def open_step(client: int, step: int) -> None:
        if step < len(work[client]):
            examples = work[client][step]
            waiting.extend(_Row(client, step, index, example) for index, example in enumerate(examples))
            left[client], opened[client] = len(examples), step

    for client in range(len(work)):
        open_step(client, 0)
    while waiting:
        shape, chosen = _next_rows(waiting, shapes)
        for row in chosen:
            waiting.remove(row)
            left[row.client] -= 1
        done = sorted({row.client for row in chosen if left[row.client] == 0})
        divide = {c: _denominator(work[c][int(opened[c])], per_token) for c in done}
        yield _assemble(chosen, shape, clients, per_token, divide, {c: int(opened[c]) for c in done})
        for client in done:
            open_step(client, int(opened[client]) + 1)


def _denominator(examples: Sequence[EncodedExample], per_token: bool) -> float:
    """What a step's summed gradient is divided by."""
    return float(sum(map(target_count, examples)) if per_token else len(examples))


def _next_rows(waiting: Sequence[_Row], shapes: Sequence[Shape]) -> tuple[Shape, list[_Row]]:
    """The shape that the waiting rows fill best, and the rows: long ones wait until there are enough of them."""
    ordered = sorted(waiting, key=lambda row: (-len(row.example.tokens), row.step, row.client, row.index))

    def filled(option: tuple[Shape, list[_Row]]) -> float:
        shape, rows = option
        return sum(len(row.example.tokens) for row in rows) / (shape.rows * shape.length)

    shape, rows = max(((shape, _fill(ordered, shape)) for shape in shapes), key=filled)
    assert rows, "the longest shape holds every row"
    return shape, rows


def _fill(ordered: Sequence[_Row], shape: Shape) -> list[_Row]:
    """The longest waiting rows that fit a shape, within its rows and its target slots."""
    chosen, slots = [], shape.targets
    for row in ordered:
        wanted = target_count(row.example)
        if len(chosen) < shape.rows and len(row.example.tokens) <= shape.length and wanted <= slots:
            chosen.append(row)
            slots -= wanted
    return chosen


def _assemble(
    rows: Sequence[_Row],
    shape: Shape,
    clients: int,
    per_token: bool,
    denominators: dict[int, float],
    steps: dict[int, int],
) -> Microbatch:
    """Lays rows out as arrays."""
    tokens = np.zeros((shape.rows, shape.length), np.int32)
    client, step, index = (np.zeros(shape.rows, np.int32) for _ in range(3))
    target_row, position, token = (np.zeros(shape.targets, np.int32) for _ in range(3))
    weight = np.zeros(shape.targets, np.float32)
    slot = 0
    for m, row in enumerate(rows):
        example, count = row.example, target_count(row.example)
        tokens[m, : len(example.tokens)] = example.tokens
        client[m], step[m], index[m] = row.client, row.step, row.index
        taken = slice(slot, slot + count)
        first = len(example.tokens) - count
        target_row[taken], token[taken] = m, example.tokens[first:]
        position[taken] = np.arange(first - 1, len(example.tokens) - 1)
        weight[taken] = 1.0 if per_token else 1.0 / max(count, 1)
        slot += count
    finished, denominator = np.zeros(clients, bool), np.ones(clients, np.float32)
    finished_step = np.zeros(clients, np.int32)
    for c, value in denominators.items():
        finished[c], denominator[c], finished_step[c] = True, value, steps[c]
    return Microbatch(
        tokens, client, step, index, target_row, position, token, weight, finished, denominator, finished_step,
        real_tokens=sum(len(row.example.tokens) for row in rows),
    )  # fmt: skip
