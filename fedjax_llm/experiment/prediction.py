"""What a run will take, before it begins: its first rounds are drawn and packed, its evaluation is counted.

Counts are those of the run itself where nothing secret decides them. Under differential privacy, who is sampled is a
secret that no forecast may touch: a sample like it is drawn with a key that is known.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.data.packing import Microbatch, Shape, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.experiment.cost_model import (
    Constants,
    Size,
    Work,
    decoding_work,
    scoring_work,
    seconds_of,
    size_of,
    step_bytes,
    step_work,
    training_work,
    trunk_work,
)
from fedjax_llm.experiment.finish import personal
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.federation.cohorts import answers_of, slots_of
from fedjax_llm.federation.local_work import at_once, past_rounds, work_of
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.privacy import noise
from fedjax_llm.runs import environment
from fedjax_llm.runs.progress import byte_size, duration
from fedjax_llm.training.trunk import TrunkCache

_ROUNDS, _CLIENTS = 16, 256
"""Rounds that are drawn, at most, and clients of all of them, about; the others are taken to be like these."""
_PROMPTS, _PROMPT_LENGTH = 16, 32
"""Prompts that are answered at a time, and the multiple that their length is filled up to."""
_PROGRAMS = 4e8
"""Bytes of compiled programs, of what compiles them, and of the report's pictures."""
_PIECES, _PIECES_OF_STEP = 1e9, 2
"""Freed memory that is kept (``memory.keep_freed_memory``) falls into pieces that the next step cannot use: up to so
many bytes, or so many times what a step holds. Measured: 0.8 to 2.1 times in steps of 0.2 to 0.6 GB, 0.3 times in one
of 1.6 GB."""
_COMPILING = 0.2
"""Seconds a layer of a program, the first time; with a backward pass three times as long (two cores, idle)."""


class DrawnRound(NamedTuple):
    """A round as it is packed.

    Attributes:
      shapes: how many microbatches of each.
      tokens: without padding.
      padded_tokens: with it.
      work: of the round, what it computes for the trunk included.
    """

    shapes: Counter[Shape]
    tokens: int
    padded_tokens: int
    work: Work


