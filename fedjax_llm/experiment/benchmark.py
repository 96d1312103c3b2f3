"""A run's model on a published medical benchmark, beside its base model and guessers that know nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedjax_llm import __version__
from fedjax_llm.data import medical_choice
from fedjax_llm.data.medical_choice import MedicalChoice, MedicalQuestion
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation import flowertune
from fedjax_llm.evaluation.choice import chosen, lay_out, score_options
from fedjax_llm.evaluation.continuations import continued
from fedjax_llm.evaluation.evaluate import Phase
from fedjax_llm.experiment.tuned import TunedModel
from fedjax_llm.runs import directory
from fedjax_llm.runs.leak_figures import Estimate, mean_of, share_of
from fedjax_llm.types import Adapters

Form = Literal["letters", "answers", "match"]
TITLES: dict[Form, str] = {
    "letters": "likeliest letter",
    "answers": "likeliest answer",
    "match": "generate and match (FlowerTune)",
}


@dataclass(frozen=True)
class Scoring:
    """How a benchmark is scored.

    Attributes:
      forms: ``letters``: the options stand in the prompt, and the likeliest letter is the answer; ``answers``: the
        likeliest of the options' texts, by the mean over its tokens; ``match``: FlowerTune's form, a short greedy
        answer that is compared with the key as text.
      tokens_per_microbatch: bounds memory.
      buckets: how many shapes are compiled at most for each form.
      instruction: that prompts of ``match`` begin with; ``None``: one of ours (``evaluation/flowertune.py``).
    """

    forms: tuple[Form, ...] = ("letters", "answers")
    tokens_per_microbatch: int = 4096
    buckets: int = 4
    instruction: str | None = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not self.forms:
            raise UserError("scoring.forms is empty; name letters, answers or match")
        for name in ("tokens_per_microbatch", "buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"scoring.{name} is {getattr(self, name)}; it must be at least 1")


def run_benchmark(tuned: TunedModel, benchmark: MedicalChoice, scoring: Scoring, phase: Phase) -> dict[str, Any]:
    """Scores the model of a run and its base model on the same questions.

    Args:
      tuned: the model; without an adapter, the base model alone is scored.
      benchmark: the questions.
      scoring: how.
      phase: shows progress.

    Returns:
      What is kept in ``benchmarks/NAME.json``: ``benchmark``, ``scoring``, ``model``, ``questions`` (ids), and for each
      form ``{"left_out": ids that are too long, "base": [0 or 1], "tuned": [0 or 1], "guessers": {name: score}}``.

    Raises:
      UserError: a question cannot be read, or all are too long for the model.
    """
    if "match" in scoring.forms and benchmark.name not in flowertune.INSTRUCTIONS:
        known = ", ".join(flowertune.INSTRUCTIONS)
        raise UserError(f"FlowerTune does not evaluate {benchmark.name}, only {known}; leave 'match' out of the forms")
    questions = benchmark.load()
    voices: dict[str, Adapters] = {"base": {}} | ({"tuned": tuned.scaled} if tuned.kind is not None else {})
    found = {}
    for form in dict.fromkeys(scoring.forms):
        score = _matched if form == "match" else _likeliest
        found[form] = score(tuned, benchmark, questions, voices, scoring, form, phase)
    return {
        "benchmark": asdict(benchmark),
        "scoring": asdict(scoring),
        "model": {"name": tuned.base.name, "fingerprint": tuned.base.fingerprint, "system": tuned.system},
        "version": __version__,
        "questions": [question.id for question in questions],
        "forms": found,
    }


def keep(run: Path, found: Mapping[str, Any]) -> Path:
    """Writes ``RUN/benchmarks/NAME.json``, encrypted in an encrypted run; gives its path."""
    folder = directory.made(run / "benchmarks", "benchmark")
    path = folder / f"{found['benchmark']['name']}.json"
    directory.write_json(path, found)
    return path


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each form: how it is scored, questions, base, tuned, their difference, the best guesser.

    Accuracies have Clopper and Pearson's 95% interval; the difference a paired bootstrap's.
    """
    return [(TITLES[form], *_row(one)) for form, one in found["forms"].items()]


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures of a form."""
    base, tuned = one["base"], one.get("tuned")
    change = None if tuned is None else mean_of([after - before for before, after in zip(base, tuned, strict=True)])
    guesser, score = max(one["guessers"].items(), key=lambda pair: pair[1])
    return (
        f"{len(base)}" + (f" ({len(one['left_out'])} too long)" if one["left_out"] else ""),
        _percent(share_of([bool(hit) for hit in base])),
        "-" if tuned is None else _percent(share_of([bool(hit) for hit in tuned])),
        "-" if change is None else _percent(change, "+"),
        f"{score:.1%} ({guesser.replace('_', ' ')})",
    )


def _percent(estimate: Estimate, sign: str = "") -> str:
    """A share with its interval, in per cent with one decimal."""
    return f"{estimate.value:{sign}.1%} [{estimate.low:{sign}.1%}, {estimate.high:{sign}.1%}]"


def _likeliest(
    tuned: TunedModel,
    benchmark: MedicalChoice,
    questions: Sequence[MedicalQuestion],
    voices: Mapping[str, Adapters],
    scoring: Scoring,
    form: Form,
    phase: Phase,
) -> dict[str, Any]:
    """By the log-likelihood of the options."""
    assert form != "match"
    base = tuned.base
    asked = [medical_choice.as_choice(question, form) for question in questions]
    rows = [lay_out(question, base.tokenizer, tuned.system) for question in asked]
    kept = [place for place, row in enumerate(rows) if _length(row.position) <= base.model.config.context]
    _check_any(kept, base.model.config.context)
    fitting = [rows[place] for place in kept]
    shapes = choose_shapes(
        [row.encoded for row in fitting], tokens_per_microbatch=scoring.tokens_per_microbatch, buckets=scoring.buckets
    )
    hits: dict[str, list[int]] = {}
    for voice, adapters in voices.items():
        with phase(f"{TITLES[form].capitalize()}, {voice}", len(fitting)) as advance:
            scores = score_options(base.model, 1.0, base.params, adapters, fitting, shapes=shapes, advance=advance)
        hits[voice] = [
            int(chosen(row.question, one) == row.question.answer) for row, one in zip(fitting, scores, strict=True)
        ]
    return _form(questions, kept, hits, [asked[place].guesses for place in kept])


def _matched(
    tuned: TunedModel,
    benchmark: MedicalChoice,
    questions: Sequence[MedicalQuestion],
    voices: Mapping[str, Adapters],
    scoring: Scoring,
    form: Form,
    phase: Phase,
) -> dict[str, Any]:
    """By FlowerTune's rule."""
    base, name = tuned.base, benchmark.name
    keys = [flowertune.key(name, question) for question in questions]
    limits = flowertune.new_tokens(keys, base.tokenizer)
    # The prompts are encoded as there: with what the tokenizer itself puts before a text.
    texts_in = [flowertune.prompt(name, question, scoring.instruction) for question in questions]
    prompts = [base.tokenizer.backend.encode(text).ids for text in texts_in]
    context = base.model.config.context
    kept = [place for place in range(len(questions)) if len(prompts[place]) + limits[place] <= context]
    _check_any(kept, context)
    written: dict[str, dict[int, str]] = {}
    for voice, adapters in voices.items():
        with phase(f"{TITLES[form].capitalize()}, {voice}", len(kept)) as advance:
            written[voice] = _written(tuned, adapters, prompts, limits, kept, scoring, advance)
    hits = {
        voice: [int(flowertune.matches(name, texts[place], keys[place])) for place in kept]
        for voice, texts in written.items()
    }
    found = _form(questions, kept, hits, [])
    return found | {"written": {voice: [texts[place] for place in kept] for voice, texts in written.items()}}


