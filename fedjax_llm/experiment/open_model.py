"""What an open model gives back of texts that it may have met in pre-training, beside controls that it cannot know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from rich.console import Console

from fedjax_llm.data.known_texts import KnownText, known_texts, words_replaced, written_now
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.leak_report import table
from fedjax_llm.leakage.extraction import (
    common_prefix,
    discoverable,
    edit_similarity,
    longest_match,
    sampled_log_probs,
)
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.decoding import Greedy, Nucleus, generate
from fedjax_llm.models.loading import BaseModel, BaseType, load
from fedjax_llm.runs import directory, environment, leak_page, leak_plots
from fedjax_llm.runs.leak_figures import mean_of, share_of, tries
from fedjax_llm.runs.leak_page import Pair, Picture, Section
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.types import Params

_ROWS = 32
_SCORED_ROWS = 8
"""Fewer: the logits of all their continuations are held at a time."""
COLUMNS = (
    "texts", "passages", "full matches", "full matches, sampled", "greedy prefix, tokens", "edit similarity",
    "nats a token", "samples for a half chance, median",
)  # fmt: skip


@dataclass(frozen=True)
class OpenModel:
    """An extraction attack on an untouched model by raw completion (Carlini et al. 2023, 2202.07646).

    Attributes:
      model: built-in name, hub id, folder or ``.gguf`` file.
      dtype: of its weights.
      prefix: tokens of a text that the model is given.
      continuation: tokens after them that it should give back.
      samples: sampled continuations of each text, besides the greedy one.
      temperature: of sampling.
      top_k: the sampler of (n, p)-discoverable extraction takes the likeliest so many (Hayes et al. 2024).
      letters: controls written now.
      seed: of controls and samples.
    """

    model: str = "smollm2-135m-instruct"
    dtype: BaseType = "float32"
    prefix: int = 32
    continuation: int = 50
    samples: int = 5
    temperature: float = 0.8
    top_k: int = 40
    letters: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("prefix", "continuation", "top_k", "letters"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.samples < 0:
            raise UserError(f"samples is {self.samples}; it must not be negative")
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; it must be positive")


class Passage(NamedTuple):
    """A text as tokens: int [prefix + continuation]."""

    text: KnownText
    tokens: np.ndarray


def run_open_model(
    attack: OpenModel, folder: Path, console: Console, load_model: Callable[[str, BaseType], BaseModel] = load
) -> int:
    """Prompts the model with every text, and writes ``open_model.json``, ``leakage.html`` and ``leakage.md``.

    Args:
      attack: what to do.
      folder: for the results.
      console: where to show progress.
      load_model: gives the model.

    Returns:
      0.

    Raises:
      UserError: the model cannot be loaded, or its context is too short.
    """
    use_compilation_cache()
    folder = directory.made(folder, "attack")
    with RunProgress(1, console) as progress:
        with progress.phase(f"Loading the model {attack.model}"):
            base = load_model(attack.model, attack.dtype)
        asked = passages(attack, base)
        with progress.phase("Scoring the true continuations", len(asked), "texts") as advance:
            scored = _scored(attack, base, asked, advance)
        with progress.phase("Greedy continuations", len(asked), "texts") as advance:
            greedy = _continued(attack, base, asked, None, advance)
        sampled = []
        with progress.phase("Sampled continuations", attack.samples * len(asked), "texts") as advance:
            for number in range(attack.samples):
                sampled.append(_continued(attack, base, asked, number, advance))
    told = [
        _figures(base, passage, found, made, [draw[place] for draw in sampled])
        for place, (passage, found, made) in enumerate(zip(asked, scored, greedy, strict=True))
    ]
    found = {
        "attack": asdict(attack),
        "model": {"name": base.name, "fingerprint": base.fingerprint},
        "environment": environment.describe(),
        "texts": told,
    }
    directory.write_json(folder / "open_model.json", found)
    lede, sections = _sections(found)
    leak_page.write(folder, f"What {base.name} gives back of well-known texts", lede, sections)
    console.print(table("Extraction", COLUMNS, rows(told)))
    console.print(lede)
    console.print(f"Figures: {folder / 'open_model.json'}   Report: {folder / 'leakage.html'}", soft_wrap=True)
    return 0


def passages(attack: OpenModel, base: BaseModel) -> list[Passage]:
    """All texts and controls that are long enough, as tokens.

    Raises:
      UserError: the model's context is too short, or no text is long enough.
    """
    length = attack.prefix + attack.continuation
    if length > base.model.config.context:
        raise UserError(f"prefix and continuation take {length} tokens, the context {base.model.config.context}")
    texts = known_texts()
    every = [*texts, *(words_replaced(text, texts, attack.seed) for text in texts)]
    every += written_now(attack.letters, attack.seed)
    found = []
    for text in every:
        tokens = [*base.tokenizer.opening, *base.tokenizer.encode(text.text)][:length]
        if len(tokens) == length:
            found.append(Passage(text, np.array(tokens, np.int32)))
    if not found:
        raise UserError(f"no text has {length} tokens; make prefix and continuation shorter")
    return found


def _scored(
    attack: OpenModel, base: BaseModel, asked: Sequence[Passage], advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """What one forward pass tells of every true continuation."""
    found = []
    for first in range(0, len(asked), _SCORED_ROWS):
        block = [one.tokens for one in asked[first : first + _SCORED_ROWS]]
        tokens = np.stack([*block, *[block[0]] * (_SCORED_ROWS - len(block))])  # one compiled program for all blocks
        for own, logits in zip(
            block, np.asarray(_logits(base.model, attack.prefix, base.params, tokens)), strict=False
        ):
            true = own[attack.prefix :]
            log_probs = sampled_log_probs(logits, true, None, 1.0)
            plain = discoverable(log_probs)
            chosen = discoverable(sampled_log_probs(logits, true, attack.top_k, 1.0))
            found.append(
                {
                    "nats_per_token": -float(log_probs.mean()),
                    # With the true text before it, the likeliest token is what greedy decoding gives.
                    "greedy_prefix": common_prefix(logits.argmax(axis=1).tolist(), true.tolist()),
                    "log_probability": plain.log_probability,
                    "tries": _plain(plain.tries),
                    "tries_top_k": _plain(chosen.tries),
                }
            )
        advance(len(block))
    return found


def _plain(needed: Mapping[float, float]) -> dict[str, float | None]:
    """Numbers of samples as JSON holds them: ``None`` where no number would do."""
    return {str(level): None if np.isinf(count) else count for level, count in needed.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _logits(model: CausalLM, prefix: int, params: Params, tokens: Array) -> Array:
    """[M, L - prefix, V], those that predict the continuations of rows [M, L]."""
    hidden = model.hidden(params, {}, tokens)[:, prefix - 1 : -1]
    return model.logits(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1)


def _continued(
    attack: OpenModel,
    base: BaseModel,
    asked: Sequence[Passage],
    sample: int | None,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """Continuations of all prefixes, greedy or one sample each."""
    made = []
    for first in range(0, len(asked), _ROWS):
        block = [one.tokens[: attack.prefix].tolist() for one in asked[first : first + _ROWS]]
        sampler = Greedy()
        if sample is not None:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(attack.seed), sample), first)
            sampler = Nucleus(key, attack.temperature)
        filled = [*block, *[block[0]] * (_ROWS - len(block))]  # one compiled program for all blocks
        options = {"max_new_tokens": attack.continuation, "end_ids": (), "pad_id": base.tokenizer.pad_id}
        made += generate(base.model, base.params, {}, filled, sampler=sampler, **options)[: len(block)]
        advance(len(block))
    return made


def _figures(
    base: BaseModel, passage: Passage, scored: Mapping[str, Any], greedy: list[int], sampled: list[list[int]]
) -> dict[str, Any]:
    """Everything about one text."""
    length = len(greedy)
    true, decode = passage.tokens[-length:].tolist(), base.tokenizer.decode
    shared = [common_prefix(draw, true) for draw in sampled]
    return {
        "name": passage.text.name,
        "group": passage.text.group,
        "source": passage.text.source,
        "tokens": length,
        **scored,
        "generated_prefix": common_prefix(greedy, true),
        "longest_match": longest_match(greedy, true),
        "edit_similarity": edit_similarity(greedy, true),
        "sampled_prefixes": shared,
        "sampled_matches": sum(count == length for count in shared),
        "prompt": decode(passage.tokens[:-length].tolist()),
        "true": decode(true),
        "greedy": decode(greedy),
        "same": decode(true[: common_prefix(greedy, true)]),
        "best_sample": decode(sampled[int(np.argmax(shared))]) if sampled else None,
    }


def rows(texts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row of :data:`COLUMNS` for every group."""
    found: list[tuple[str, ...]] = []
    for group in dict.fromkeys(one["group"] for one in texts):
        own = [one for one in texts if one["group"] == group]
        full = share_of([one["generated_prefix"] == one["tokens"] for one in own])
        draws = [count == one["tokens"] for one in own for count in one["sampled_prefixes"]]
        needed = np.median([np.inf if one["tries"]["0.5"] is None else one["tries"]["0.5"] for one in own])
        found.append(
            (
                group,
                str(len(own)),
                f"{sum(one['generated_prefix'] == one['tokens'] for one in own)} [{full.low:.0%}, {full.high:.0%}]",
                f"{sum(draws)} of {len(draws)}" if draws else "-",
                str(mean_of([one["generated_prefix"] for one in own])),
                str(mean_of([one["edit_similarity"] for one in own])),
                str(mean_of([one["nats_per_token"] for one in own])),
                tries(float(needed)),
            )
        )
    return found


