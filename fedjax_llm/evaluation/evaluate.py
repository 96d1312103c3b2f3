"""The evaluation of a run: what is held out is laid out once, then every model that is compared meets the same."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedjax_llm.data.chat import LengthReport
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.records import ChoiceQuestion, Dataset, EncodedExample, Record, Site
from fedjax_llm.data.splits import SplitSite
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.choice import ChoiceRow, chosen, lay_out, score_options
from fedjax_llm.evaluation.generation import Prompt, choose_prompts
from fedjax_llm.evaluation.heldout import Scores, by_record, score
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters

Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with phase(name, total) as advance``: shows long work; ``advance(n)`` says that n more is done."""
Encode = Callable[[Sequence[Record]], tuple[tuple[EncodedExample, ...], LengthReport]]
"""Records to tokens, as for training."""
T = TypeVar("T")
Joined = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Values by site -> those of all sites, where other hosts evaluate others."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured on held-out records.

    Which records are taken is decided by a hash of their ids: it depends on no seed and no setting.

    Attributes:
      test_records: of a site, at most; ``None``: all.
      validation_every: rounds between validations; 0: none.
      validation_records: of a site, at most; ``None``: all.
      choice_questions: of a site, at most; 0: no multiple choice.
      generations: greedy answers in full, of all sites together.
      max_new_tokens: of such an answer.
      bootstrap_resamples: for the intervals.
    """

    test_records: int | None = 100
    validation_every: int = 0
    validation_records: int | None = 16
    choice_questions: int = 25
    generations: int = 8
    max_new_tokens: int = 64
    bootstrap_resamples: int = 2000

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("validation_every", "choice_questions", "generations"):
            self._at_least(0, name)
        for name in ("test_records", "validation_records", "max_new_tokens", "bootstrap_resamples"):
            self._at_least(1, name)

    def _at_least(self, least: int, name: str) -> None:
        """Refuses a smaller number."""
        value = getattr(self, name)
        if value is not None and value < least:
            raise UserError(f"evaluation.{name} is {value}; it must be at least {least}")


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What every model is evaluated on.

    Attributes:
      test: examples by site.
      validation: examples by site, of the sites that have validation records; empty where there is no validation.
      questions: multiple choice by site, of the sites that have any.
      prompts: for generations.
      lengths: what was kept, truncated and dropped of the test records, by site.
      shapes: of the microbatches for test and validation.
      choice_shapes: of those for multiple choice.
    """

    test: Mapping[str, tuple[EncodedExample, ...]]
    validation: Mapping[str, tuple[EncodedExample, ...]]
    questions: Mapping[str, tuple[ChoiceRow, ...]]
    prompts: tuple[Prompt, ...]
    lengths: Mapping[str, LengthReport]
    shapes: tuple[Shape, ...]
    choice_shapes: tuple[Shape, ...]


def hold_out(
    config: Evaluation,
    dataset: Dataset,
    sites: Sequence[SplitSite],
    base: BaseModel,
    encode: Encode,
    *,
    system: str | None,
    seed: int,
    tokens_per_microbatch: int,
    buckets: int,
    whole: bool = True,
) -> HeldOut:
    """Chooses and encodes what is evaluated.

    Args:
      config: how much.
      dataset: makes the questions.
      sites: its sites, split. One without test records is left out.
      base: the model, for its tokenizer and context.
      encode: as for training (``data.chat.encode_records``).
      system: a system message for questions and prompts without one.
      seed: of the questions' distractors.
      tokens_per_microbatch: bounds memory.
      buckets: how many shapes at most, for examples and for questions each.
      whole: whether these are all sites of the run.

    Raises:
      UserError: all test records of a site are too long, or validation is wanted but no site has a record for it.
    """
    taken = {site.name: first_by_hash(site.test, config.test_records) for site in sites if site.test}
    encoded = {name: encode(records) for name, records in taken.items()}
    for name, (examples, report) in encoded.items():
        if not examples:
            raise UserError(
                f"site {name!r}: all {report.dropped} held-out examples are too long (up to {report.longest} tokens); "
                "raise data.max_length, or set data.too_long to 'truncate'"
            )
    test = {name: examples for name, (examples, _) in encoded.items()}
    validation = _validation(config, sites, encode)
    check_validation(config, len(validation) or not whole)
    questions = _questions(config, dataset, sites, seed)
    rows = {name: tuple(lay_out(one, base.tokenizer, system) for one in asked) for name, asked in questions.items()}
    every = [example for part in (test, validation) for examples in part.values() for example in examples]
    longest = min(max((len(example.tokens) for example in every), default=0), base.model.config.context - 1)

    def shapes(examples: Sequence[EncodedExample]) -> tuple[Shape, ...]:
        if not examples:
            return ()
        return choose_shapes(examples, tokens_per_microbatch=tokens_per_microbatch, buckets=buckets)

    return HeldOut(
        test=test,
        validation=validation,
        questions=rows,
        prompts=choose_prompts(taken, config.generations, base.tokenizer, longest=longest, system=system),
        lengths={name: report for name, (_, report) in encoded.items()},
        shapes=shapes(every),
        choice_shapes=shapes([row.encoded for part in rows.values() for row in part]),
    )