class _Trunk:
    """Which examples a trunk holds by now, and what filling it costs. Without a trunk nothing does."""

    def __init__(self, cache: TrunkCache | None, size: Size) -> None:
        self._shapes, self._size = () if cache is None else cache.shapes, size
        self._known: set[bytes] = set()

    @property
    def nbytes(self) -> float:
        """Of the states that are held by now (int32 tokens have 4 bytes)."""
        return sum(map(len, self._known)) / 4 * self._size.width * self._size.itemsize if self._shapes else 0.0

    def fill(self, examples: Sequence[EncodedExample]) -> Work:
        """The work for those that are not held yet."""
        fresh = {example.tokens.astype(np.int32).tobytes(): len(example.tokens) for example in examples}
        rows: Counter[Shape] = Counter()
        for key, length in fresh.items():
            if self._shapes and key not in self._known:
                rows[min((s for s in self._shapes if s.length >= length), key=lambda s: s.length)] += 1
        self._known |= fresh.keys()
        parts = (trunk_work(self._size, s.rows, s.length).times(-(-count // s.rows)) for s, count in rows.items())
        return sum(parts, Work())


@dataclass(frozen=True)
class Prediction:
    """What a run will take on this machine. Times are in seconds, and compiling is not among them.

    Attributes:
      rounds: how many.
      microbatches: training steps of all rounds.
      tokens: of all rounds, without padding.
      padded_tokens: with it.
      operations: floating-point operations of all rounds.
      training_seconds: of all rounds.
      finetuning_seconds: of the sites' own rounds after them.
      evaluation_seconds: of validations, and from the last round to the report.
      compile_seconds: more than that, the first time.
      memory_bytes: the most that the process holds.
      rough: whether the machine's speed has not been measured on this model.
    """

    rounds: int
    microbatches: float
    tokens: float
    padded_tokens: float
    operations: float
    training_seconds: float
    finetuning_seconds: float
    evaluation_seconds: float
    compile_seconds: float
    memory_bytes: float
    rough: bool

    @property
    def seconds(self) -> float:
        """Training and evaluation."""
        return self.training_seconds + self.finetuning_seconds + self.evaluation_seconds

    def told(self) -> str:
        """One line for people."""
        parts = [f"evaluation {duration(self.evaluation_seconds)}"]
        if self.rounds:
            parts.insert(0, f"{self.rounds} rounds of {duration(self.training_seconds / self.rounds)}")
        first = f", and {duration(self.compile_seconds)} to compile, the first time" if self.rough else ""
        about = "roughly" if self.rough else "about"
        memory = byte_size(self.memory_bytes)
        return f"This run: {about} {duration(self.seconds)}: {', '.join(parts)}{first}; memory {memory}"

    def to_json(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return asdict(self) | {"seconds": self.seconds}


class Workload(NamedTuple):
    """The work of a run.

    Attributes:
      drawn: its first rounds.
      rounds: how many there are.
      training: of all rounds.
      finetuning: of the sites' own rounds after them.
      validation: between the rounds.
      evaluation: after them, with the report.
      memory: bytes by which the process will grow: one training step and the pieces of those before it, the states
        below the adapters, programs.
    """

    drawn: tuple[DrawnRound, ...]
    rounds: int
    training: Work
    finetuning: Work
    validation: Work
    evaluation: Work
    memory: float


def draw_rounds(plan: RoundPlan, size: Size, most: int = _ROUNDS) -> tuple[DrawnRound, ...]:
    """The first rounds of a plan, packed as they will be; where clients differ from round to round, about as many.

    Args:
      plan: of the rounds. Its secret key is not used.
      size: of the model.
      most: how many rounds.
    """
    return tuple(_draw(plan, size, most, _Trunk(plan.trunk, size)))


def _draw(plan: RoundPlan, size: Size, most: int, trunk: _Trunk) -> Iterator[DrawnRound]:
    """Round after round, until enough clients have been drawn."""
    if plan.mechanism is not None:
        plan = plan._replace(secret_key=noise.run_key("reproducible", 0, "forecast"))
    clients = 0
    for number in range(1, min(most, plan.federation.rounds) + 1):
        if clients >= _CLIENTS:
            return
        cohort = answers_of(plan, number).cohort
        clients += len(cohort)
        yield _packed(plan, size, cohort, number, trunk)


def _packed(plan: RoundPlan, size: Size, cohort: np.ndarray, number: int, trunk: _Trunk) -> DrawnRound:
    """A round's microbatches, chunk by chunk."""
    slots, past = slots_of(plan), past_rounds(plan, number)
    layout: dict[str, Any] = {"bins": plan.execution.mesh.bins, "share": plan.shared_row}
    passes = 2 if plan.aggregation.own is not None else 1
    shapes: Counter[Shape] = Counter()
    tokens, total = 0, Work()
    for first in range(0, len(cohort), slots):
        work = [work_of(plan, int(place), number, 0, past) for place in cohort[first : first + slots]]
        batches = list(pack(work, plan.shapes, clients=slots, **layout))
        found = Counter(map(_shape, batches))
        steps = sum(bool(batch.finished.any()) for batch in batches)
        parts = (training_work(size, s, slots, plan.trunk is not None).times(count) for s, count in found.items())
        total += sum(parts, step_work(size, slots).times(steps)).times(passes)
        if plan.aggregation.client.probe:
            whole = pack([at_once(own) for own in work], plan.shapes, clients=slots, **layout)
            total += sum((training_work(size, _shape(b), slots, plan.trunk is not None) for b in whole), Work())
        total += trunk.fill([example for batch in batches for example in batch.examples]) + Work(chunks=1)
        shapes += found
        tokens += sum(batch.real_tokens for batch in batches)
    return DrawnRound(shapes, tokens, sum(s.rows * s.length * count for s, count in shapes.items()), total)


def _shape(batch: Microbatch) -> Shape:
    """Of a microbatch."""
    rows, length = batch.tokens.shape
    return Shape(rows, length, len(batch.target_row))


def workload(prepared: Prepared) -> Workload:
    """The work of a run that is ready to begin: its rounds, those of fine-tuning, and all evaluation."""
    plan, experiment = prepared.plan, prepared.experiment
    size = size_of(prepared.base, prepared.adapters, prepared.frozen)
    trunk = _Trunk(None if plan is None else plan.trunk, size)
    if plan is None:
        return Workload((), 0, Work(), Work(), Work(), _evaluation(prepared, size, trunk), _PROGRAMS)
    rounds, every = experiment.federation.rounds, experiment.evaluation.validation_every
    drawn = tuple(_draw(plan, size, _ROUNDS, trunk))
    finetuning = validation = Work()
    if (more := experiment.federation.finetune_rounds) and plan.setting == "federated":
        alone = plan._replace(setting="local", cohort=len(plan.clients))
        finetuning = _all_rounds(tuple(_draw(alone, size, 1, trunk)), more)
    if every:
        validation = _scored(prepared, size, trunk, prepared.held_out.validation).times(-(-rounds // every))
    evaluation = _evaluation(prepared, size, trunk)
    slots = slots_of(plan)
    kept = trunk.nbytes if plan.trunk is None else min(trunk.nbytes, plan.trunk.capacity)
    step = max(step_bytes(size, shape, slots) for shape in plan.shapes)
    memory = step + min(_PIECES_OF_STEP * step, _PIECES) + kept + _PROGRAMS
    return Workload(drawn, rounds, _all_rounds(drawn, rounds), finetuning, validation, evaluation, memory)


def _all_rounds(drawn: Sequence[DrawnRound], rounds: int) -> Work:
    """The rounds that were drawn, and as many like them as there are more."""
    total = sum((one.work for one in drawn), Work())
    return total.times(rounds / len(drawn))


def _evaluation(prepared: Prepared, size: Size, trunk: _Trunk) -> Work:
    """Base and tuned model on test records, questions and prompts, and the report."""
    held_out, plan = prepared.held_out, prepared.plan
    first = 0 if plan is None or plan.trunk is None else size.lowest
    total = Work(reports=1)
    for tuned in (False, True)[: 1 if plan is None else 2]:
        total += _scored(prepared, size, trunk, held_out.test, tuned)
        asked = {site: [row.encoded for row in rows] for site, rows in held_out.questions.items()}
        for together in _passes(prepared, asked, tuned):
            for batch in pack([[together]], held_out.choice_shapes, clients=1):
                total += scoring_work(size, _shape(batch), first)
                if first and not tuned:
                    total += trunk_work(size, *batch.tokens.shape)
    lengths = [len(prompt.tokens) for prompt in held_out.prompts]
    new = prepared.experiment.evaluation.max_new_tokens
    for start in range(0, len(lengths), _PROMPTS):
        block = lengths[start : start + _PROMPTS]
        length = -(-max(block) // _PROMPT_LENGTH) * _PROMPT_LENGTH
        total += decoding_work(size, len(block), length, new).times(1 if plan is None else 2)
    return total


def _scored(
    prepared: Prepared,
    size: Size,
    trunk: _Trunk,
    examples: Mapping[str, Sequence[EncodedExample]],
    tuned: bool = True,
) -> Work:
    """Scoring all sites' examples once; what a trunk has to compute, it computes microbatch by microbatch."""
    plan, total = prepared.plan, Work()
    first = 0 if plan is None or plan.trunk is None else size.lowest
    for together in _passes(prepared, examples, tuned):
        for batch in pack([[together]], prepared.held_out.shapes, clients=1):
            total += scoring_work(size, _shape(batch), first) + trunk.fill(batch.examples)
    return total


def _passes(
    prepared: Prepared, items: Mapping[str, Sequence[EncodedExample]], tuned: bool
) -> list[list[EncodedExample]]:
    """What is scored together: all sites that share adapters."""
    if tuned and prepared.plan is not None and (personal(prepared.plan) or _finetuned(prepared)):
        return [list(own) for own in items.values() if own]
    return [every] if (every := [item for own in items.values() for item in own]) else []


def _finetuned(prepared: Prepared) -> bool:
    """Whether the sites train on alone after the rounds."""
    return prepared.experiment.federation.finetune_rounds > 0 and prepared.experiment.setting == "federated"


def predict(prepared: Prepared, work: Workload, constants: Constants, held: int) -> Prediction:
    """What a run takes with these constants.

    Args:
      prepared: the run.
      work: from :func:`workload`.
      constants: of this machine.
      held: bytes that the process holds now (:func:`resident_bytes`).
    """
    share = work.rounds / max(len(work.drawn), 1)
    count = {name: share * sum(getattr(one, name) for one in work.drawn) for name in ("tokens", "padded_tokens")}
    return Prediction(
        rounds=work.rounds,
        microbatches=share * sum(one.shapes.total() for one in work.drawn),
        **count,
        operations=work.training.operations,
        training_seconds=seconds_of(constants, work.training),
        finetuning_seconds=seconds_of(constants, work.finetuning),
        evaluation_seconds=seconds_of(constants, work.validation + work.evaluation),
        compile_seconds=_compiling(prepared),
        memory_bytes=max(environment.peak_rss_bytes(), held + constants.memory * work.memory),
        rough=constants.rough,
    )


def resident_bytes() -> int:
    """What this process holds now; where the system does not tell, the most that it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return environment.peak_rss_bytes()


def _compiling(prepared: Prepared) -> float:
    """Seconds to compile a run's programs where none is known: one a shape."""
    plan, held_out = prepared.plan, prepared.held_out
    size = size_of(prepared.base, prepared.adapters, prepared.frozen)
    known = plan is not None and plan.trunk is not None
    upper = size.layers - size.lowest if known else size.layers
    forward = len(held_out.shapes) + len(held_out.choice_shapes)
    backward = 0 if plan is None else len(plan.shapes)
    answers = size.layers * 2 if held_out.prompts else 0
    return _COMPILING * (upper * (forward + 3 * backward) + answers)


def scaled_to(work: Workload, padded_tokens: int) -> Work:
    """The training work of a run that had so many padded tokens, which sampling decides."""
    share = work.rounds / max(len(work.drawn), 1)
    expected = share * sum(one.padded_tokens for one in work.drawn)
    return work.training.times(padded_tokens / expected) if expected else work.training
