"""Multiple choice by the likelihood of the options: one row a question, with the options as branches of a tree.

The prompt stands in the row once and the options one after the other behind it. An option sees the prompt and itself,
and its positions go on from the prompt's, so that each is read as if it stood there alone.

An option's score is the mean log-likelihood of its tokens. The end of turn is left out: it says little about which
option is right, and where it is nearly certain it would raise the mean of short options.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fedjax_llm.data.chat import encode_example, with_system
from fedjax_llm.data.packing import Shape, pack
from fedjax_llm.data.records import ChoiceQuestion, EncodedExample, Example, Message
from fedjax_llm.data.shared_rows import tree_mask
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.heldout import slots
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.tokenizer import Tokenizer
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters, Params


@dataclass(frozen=True, eq=False)
class ChoiceRow:
    """A question as one row of tokens.

    Attributes:
      question: as it was asked.
      encoded: the prompt and all options, one after the other; everything behind the prompt is a target.
      branch: int32 [L], -1 in the prompt, else the number of the option.
      position: int32 [L], as if the option stood directly behind the prompt.
      parent: int32 [L], the slot of the token before: for an option's first, the prompt's last.
    """

    question: ChoiceQuestion
    encoded: EncodedExample
    branch: np.ndarray
    position: np.ndarray
    parent: np.ndarray


def lay_out(question: ChoiceQuestion, tokenizer: Tokenizer, system: str | None) -> ChoiceRow:
    """Encodes a question; each option as an answer is encoded for training, without its end of turn.

    Raises:
      UserError: an option has no token.
    """
    prompt, answers = np.zeros(0, np.int32), []
    for option in question.options:
        example = with_system(Example((*question.messages, Message("assistant", option))), system)
        encoded = encode_example(example, tokenizer, question.record_id)
        prompt, answer = np.split(encoded.tokens[:-1], [encoded.prompt_length])
        if not len(answer):
            raise UserError(f"option {option!r} of the question about record {question.record_id!r} has no token")
        answers.append(answer)
    shared = len(prompt)
    branch = np.concatenate([np.full(len(part), n - 1) for n, part in enumerate([prompt, *answers])])
    position = np.concatenate([np.arange(shared), *(shared + np.arange(len(answer)) for answer in answers)])
    slot = np.arange(len(branch))
    parent = np.where((branch >= 0) & (position == shared), shared - 1, slot - 1)
    row = EncodedExample(question.record_id, np.concatenate([prompt, *answers]), shared)
    return ChoiceRow(question, row, branch.astype(np.int32), position.astype(np.int32), parent.astype(np.int32))


def score_options(
    model: CausalLM,
    scaling: float,
    params: Params,
    adapters: Adapters,
    rows: Sequence[ChoiceRow],
    *,
    shapes: Sequence[Shape],
    advance: Callable[[int], None],
    trunk: TrunkCache | None = None,
) -> list[np.ndarray]:
    """The mean log-likelihood (nats per token) of every option.

    Args:
      model: the frozen model.
      scaling: alpha / rank.
      params: its weights.
      adapters: shared by all rows; ``{}`` for the base model.
      rows: the questions, from :func:`lay_out`.
      shapes: from ``packing.choose_shapes`` over ``row.encoded``; they decide speed and memory, never the result.
      advance: called with how many more questions are done.
      trunk: the hidden states below the adapters, where they are kept; ``adapters`` must not be ``{}`` then.

    Returns:
      For each question f64 [options].
    """
    sums = [np.zeros(len(row.question.options)) for row in rows]
    for batch in pack([[[row.encoded for row in rows]]] if rows else [], shapes, clients=1):
        held = [rows[index] for index in batch.index]
        branch, position, parent = (
            _padded([getattr(row, name) for row in held], batch.tokens.shape[1])
            for name in ("branch", "position", "parent")
        )
        row, slot = batch.target_row, batch.target_position + 1
        seen = tree_mask(branch)
        below = None if trunk is None else jnp.asarray(trunk.block(batch.tokens, position, seen))
        targets = (row, parent[row, slot], batch.target_token)
        nll, _ = slots(model, scaling, params, adapters, batch.tokens, position, seen, *targets, below=below)
        used = np.flatnonzero(batch.target_weight > 0)
        for target, value in zip(used, np.asarray(nll, np.float64)[used], strict=True):
            sums[batch.index[row[target]]][branch[row[target], slot[target]]] -= value
        advance(len(np.unique(row[used])))
    return [total / np.bincount(row.branch[row.branch >= 0]) for total, row in zip(sums, rows, strict=True)]


def chosen(question: ChoiceQuestion, scores: np.ndarray) -> int:
    """The option with the highest score.

    Of exactly equal ones the first by a hash of its text: that depends neither on which option is right nor on where it
    stands, so a model without an opinion scores at chance whatever the order of the options.
    """
    best = np.flatnonzero(scores == scores.max())
    return int(min(best, key=lambda option: hashlib.sha256(question.options[option].encode()).digest()))


def _padded(columns: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Stacks [L] columns of different lengths as [M, length], filled up on the right with zeros.

    A row of padding stands for the first question, whatever its length; it has no targets, so it may be cut.
    """
    return np.stack([np.pad(column[:length], (0, max(0, length - len(column)))) for column in columns])
