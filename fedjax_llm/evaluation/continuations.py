"""Continuations of many prompts: how likely given ones are, and what the model itself writes, in few static shapes."""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache

import numpy as np

from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.evaluation.heldout import score
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.decoding import Greedy, Sampler, generate
from fedjax_llm.models.tokenizer import Tokenizer
from fedjax_llm.types import Adapters, Params

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context (one at least), and of its continuation."""


def log_likelihoods(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    buckets: int = 4,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """For each pair the log-likelihood of the continuation (nats), and whether greedy decoding would give it.

    A pair that is longer than the model's context loses the beginning of its context. The last token is predicted and
    never read, so one token more than the context fits.

    Args:
      model: the frozen model.
      params: its weights.
      adapters: scaled factors; ``{}`` for the base model.
      pairs: any number.
      batch_size: rows of the longest pairs that are run at once; of shorter ones there are as many more.
      buckets: how many shapes are compiled at most.
      advance: called with how many more pairs are done.
    """
    if not pairs:
        return []
    longest = model.config.context + 1
    examples = []
    for context, continuation in pairs:
        tokens = np.asarray([*context, *continuation][-longest:], np.int32)
        examples.append(EncodedExample("", tokens, max(len(tokens) - len(continuation), 1)))
    budget = batch_size * max(len(example.tokens) for example in examples)
    shapes = choose_shapes(examples, tokens_per_microbatch=budget, buckets=buckets)
    found = score(model, 1.0, params, adapters, examples, shapes=shapes, advance=advance)
    greedy = found.correct == found.tokens
    return [(-float(nll), bool(one)) for nll, one in zip(found.nll, greedy, strict=True)]


def continued(
    model: CausalLM,
    params: Params,
    adapters: Adapters,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
    batch_size: int,
    sampler: Callable[[int], Sampler] = lambda batch: Greedy(),
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """New tokens of every prompt, in batches of similar lengths; the longest come first.

    Args:
      model: the frozen model.
      params: its weights.
      adapters: scaled factors; ``{}`` for the base model.
      prompts: token ids.
      max_new_tokens: of each prompt, at most.
      end_ids: tokens after which a row ends.
      pad_id: fills prompts up; it changes nothing.
      batch_size: rows at once.
      sampler: of a batch, by its number.
      advance: called with how many more prompts are done.

    Raises:
      UserError: a prompt is empty or fills the model's context.
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    rows, found = min(batch_size, len(prompts)), {}
    for number, start in enumerate(range(0, len(order), max(rows, 1))):
        block = order[start : start + rows]
        filled = [prompts[place] for place in block] + [prompts[block[-1]]] * (rows - len(block))
        made = generate(
            model,
            params,
            adapters,
            filled,
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            pad_id=pad_id,
            sampler=sampler(number),
        )
        found |= dict(zip(block, made, strict=False))
        advance(len(block))
    return [found[place] for place in range(len(prompts))]


def stop_ids(tokenizer: Tokenizer, stops: Iterable[str]) -> frozenset[int]:
    """Tokens whose text begins with a stop text: no text that comes from them or after them would be kept.

    A row that ends at one of them need not run on to its last token. Longer stop texts are cut from the text.
    """
    wanted = tuple(stop for stop in stops if stop)
    return _stop_ids(tokenizer, wanted) if wanted else frozenset()


@lru_cache(maxsize=32)
def _stop_ids(tokenizer: Tokenizer, stops: tuple[str, ...]) -> frozenset[int]:
    """The search through the vocabulary."""
    anchor = tokenizer.encode("a")  # a token's text may depend on whether it is the first
    before = len(tokenizer.decode(anchor))
    texts = (tokenizer.decode([*anchor, token])[before:] for token in range(tokenizer.vocab_size))
    return frozenset(token for token, text in enumerate(texts) if text.startswith(stops))


def until_stop(text: str, stops: Iterable[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min([len(text), *(place for stop in stops if stop and (place := text.find(stop)) >= 0)])]
