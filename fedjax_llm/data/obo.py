"""Reading ontologies in OBO format, version 1.2 and 1.4.

Only what flashcards need is read: of every live ``[Term]`` its id, name, definition, synonyms and parents.
Format: https://owlcollab.github.io/oboformat/doc/GO.format.obo-1_4.html
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedjax_llm.errors import UserError

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "W": " "}
_KEYS = frozenset(("id", "name", "def", "synonym", "is_a", "is_obsolete"))
_SCOPES = ("EXACT", "BROAD", "NARROW", "RELATED")


@dataclass(frozen=True)
class Synonym:
    """Another name of a term: ``scope`` is EXACT, BROAD, NARROW or RELATED; ``type`` e.g. ``layperson``."""

    text: str
    scope: str
    type: str | None = None


@dataclass(frozen=True)
class Term:
    """One term of an ontology; ``parents`` are the ids of its ``is_a`` lines."""

    id: str
    name: str
    definition: str | None
    synonyms: tuple[Synonym, ...]
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Ontology:
    """The live terms of an ontology by id, in the order of the file, and the file's ``data-version``."""

    version: str
    terms: Mapping[str, Term]

    def ancestors(self, term_id: str) -> frozenset[str]:
        """The ids of all terms above ``term_id``, itself left out."""
        seen: set[str] = set()
        todo = list(self.terms[term_id].parents)
        while todo:
            parent = todo.pop()
            if parent not in seen and parent in self.terms:
                seen.add(parent)
                todo.extend(self.terms[parent].parents)
        return frozenset(seen - {term_id})

    def related(self, one: str, other: str) -> bool:
        """Whether one of the two terms is the other, or an ancestor of it."""
        return one == other or one in self.ancestors(other) or other in self.ancestors(one)


def read_obo(path: Path) -> Ontology:
    """Reads the live (not obsolete) terms of an OBO file.

    Raises:
      UserError: the file is missing, is not UTF-8 text, has no ``data-version`` or no terms, or a line of a term cannot
        be read (the message says which).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such ontology file; give the path of an .obo file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); is this an .obo file?") from None
    version = re.search(r"^data-version:\s*(\S+)", text, re.MULTILINE)
    if version is None:
        raise UserError(f"{path}: no 'data-version:' line; is this an .obo file?")
    terms = {term.id: term for term in _terms(path, text)}
    if not terms:
        raise UserError(f"{path}: holds no live [Term]; is the file complete?")
    return Ontology(version.group(1), terms)


def _terms(path: Path, text: str) -> Iterator[Term]:
    """The live terms, one stanza after the other."""
    stanza: str | None = None
    lines: list[tuple[int, str, str]] = []
    for number, line in enumerate([*text.split("\n"), "[End]"], start=1):
        if line.startswith("["):
            if stanza == "[Term]" and not any(key == "is_obsolete" and value == "true" for _, key, value in lines):
                yield _term(path, number, lines)
            stanza, lines = line.strip(), []
        elif stanza == "[Term]":
            key, _, value = line.partition(": ")
            if key in _KEYS:
                lines.append((number, key, value.strip()))


def _term(path: Path, end: int, lines: list[tuple[int, str, str]]) -> Term:
    """One term from the (line number, key, value) triples of its stanza."""
    term_id = name = definition = None
    synonyms: list[Synonym] = []
    parents: list[str] = []
    for number, key, value in lines:
        if key == "id":
            term_id = value
        elif key == "name":
            name = _clean(value)
        elif key == "is_a":
            parents.append(value.split()[0])
        elif key in ("def", "synonym"):
            quoted = _QUOTED.match(value)
            if quoted is None:
                raise UserError(f"{path}:{number}: '{key}:' wants text in double quotes, got {value[:60]!r}")
            if key == "def":
                definition = _clean(quoted.group(1)) or None
            else:
                synonyms.append(_synonym(_clean(quoted.group(1)), quoted.group(2)))
    if term_id is None or name is None:
        missing = "id" if term_id is None else "name"
        raise UserError(f"{path}:{end - 1}: the [Term] that ends here has no '{missing}:' line; is the file damaged?")
    return Term(term_id, name, definition, tuple(synonyms), tuple(parents))


def _synonym(text: str, rest: str) -> Synonym:
    """A synonym from its text and what follows it, e.g. ``EXACT layperson []``."""
    words = rest.split("[", 1)[0].split()
    scope = words.pop(0) if words and words[0] in _SCOPES else "RELATED"
    return Synonym(text, scope, words[0] if words else None)


def _clean(text: str) -> str:
    """Escapes resolved, white space collapsed."""
    if "\\" in text:
        text = _ESCAPE.sub(lambda match: _ESCAPED.get(match.group(1), match.group(1)), text)
    return " ".join(text.split())
