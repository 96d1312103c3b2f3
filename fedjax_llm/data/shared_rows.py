"""Rows that examples of one step share: what they begin with alike is computed once.

Chats begin with the same system prompt, and questions with the same words. Where the gradient of the whole batch is all
that is asked for, examples may stand side by side in one row after their common beginning, each blind to the others:
their hidden states, losses and summed gradient are those of rows of their own. It saves the beginning for all but the
first of a row, and the padding of short rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.data.records import EncodedExample


def target_count(example: EncodedExample) -> int:
    """How many of an example's tokens are predicted: all of the answer, but never the first token of all.

    Examples:
      >>> [target_count(EncodedExample("r1", np.arange(9), prompt_length)) for prompt_length in (5, 0)]
      [4, 8]
    """
    return len(example.tokens) - max(example.prompt_length, 1)


class SharedRow(NamedTuple):
    """What stands in a row.

    Attributes:
      examples: one, or several of a step.
      shared: with how many tokens all of them begin; they stand in the row once.
    """

    examples: tuple[EncodedExample, ...]
    shared: int = 0

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return self.shared + sum(len(example.tokens) - self.shared for example in self.examples)

    @property
    def targets(self) -> int:
        """Tokens that are predicted."""
        return sum(map(target_count, self.examples))

    def placed(self) -> Iterator[tuple[EncodedExample, int]]:
        """Each example, and how far to the right of its own position a token of it stands that is not shared."""
        end = self.shared
        for example in self.examples:
            yield example, end - self.shared
            end += len(example.tokens) - self.shared

    def and_also(self, example: EncodedExample) -> "SharedRow":
        """With one example more, and what it begins with as the others do.

        The last token of a prompt predicts the first of the answer, so it is never shared.
        """
        most = min(max(one.prompt_length, 1) - 1 for one in (self.examples[0], example))
        if len(self.examples) > 1:
            most = min(most, self.shared)
        differs = np.flatnonzero(self.examples[0].tokens[:most] != example.tokens[:most])
        return SharedRow((*self.examples, example), int(differs[0]) if len(differs) else most)


def tree_mask(branch: Any) -> Any:
    """Who sees whom in rows of branches, whatever the window: bool [M, L, L], of NumPy or JAX as the argument is.

    Args:
      branch: int [M, L], a number for each branch, and -1 in the part that all share, which stands first. What is
        padded on the right may have any.
    """
    every = branch.__array_namespace__().arange(branch.shape[1])
    earlier = every[None, :] <= every[:, None]
    related = (branch[:, None, :] == -1) | (branch[:, None, :] == branch[:, :, None])
    return earlier & related


def shared_rows(examples: Sequence[EncodedExample], longest: int) -> list[SharedRow]:
    """The examples of a batch in few rows: each goes, longest first, where it adds least.

    Args:
      examples: of one step of a client.
      longest: tokens of a row with several examples; one that is longer has a row of its own.

    Examples:
      >>> texts = [EncodedExample(str(n), np.array([7, 7, n, 9, 9]), 3) for n in range(3)]
      >>> [(row.length, row.shared) for row in shared_rows(texts, 8)]
      [(8, 2), (5, 0)]
    """
    rows: list[SharedRow] = []
    for example in sorted(examples, key=lambda one: -len(one.tokens)):
        wider = [(row.and_also(example), place) for place, row in enumerate(rows)]
        fitting = [(row.length - rows[place].length, place, row) for row, place in wider if row.length <= longest]
        if fitting:
            _, place, row = min(fitting, key=lambda option: option[:2])
            rows[place] = row
        else:
            rows.append(SharedRow((example,)))
    return rows


def likely_rows(clients: Sequence[Sequence[EncodedExample]], batch_size: int, longest: int) -> list[SharedRow]:
    """Rows as batches will make them, and one of all the tokens that a row may have, to cut shapes from.

    Args:
      clients: the examples of each.
      batch_size: of a step.
      longest: as for :func:`shared_rows`; 0: every example has a row of its own.
    """
    if not longest:
        return [SharedRow((example,)) for own in clients for example in own]
    found = []
    for own in clients:
        for first in range(0, len(own), batch_size):
            found += shared_rows(own[first : first + batch_size], longest)
    return [*found, SharedRow((EncodedExample("", np.zeros(longest, np.int32), 1),))]