def first_by_hash(records: Sequence[Record], most: int | None) -> tuple[Record, ...]:
    """At most so many records, in an order that a hash of their ids gives: the fewer are the first of the more."""
    return tuple(sorted(records, key=lambda record: hashlib.sha256(record.id.encode()).digest())[:most])


def evaluate_sites(
    base: BaseModel,
    scaling: float,
    adapters: Mapping[str, Adapters],
    held_out: HeldOut,
    phase: Phase,
    trunk: TrunkCache | None = None,
    joined: Joined = dict,
) -> dict[str, Any]:
    """The evaluation ``E`` of ``docs/design.md`` section 3, on test records.

    Args:
      base: the frozen model.
      scaling: alpha / rank.
      adapters: of every site, without a leading axis; ``{}`` for the base model. Sites that share one object are
        evaluated together, in one pass.
      held_out: from :func:`hold_out`.
      phase: shows progress.
      trunk: the hidden states below the adapters, where they are kept; then no adapters are ``{}``.
      joined: adds the sites that other hosts evaluate.
    """
    with phase("Held-out answers", sum(map(len, held_out.test.values()))) as advance:
        scores = _scores(base, scaling, adapters, held_out.test, held_out.shapes, advance, trunk)
    total = sum(map(len, held_out.questions.values()))
    correct: dict[str, list[int]] = {}
    if total:
        with phase("Multiple choice", total) as advance:
            correct = _choices(base, scaling, adapters, held_out, advance, trunk)
    sites = {}
    for site, examples in held_out.test.items():
        ids, sums = by_record(examples, scores[site])
        sites[site] = {
            "records": ids,
            "nll": sums.nll.tolist(),
            "tokens": sums.tokens.tolist(),
            "correct": sums.correct.tolist(),
            "choice_records": [row.question.record_id for row in held_out.questions.get(site, ())],
            "choice_correct": correct.get(site, []),
        }
    return {"sites": joined(sites), "guessers": _mean_guesses(joined(_guesses(held_out)))}


def validate(
    base: BaseModel,
    scaling: float,
    adapters: Mapping[str, Adapters],
    held_out: HeldOut,
    trunk: TrunkCache | None = None,
    joined: Joined = dict,
) -> dict[str, Any]:
    """Nats per answer token on the validation records: ``{"nll": macro mean over sites, "sites": {site: nll}}``.

    Arguments as for :func:`evaluate_sites`.
    """
    scores = _scores(base, scaling, adapters, held_out.validation, held_out.shapes, lambda count: None, trunk)
    sites = joined({site: float(found.nll.sum() / found.tokens.sum()) for site, found in scores.items()})
    return {"nll": float(np.mean(list(sites.values()))), "sites": sites}


def guessers(held_out: HeldOut) -> dict[str, float]:
    """What guessers that know nothing are expected to score on the questions: mean over sites of the sites' means."""
    return _mean_guesses(_guesses(held_out))


