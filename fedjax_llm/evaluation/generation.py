"""A few held-out questions, answered in full: what a person looks at first."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import lora
from fedjax_llm.data.chat import encode_prompt, with_system
from fedjax_llm.data.records import Record
from fedjax_llm.models.decoding import generate
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.tokenizer import Tokenizer
from fedjax_llm.types import Adapters

_ROWS = 16
"""Prompts that are continued at a time; it bounds the memory of the cache."""


@dataclass(frozen=True)
class Prompt:
    """A held-out question.

    Attributes:
      site: whose.
      record: id of the record that it comes from.
      text: what is asked, without the template and the system message.
      reference: the record's own answer.
      tokens: of the templated chat, up to where the answer begins.
    """

    site: str
    record: str
    text: str
    reference: str
    tokens: tuple[int, ...]


def choose_prompts(
    records: Mapping[str, Sequence[Record]], total: int, tokenizer: Tokenizer, *, longest: int, system: str | None
) -> tuple[Prompt, ...]:
    """Takes questions from the sites in turn, one record each time and its examples in turn too.

    Args:
      records: held-out ones by site, in the order in which they are to be taken.
      total: how many questions.
      tokenizer: gives template and tokens.
      longest: prompts with more tokens are passed over.
      system: a system message for examples without one.

    Returns:
      At most ``total``, in the order of the sites.
    """
    found: list[Prompt] = []
    turns = itertools.zip_longest(*([(site, record) for record in records[site]] for site in records))
    for site, record in (pair for turn in turns for pair in turn if pair is not None):
        if len(found) == total:
            break
        example = record.examples[len(found) % len(record.examples)]
        tokens = encode_prompt(with_system(example, system).messages[:-1], tokenizer)
        if len(tokens) <= longest:
            text = "\n\n".join(message.content for message in example.messages[:-1] if message.role != "system")
            found.append(Prompt(site, record.id, text, example.messages[-1].content, tuple(tokens)))
    order = list(records)
    return tuple(sorted(found, key=lambda prompt: order.index(prompt.site)))


def answers(
    base: BaseModel,
    scaling: float,
    adapters: Mapping[str, Adapters],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, each prompt with the adapters of its site, all in the same batch.

    Args:
      base: the frozen model.
      scaling: alpha / rank.
      adapters: by site, without a leading axis; ``{}`` for the base model. Either all sites share one object, or all
        adapt the same modules.
      prompts: from :func:`choose_prompts`.
      max_new_tokens: of an answer, at most.
    """
    found: list[str] = []
    for start in range(0, len(prompts), _ROWS):
        block = prompts[start : start + _ROWS]
        own = [adapters[prompt.site] for prompt in block]
        shared = all(one is own[0] for one in own)
        rows = own[0] if shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        made = generate(
            base.model,
            base.params,
            lora.scaled(rows, scaling),
            [prompt.tokens for prompt in block],
            max_new_tokens=max_new_tokens,
            end_ids=base.tokenizer.end_ids,
            pad_id=base.tokenizer.pad_id,
        )
        found += [base.tokenizer.decode(tokens) for tokens in made]
    return found


def side_by_side(prompts: Sequence[Prompt], base: Sequence[str], final: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of ``evaluation.json``'s ``generations``: site, record, prompt, reference, and both answers."""
    return [
        {
            "site": prompt.site,
            "record": prompt.record,
            "prompt": prompt.text,
            "reference": prompt.reference,
            "base": before,
            "final": after,
        }
        for prompt, before, after in zip(prompts, base, final, strict=True)
    ]
