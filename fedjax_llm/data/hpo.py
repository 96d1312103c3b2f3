"""Flashcards from the Human Phenotype Ontology: sites are the organ systems, a record is a term.

The ontology is read from the download cache when a run starts. Its terms of use ask for the citation and the version,
and that the content is not altered: both are in the dataset, and nothing derived from the text is kept in this project.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fedjax_llm import assets
from fedjax_llm.data.choice import Clue, mask, matched_questions, stems
from fedjax_llm.data.obo import Ontology, Term, read_obo
from fedjax_llm.data.records import ChoiceQuestion, Dataset, Example, Message, Record, Site
from fedjax_llm.errors import UserError, nearest

ROOT = "HP:0000118"
CITATION = (
    "Gargano MA, Matentzoglu N, Coleman B, et al. The Human Phenotype Ontology in 2024: phenotypes around the world. "
    "Nucleic Acids Research 52(D1):D1333-D1346, 2024. https://hpo.jax.org (free to use with this citation and the "
    "version shown; the content may not be altered)"
)

_SHORT_NAMES = {
    "HP:0000119": "genitourinary",
    "HP:0000152": "head_neck",
    "HP:0000478": "eye",
    "HP:0000598": "ear",
    "HP:0000707": "nervous",
    "HP:0000769": "breast",
    "HP:0000818": "endocrine",
    "HP:0001197": "prenatal",
    "HP:0001507": "growth",
    "HP:0001574": "integument",
    "HP:0001608": "voice",
    "HP:0001626": "cardiovascular",
    "HP:0001871": "blood",
    "HP:0001939": "metabolism",
    "HP:0002086": "respiratory",
    "HP:0002664": "neoplasm",
    "HP:0002715": "immune",
    "HP:0025031": "digestive",
    "HP:0025142": "constitutional",
    "HP:0025354": "cellular",
    "HP:0033127": "musculoskeletal",
    "HP:0040064": "limbs",
    "HP:0045027": "thoracic",
}


@dataclass(frozen=True)
class HpoFlashcards:
    """Medical flashcards, one site an organ system: a natural split with unequal sizes and different content.

    What a site holds never depends on which other sites are chosen.

    Attributes:
      questions: which examples a term gives: ``definition`` ("What is X?" -> definition) and ``name`` ("Which finding
        is described: ...?" -> name, with the name and its synonyms masked in the definition).
      sites: organ systems by short name, e.g. ``("nervous", "eye")``; empty: all with at least ``min_records``.
      min_records: what a site must have to be taken when ``sites`` is empty.
      overlap: terms that lie in several organ systems are dropped (``drop``), or go to the alphabetically first of them
        (``first``).
      max_records_per_site: at most so many, chosen by a hash of the term's id; ``None``: all.
      path: of an ``hp.obo``; ``None``: the one of the download cache.
    """

    questions: tuple[Literal["definition", "name"], ...] = ("definition", "name")
    sites: tuple[str, ...] = ()
    min_records: int = 200
    overlap: Literal["drop", "first"] = "drop"
    max_records_per_site: int | None = None
    path: str | None = None

    def __post_init__(self):
        for kind in self.questions:
            if kind not in ("definition", "name"):
                raise UserError(f"unknown kind of question {kind!r}{nearest(kind, ('definition', 'name'))}")
        if not self.questions:
            raise UserError("questions is empty; choose 'definition', 'name' or both")
        if self.overlap not in ("drop", "first"):
            raise UserError(f"overlap is {self.overlap!r}{nearest(self.overlap, ('drop', 'first'))}")
        if self.max_records_per_site is not None and self.max_records_per_site < 1:
            raise UserError(f"max_records_per_site is {self.max_records_per_site}; it must be at least 1, or None")

    def load(self) -> Dataset:
        """Reads the ontology and makes the flashcards.

        Raises:
          UserError: the file cannot be read, a site is unknown (with the nearest names) or without a record, or no site
            has ``min_records``.
        """
        ontology = read_obo(Path(self.path).expanduser() if self.path else assets.fetch(assets.HPO))
        by_site: dict[str, list[Record]] = {name: [] for name in _branches(ontology).values()}
        for term, branches in members(ontology):
            if len(branches) > 1 and self.overlap == "drop":
                continue
            examples = tuple(_examples(term, self.questions))
            if examples:
                by_site[branches[0]].append(Record(term.id, examples, label=branches[0], fields={"name": term.name}))
        sites = tuple(Site(name, self._limited(by_site[name])) for name in self._chosen(by_site))
        return Dataset(sites, ontology.version, CITATION, questions=partial(choice_questions, ontology))

    def _chosen(self, by_site: Mapping[str, Sequence[Record]]) -> list[str]:
        """The names of the sites to take, in alphabetic order."""
        for name in self.sites:
            if name not in by_site:
                raise UserError(f"unknown site {name!r}{nearest(name, by_site)}")
            if not by_site[name]:
                raise UserError(f"site {name!r} has no records; leave it out, or set overlap='first'")
        chosen = sorted(set(self.sites)) or [
            name for name in sorted(by_site) if by_site[name] and len(by_site[name]) >= self.min_records
        ]
        if not chosen:
            most = max((len(records) for records in by_site.values()), default=0)
            raise UserError(f"no site has min_records={self.min_records} records; the largest has {most}")
        return chosen

    def _limited(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """The site's records by id, at most ``max_records_per_site`` of them."""
        by_hash = sorted(records, key=lambda record: hashlib.sha256(record.id.encode()).digest())
        return tuple(sorted(by_hash[: self.max_records_per_site], key=lambda record: record.id))


def members(ontology: Ontology) -> Iterable[tuple[Term, list[str]]]:
    """Every term with a definition below the root, and the sorted short names of the organ systems that it lies in."""
    branches = _branches(ontology)
    for term in ontology.terms.values():
        if term.definition is not None:
            above = ontology.ancestors(term.id) | {term.id}
            names = sorted(branches[branch] for branch in above & branches.keys())
            if names:
                yield term, names


def choice_questions(
    ontology: Ontology, site: Site, records: Sequence[Record], seed: int
) -> tuple[ChoiceQuestion, ...]:
    """Four-option questions, definition -> name, about some records, with matched distractors from their site."""
    terms = [ontology.terms[record.id] for record in records]
    clues = [Clue(term.id, term.name, _masked(term)) for term in terms]
    pool = {record.id: ontology.terms[record.id].name for record in site.records}
    return matched_questions(pool, clues, ontology.related, _name_prompt, seed)


def _branches(ontology: Ontology) -> dict[str, str]:
    """Short name by id for the children of the root; a system that is new to us is named from its term."""
    if ROOT not in ontology.terms:
        raise UserError(f"the ontology has no term {ROOT} (Phenotypic abnormality); is this the file hp.obo?")
    return {
        term.id: _SHORT_NAMES.get(term.id) or _short_name(term.name)
        for term in ontology.terms.values()
        if ROOT in term.parents
    }


def _short_name(name: str) -> str:
    """``"Abnormality of the lymph system"`` -> ``"lymph"``."""
    name = re.sub(r"^abnormality of (the )?|\bsystem$", "", name.lower()).strip()
    return re.sub(r"\W+", "_", name)


def _examples(term: Term, questions: Sequence[str]) -> Iterable[Example]:
    """The term's flashcards; one whose masked definition has no word left is left out."""
    assert term.definition is not None
    for kind in questions:
        if kind == "definition":
            prompt = (Message("user", f"What is {term.name}?"),)
            yield Example((*prompt, Message("assistant", term.definition)))
        elif stems(masked := _masked(term)):
            yield Example((*_name_prompt(masked), Message("assistant", term.name)))


def _masked(term: Term) -> str:
    """The definition without the term's name and synonyms."""
    return mask(term.definition or "", [term.name, *(synonym.text for synonym in term.synonyms)])


def _name_prompt(clue: str) -> tuple[Message, ...]:
    """The question of the inverse flashcard, word for word as it is trained on."""
    return (Message("user", f"Which finding is described: {clue.removesuffix('.')}?"),)