def check_validation(config: Evaluation, sites: int) -> None:
    """Refuses validation of which no site has a record.

    Raises:
      UserError: validation is wanted, and ``sites`` with records for it are none.
    """
    if config.validation_every and not sites:
        raise UserError(
            f"evaluation.validation_every is {config.validation_every}, but no site has a validation record; raise "
            "data.fractions.validation, or set evaluation.validation_every to 0"
        )


def _guesses(held_out: HeldOut) -> dict[str, dict[str, float]]:
    """By site, what each guesser is expected to score on its questions."""
    found = {}
    for site, rows in held_out.questions.items():
        names = {name: None for row in rows for name in row.question.guesses}
        found[site] = {name: float(np.mean([row.question.guesses.get(name, 0.0) for row in rows])) for name in names}
    return found


def _mean_guesses(by_site: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The means over sites."""
    names = {name: None for site in by_site.values() for name in site}
    return {name: float(np.mean([site.get(name, 0.0) for site in by_site.values()])) for name in names}


def _validation(
    config: Evaluation, sites: Sequence[SplitSite], encode: Encode
) -> dict[str, tuple[EncodedExample, ...]]:
    """Validation examples by site."""
    if not config.validation_every:
        return {}
    found = {site.name: encode(first_by_hash(site.validation, config.validation_records))[0] for site in sites}
    return {name: examples for name, examples in found.items() if examples}


def _questions(
    config: Evaluation, dataset: Dataset, sites: Sequence[SplitSite], seed: int
) -> dict[str, tuple[ChoiceQuestion, ...]]:
    """Multiple-choice questions about test records, by site; distractors come from all of a site's records."""
    if dataset.questions is None or not config.choice_questions:
        return {}
    found = {}
    for site in sites:
        whole = Site(site.name, (*site.train, *site.validation, *site.test))
        asked = dataset.questions(whole, first_by_hash(site.test, None), seed)[: config.choice_questions]
        if asked:
            found[site.name] = asked
    return found


def _scores(
    base: BaseModel,
    scaling: float,
    adapters: Mapping[str, Adapters],
    examples: Mapping[str, Sequence[EncodedExample]],
    shapes: Sequence[Shape],
    advance: Callable[[int], None],
    trunk: TrunkCache | None,
) -> dict[str, Scores]:
    """Scores of every site's examples, in the order of the sites."""
    found = {}
    for own, together, parts in _passes(examples, adapters):
        scores = score(base.model, scaling, base.params, own, together, shapes=shapes, advance=advance, trunk=trunk)
        found |= {site: Scores(*(column[part] for column in scores)) for site, part in parts.items()}
    return {site: found[site] for site in examples}


def _choices(
    base: BaseModel,
    scaling: float,
    adapters: Mapping[str, Adapters],
    held_out: HeldOut,
    advance: Callable[[int], None],
    trunk: TrunkCache | None,
) -> dict[str, list[int]]:
    """For every site and question whether the right option was chosen, 0 or 1."""
    found = {}
    for own, rows, parts in _passes(held_out.questions, adapters):
        model, shapes = base.model, held_out.choice_shapes
        scores = score_options(model, scaling, base.params, own, rows, shapes=shapes, advance=advance, trunk=trunk)
        right = [int(chosen(row.question, one) == row.question.answer) for row, one in zip(rows, scores, strict=True)]
        found |= {site: right[part] for site, part in parts.items()}
    return found


def _passes(
    items: Mapping[str, Sequence[T]], adapters: Mapping[str, Adapters]
) -> Iterator[tuple[Adapters, list[T], dict[str, slice]]]:
    """What is evaluated at once: adapters, the items of all sites that share them, and each site's part of these."""
    sharing: dict[int | None, list[str]] = {}
    for site in items:
        sharing.setdefault(id(adapters[site]) if adapters[site] else None, []).append(site)
    for sites in sharing.values():
        together: list[T] = []
        parts = {}
        for site in sites:
            parts[site] = slice(len(together), len(together) + len(items[site]))
            together += items[site]
        yield adapters[sites[0]], together, parts
