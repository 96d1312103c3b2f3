"""From chat messages to tokens, with the tokenizer's own chat template; the loss is on the answer alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedjax_llm.data.records import EncodedExample, Example, Message, Record
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class LengthReport:
    """What became of the examples.

    Attributes:
      kept: whole.
      truncated: kept with a shortened answer.
      dropped: left out, since they were too long or since the prompt alone was.
      longest: tokens of the longest example, before anything was cut.
    """

    kept: int
    truncated: int
    dropped: int
    longest: int


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a question, up to where the assistant's answer begins: the same for training and for generation."""
    return tokenizer.encode(tokenizer.render(messages, True))


def encode_example(example: Example, tokenizer: Tokenizer, record_id: str) -> EncodedExample:
    """The tokens of an example: prompt, answer, end of turn.

    The prompt is the template's text of all messages but the last, with the generation prompt; the answer is what the
    template's text of all messages adds to it, up to its first end-of-turn token; where the template ends without one,
    ``eos_id`` is added. A template that rewrites earlier turns once an answer stands (so that the text does not begin
    with the prompt) is not followed: there the answer is its plain text and ``eos_id``.

    The first tokens are always those of the prompt alone, which generation meets. The answer's are the rest of the
    whole text's tokens; where tokens of the whole run across the seam, the answer is tokenised apart.
    """
    prompt = tokenizer.render(example.messages[:-1], True)
    full = tokenizer.render(example.messages, False)
    if not full.startswith(prompt):
        full = prompt + example.messages[-1].content
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(full)
    length = len(prompt_ids)
    answer_ids = ids[length:] if ids[:length] == prompt_ids else tokenizer.encode(full[len(prompt) :])
    tokens = np.array([*prompt_ids, *_one_turn(answer_ids, tokenizer)], np.int32)
    return EncodedExample(record_id, tokens, length)


def encode_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    max_length: int,
    too_long: Literal["truncate", "drop"],
    system: str | None = None,
) -> tuple[tuple[EncodedExample, ...], LengthReport]:
    """Encodes all examples of some records, in order.

    Args:
      records: whose examples.
      tokenizer: gives the template and the tokens.
      max_length: tokens of an example at most, prompt and answer together.
      too_long: longer examples lose the end of their answer (``truncate``) or are left out (``drop``). An example whose
        prompt leaves no room for a token of the answer is left out whatever the setting.
      system: a system message for the examples that have none; ``None`` leaves the template's own default.

    Raises:
      UserError: ``max_length`` or ``too_long`` is impossible.
    """
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; it must leave room for a prompt and an answer, e.g. 128")
    if too_long not in ("truncate", "drop"):
        raise UserError(f"too_long is {too_long!r}; choose 'truncate' or 'drop'")
    encoded: list[EncodedExample] = []
    truncated = dropped = longest = 0
    for record in records:
        for example in record.examples:
            one = replace(encode_example(with_system(example, system), tokenizer, record.id), owner=record.owner)
            longest = max(longest, len(one.tokens))
            if len(one.tokens) <= max_length:
                encoded.append(one)
            elif too_long == "truncate" and one.prompt_length < max_length:
                encoded.append(replace(one, tokens=one.tokens[:max_length]))
                truncated += 1
            else:
                dropped += 1
    return tuple(encoded), LengthReport(len(encoded) - truncated, truncated, dropped, longest)


def with_system(example: Example, system: str | None) -> Example:
    """The example with a system message first, unless it has one or ``system`` is ``None``."""
    if system is None or example.messages[0].role == "system":
        return example
    return Example((Message("system", system), *example.messages))


def _one_turn(answer: list[int], tokenizer: Tokenizer) -> list[int]:
    """The answer up to and with its first end-of-turn token, which is added where there is none."""
    for position, token in enumerate(answer):
        if token in tokenizer.end_ids:
            return answer[: position + 1]
    return [*answer, tokenizer.eos_id]
