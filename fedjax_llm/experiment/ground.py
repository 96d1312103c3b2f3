"""What a tuned model is attacked with: texts that it trained on and others like them, planted secrets and controls.

All models that are compared meet the same ground, and what lies below their adapters is computed once for all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedjax_llm.config import Experiment
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.planted import PlantedSecrets, is_secret
from fedjax_llm.data.records import EncodedExample, Record
from fedjax_llm.data.secrets import Secret, foreign_question, question
from fedjax_llm.data.splits import SplitSite
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.choice import ChoiceRow
from fedjax_llm.evaluation.evaluate import first_by_hash
from fedjax_llm.experiment.prepare import encode, load_dataset, split_sites
from fedjax_llm.leakage.exposure import answer_example, candidate_rows
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.training.trunk import TrunkCache


@dataclass(frozen=True)
class Attacks:
    """Which attacks a tuned model is put through, and how hard.

    Attributes:
      candidates: records of each kind, trained on and not, whose membership is inferred, at most.
      references: values that each planted secret is ranked among; 0: exposure is not measured.
      beams: of beam search for planted secrets; 0: none.
      shadows: shadow adapters for LiRA and RMIA, each trained on a random half of the candidates; 0: neither is run.
      shadow_epochs: how often each shadow sees its half.
      shadow_learning_rate: of AdamW, with batches of ``shadow_batch``.
      shadow_batch: examples a step.
      significance: probability with which an audit's bound may exceed the true epsilon.
      tokens_per_microbatch: of scoring; bounds its memory.
      trunk_megabytes: of host memory for hidden states below the adapters.
      seed: of references, shadows and beams.
    """

    candidates: int = 400
    references: int = 95
    beams: int = 4
    shadows: int = 0
    shadow_epochs: int = 3
    shadow_learning_rate: float = 3e-3
    shadow_batch: int = 8
    significance: float = 0.05
    tokens_per_microbatch: int = 1024
    trunk_megabytes: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name, least in (("candidates", 2), ("references", 0), ("beams", 0), ("shadows", 0), ("shadow_epochs", 1)):
            if getattr(self, name) < least:
                raise UserError(f"attacks.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.shadows % 2 or self.shadows == 2:
            raise UserError(f"attacks.shadows is {self.shadows}; it must be even, and at least 4 (or 0 for none)")
        if not 0 < self.significance < 0.5:
            raise UserError(f"attacks.significance is {self.significance}; it must be above 0 and below 0.5")


class Candidate(NamedTuple):
    """A record whose membership is inferred: its examples as tokens, and the text of its answers."""

    id: str
    examples: tuple[EncodedExample, ...]
    text: str


class Planted(NamedTuple):
    """A secret (or a control) as the attacks meet it.

    Attributes:
      secret: itself.
      answer: its value as the answer to its site's question, with the end of turn.
      foreign: the same, asked in other words.
    """

    secret: Secret
    answer: EncodedExample
    foreign: EncodedExample


class Ground(NamedTuple):
    """All of it.

    Attributes:
      base: the frozen model.
      members: records that were trained on.
      non_members: records that were held out for the test, by a hash of their ids: a random split.
      population: other held-out records, which no attack asks about.
      planted: secrets and controls; empty where nothing was planted.
      rows: for exposure, of the planted without coins.
      shapes: of microbatches of ``members`` to ``planted``.
    """

    base: BaseModel
    members: tuple[Candidate, ...]
    non_members: tuple[Candidate, ...]
    population: tuple[Candidate, ...]
    planted: tuple[Planted, ...]
    rows: tuple[tuple[ChoiceRow, ...], ...]
    shapes: tuple[Shape, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Members, then non-members."""
        return (*self.members, *self.non_members)


def ground_of(
    experiment: Experiment, attacks: Attacks, base: BaseModel, sites: Sequence[SplitSite] | None = None
) -> Ground:
    """The ground of an experiment: a function of its data, not of its training.

    Args:
      experiment: what it trained on.
      attacks: how many texts are laid out, and how.
      base: the model, for its tokenizer.
      sites: of the experiment, split, where they are known.

    Raises:
      UserError: the experiment holds nothing out for the test, so that nothing is known not to have been trained on.
    """
    sites = split_sites(experiment, load_dataset(experiment)) if sites is None else sites
    members = _candidates(experiment, base, (one for site in sites for one in site.train), attacks.candidates)
    held_out = [one for site in sites for one in site.test]
    non_members = _candidates(experiment, base, held_out, attacks.candidates)
    if not non_members:
        raise UserError("the experiment holds no record out for the test: membership needs records not trained on")
    asked = {candidate.id for candidate in non_members}
    rest = [one for site in sites for one in (*site.validation, *site.test) if one.id not in asked]
    population = _candidates(experiment, base, rest, attacks.candidates)
    planted = _planted(experiment, base, sites)
    exact = [one.secret for one in planted if not one.secret.coin] if attacks.references else []
    options = {"count": attacks.references, "seed": attacks.seed}
    rows = candidate_rows(exact, base.tokenizer, experiment.data.system, **options)
    examples = [one for part in (members, non_members, population) for own in part for one in own.examples]
    examples += [example for one in planted for example in (one.answer, one.foreign)]
    shapes = choose_shapes(examples, tokens_per_microbatch=attacks.tokens_per_microbatch, buckets=3)
    return Ground(base, members, non_members, population, planted, tuple(map(tuple, rows)), shapes)


def trunk_of(ground: Ground, attacks: Attacks, layers: int) -> TrunkCache | None:
    """Keeps what lies below the lowest of ``layers`` adapted layers; ``None`` where nothing lies there."""
    if not layers or not attacks.trunk_megabytes:
        return None
    base = ground.base
    return TrunkCache(base.model, base.params, layers, ground.shapes, attacks.trunk_megabytes * 2**20)


def _candidates(experiment: Experiment, base: BaseModel, records: Iterable[Record], most: int) -> tuple[Candidate, ...]:
    """Records as tokens, without planted ones and those of which nothing is left; the first by a hash of their ids."""
    found = []
    for record in first_by_hash([one for one in records if not is_secret(one.id)], None):
        if len(found) == most:
            break
        examples, _ = encode(experiment, base)([record])
        if examples:
            found.append(Candidate(record.id, examples, " ".join(one.messages[-1].content for one in record.examples)))
    return tuple(found)


def _planted(experiment: Experiment, base: BaseModel, sites: Sequence[SplitSite]) -> tuple[Planted, ...]:
    """The secrets of a source that plants some, as its sites ask for them and as others do."""
    source = experiment.data.source
    if not isinstance(source, PlantedSecrets):
        return ()
    system, tokenizer = experiment.data.system, base.tokenizer

    def one(secret: Secret) -> Planted:
        asked = (question(secret), foreign_question(secret))
        return Planted(secret, *(answer_example(secret, messages, tokenizer, system) for messages in asked))

    names = [site.name for site in (source.load().sites if experiment.data.partition else sites)]
    return tuple(one(secret) for secret in source.secrets(names))
