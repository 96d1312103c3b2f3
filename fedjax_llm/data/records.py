"""What data is, before any token: sites hold records, a record holds examples.

A record is the smallest thing that stays together: all its examples are in one split, and it is the
smallest privacy unit. Its ``owner`` (a patient, say) may be shared by several records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedjax_llm.types import Unit


@dataclass(frozen=True)
class Message:
    """One turn of a chat: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One supervised exchange. The last message is the assistant's: the answer that is trained on."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Record:
    """Examples that belong together.

    Attributes:
      id: stable and unique within a dataset; decides the split, never the order of a file.
      examples: at least one.
      label: class for label-skewed partitions (``None``: none known).
      owner: whose record it is, for coarser privacy units (``None``: the record is its own owner).
      fields: the source's other columns, for partitioning by a field.
      training_only: whether it is in training whatever the split says.
    """

    id: str
    examples: tuple[Example, ...]
    label: str | None = None
    owner: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    training_only: bool = False


@dataclass(frozen=True)
class Site:
    """One holder of data, e.g. a clinic. In a simulation each site is one client."""

    name: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question about a record: the key is ``options[answer]``.

    ``guesses`` maps the name of a zero-knowledge guesser (``overlap``, ``longest``) to its expected score
    on this question in [0, 1]; ties are split evenly.
    """

    record_id: str
    messages: tuple[Message, ...]
    options: tuple[str, ...]
    answer: int
    guesses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """What a source gives.

    Attributes:
      sites: in a stable order, names unique; one site named ``all`` where the source knows no sites.
      version: of the text, e.g. ``hp/releases/2025-01-16``.
      citation: how to cite it, and under which terms it may be used.
      questions: makes multiple-choice questions for some records of a site, with a seed. Records that admit
        no fair question are left out.
    """

    sites: tuple[Site, ...]
    version: str
    citation: str
    questions: Callable[[Site, Sequence[Record], int], tuple[ChoiceQuestion, ...]] | None = None


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens.

    Attributes:
      record_id: the record it belongs to.
      tokens: int32 ``[L]``; prompt, then answer with its end-of-turn token.
      prompt_length: how many of them are prompt. Targets are ``tokens[prompt_length:]``, each predicted from the
        position before it.
      owner: whose record it is (``None``: the record is its own owner).
    """

    record_id: str
    tokens: np.ndarray
    prompt_length: int
    owner: str | None = None


def units_of(examples: Sequence[EncodedExample], unit: Unit) -> tuple[tuple[EncodedExample, ...], ...]:
    """A site's examples by privacy unit: by record, by owner (a record without one is its own), or all together."""
    found: dict[tuple[str, str], list[EncodedExample]] = {}
    for example in examples:
        found.setdefault(unit_name(example.record_id, example.owner, unit), []).append(example)
    return tuple(tuple(group) for group in found.values())


def unit_name(record_id: str, owner: str | None, unit: Unit) -> tuple[str, str]:
    """The privacy unit that a record of a site belongs to."""
    if unit == "site":
        return "site", ""
    return ("owner", owner) if unit == "patient" and owner is not None else ("record", record_id)