def _written(
    tuned: TunedModel,
    adapters: Adapters,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    kept: Sequence[int],
    scoring: Scoring,
    advance: Callable[[int], None],
) -> dict[int, str]:
    """Greedy answers by place, those with the same limit together."""
    base, found = tuned.base, {}
    for limit in sorted({limits[place] for place in kept}):
        places = [place for place in kept if limits[place] == limit]
        longest = max(len(prompts[place]) for place in places)
        made = continued(
            base.model,
            base.params,
            adapters,
            [prompts[place] for place in places],
            max_new_tokens=limit,
            end_ids=base.tokenizer.end_ids,
            pad_id=base.tokenizer.pad_id,
            batch_size=max(scoring.tokens_per_microbatch // longest, 1),
            advance=advance,
        )
        decode = base.tokenizer.backend.decode
        found |= {place: decode(tokens, skip_special_tokens=True) for place, tokens in zip(places, made, strict=True)}
    return found


def _form(
    questions: Sequence[MedicalQuestion],
    kept: Sequence[int],
    hits: Mapping[str, list[int]],
    guesses: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """What is kept of a form."""
    names = dict.fromkeys(name for one in guesses for name in one)
    guessers = {name: sum(one[name] for one in guesses) / len(guesses) for name in names}
    own = [questions[place] for place in kept]
    guessers["chance"] = sum(1 / len(question.options) for question in own) / len(own)
    guessers["most_frequent"] = medical_choice.most_frequent(own)
    left_out = sorted(set(range(len(questions))) - set(kept))
    return {"left_out": [questions[place].id for place in left_out], **hits, "guessers": guessers}


def _length(position: Any) -> int:
    """Positions that a row of options takes."""
    return int(position.max()) + 1


def _check_any(kept: Sequence[int], context: int) -> None:
    """Refuses a benchmark of which nothing is left."""
    if not kept:
        raise UserError(f"every question is longer than the model's context of {context} tokens")