def _sections(found: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """The page."""
    texts, attack = found["texts"], found["attack"]
    known = [one for one in texts if one["group"] in ("licence", "public domain")]
    controls = [one for one in texts if one not in known]
    full = [one for one in known if one["generated_prefix"] == one["tokens"]]
    wrong = sum(one["generated_prefix"] == one["tokens"] for one in controls)
    lede = (
        f"Given {attack['prefix']} tokens, the untouched model gives back the next {attack['continuation']} word for "
        f"word for {len(full)} of {len(known)} well-known passages, and for {wrong} of {len(controls)} controls. "
    )
    lede += (
        "What is found is memorised." if full and not wrong else "" if full else "No verbatim memorisation was found."
    )
    groups = {group: {one["name"]: one["generated_prefix"] for one in own} for group, own in _grouped(texts).items()}
    picture = Picture("matches", leak_plots.matches(groups, attack["continuation"]), "Tokens given back, by text")
    told = (
        "Raw completion without a chat template. A control has about one word in four replaced, or was drawn at random "
        "now, so that no model can know it. Samples for a half chance: the n of (n, 0.5)-discoverable extraction when "
        "sampling from all tokens at temperature 1, from one forward pass.",
    )
    single = tuple(
        (
            f"{one['name']} ({one['group']})",
            f"{one['generated_prefix']}/{one['tokens']}",
            str(max(one["sampled_prefixes"], default=0)),
            f"{one['edit_similarity']:.2f}",
            f"{one['nats_per_token']:.2f}",
            _tries(one["tries"]["0.5"]),
            _tries(one["tries_top_k"]["0.5"]),
        )
        for one in sorted(texts, key=lambda one: (one["group"], -one["generated_prefix"]))
    )
    names = (
        "text",
        "greedy prefix",
        "best sampled prefix",
        "edit similarity",
        "nats a token",
        "samples",
        "samples, top-k",
    )
    order = sorted(texts, key=lambda one: -one["generated_prefix"])
    return lede, [
        Section("By group", told, COLUMNS, tuple(rows(texts)), (picture,)),
        Section("Continuations beside the originals", pairs=tuple(map(_pair, order))),
        Section("Every text", columns=names, rows=single),
    ]


def _tries(count: float | None) -> str:
    """A number of samples, which may be none."""
    return "never" if count is None else tries(count)


def _grouped(texts: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The texts by group."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in texts:
        groups.setdefault(one["group"], []).append(one)
    return groups


def _pair(one: Mapping[str, Any]) -> Pair:
    """Original and continuation side by side, with what agrees from the beginning on marked."""
    same = one["same"]
    texts = [("original", same, one["true"][len(same) :]), ("greedy", same, one["greedy"][len(same) :])]
    if one["best_sample"] is not None:
        texts.append(("best sample", "", one["best_sample"]))
    where = f"{one['name']}, {one['group']}: {one['generated_prefix']} of {one['tokens']} tokens"
    return Pair(where, one["prompt"], tuple(texts))
