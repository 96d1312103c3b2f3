"""The OBO parser, on invented terms."""

import pytest

from fedjax_llm.data.obo import Synonym, read_obo
from fedjax_llm.errors import UserError

HEADER = "format-version: 1.2\ndata-version: made/up/2001-02-03\n\n"
TERMS = r"""[Term]
id: X:1
name: Thing

[Term]
id: X:2
name: Wobbly  thing
def: "A thing that is \"wobbly\",\nor {nearly}  so." [somebody:1]
synonym: "Wobbler" EXACT layperson []
synonym: "W" RELATED abbreviation [somebody:2]
synonym: "Old wobbler" []
is_a: X:1 {source="me"} ! Thing

[Term]
id: X:3
name: Very wobbly thing
is_a: X:2 ! Wobbly thing
is_a: X:9 ! not in the file

[Term]
id: X:4
name: obsolete Wobble
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "made_up.obo"
        path.write_text(text, encoding=encoding)
        return path

    return write


def test_reads_live_terms_only(write):
    ontology = read_obo(write(HEADER + TERMS))
    assert ontology.version == "made/up/2001-02-03"
    assert list(ontology.terms) == ["X:1", "X:2", "X:3"]
    assert ontology.terms["X:1"].definition is None


def test_reads_definition_synonyms_and_parents(write):
    term = read_obo(write(HEADER + TERMS)).terms["X:2"]
    assert term.name == "Wobbly thing"
    assert term.definition == 'A thing that is "wobbly", or {nearly} so.'
    assert term.synonyms == (
        Synonym("Wobbler", "EXACT", "layperson"),
        Synonym("W", "RELATED", "abbreviation"),
        Synonym("Old wobbler", "RELATED", None),
    )
    assert term.parents == ("X:1",)


def test_last_term_needs_no_blank_line(write):
    assert list(read_obo(write(HEADER + "[Term]\nid: X:1\nname: Thing")).terms) == ["X:1"]


def test_ancestors_and_related(write):
    ontology = read_obo(write(HEADER + TERMS + "\n[Term]\nid: X:5\nname: Other\nis_a: X:1\n"))
    assert ontology.ancestors("X:3") == {"X:1", "X:2"}
    assert ontology.related("X:3", "X:1")
    assert ontology.related("X:1", "X:3")
    assert ontology.related("X:3", "X:3")
    assert not ontology.related("X:3", "X:5")


def test_ancestors_of_a_cycle_end(write):
    text = "[Term]\nid: X:1\nname: A\nis_a: X:2\n\n[Term]\nid: X:2\nname: B\nis_a: X:1\n"
    assert read_obo(write(HEADER + text)).ancestors("X:1") == {"X:2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[Term]\nid: X:1\nname: A\n", "no 'data-version:' line"),
        (HEADER, "no live"),
        (HEADER + "[Term]\nid: X:1\nname: A\ndef: no quotes\n", r"made_up.obo:7: 'def:' wants text in double quotes"),
        (HEADER + "[Term]\nid: X:1\n\n[Term]\nid: X:2\nname: B\n", r"made_up.obo:6: .* no 'name:' line"),
        (HEADER + "[Term]\nname: A\n", "no 'id:' line"),
    ],
)
def test_broken_files(write, text, message):
    with pytest.raises(UserError, match=message):
        read_obo(write(text))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such ontology file"):
        read_obo(tmp_path / "absent.obo")


def test_not_text(write):
    with pytest.raises(UserError, match="not UTF-8"):
        read_obo(write("data-version: caf\xe9\n", encoding="latin-1"))
