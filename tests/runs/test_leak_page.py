"""The page about leaks: everything is on it, nothing that models or data say becomes markup, and figures are XML."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.runs import leak_plots
from fedjax_llm.runs.leak_page import Pair, Picture, Section, html, markdown, write

HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }} | $x^2$ </title>"
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><text>inside</text></svg>'
SECTIONS = (
    Section(
        "Membership",
        ("Who was in?", "A second paragraph."),
        ("attack", "AUC", "interval"),
        (("loss", "0.61", "0.55 to 0.67"), ("min-k", "0.72", "0.66 to 0.78")),
        (Picture("roc", SVG, "Curves of the attacks."),),
    ),
    Section("Texts", pairs=(Pair("Hamlet, 12 of 50", "To be, or", (("original", "", "not"), ("model", "no", "pe"))),)),
    Section("Nothing"),
)


class Reader(HTMLParser):
    """Collects elements and text; knows what was left open."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def strings(value):
    """All texts in nested tuples and dataclasses."""
    if isinstance(value, str):
        return [value]
    inner = value if isinstance(value, tuple) else vars(value).values()
    return [text for one in inner for text in strings(one)]


def cells(line):
    """The cells of a line of a GFM table: a backslash takes the character after it along."""
    parts = re.findall(r"((?:\\.|[^|\\])*)\|", line)
    return [re.sub(r"\\([|\\])", r"\1", part.strip()) for part in parts[1:]]


def test_everything_is_on_the_page():
    page = read(html("The title", "In a sentence.", SECTIONS))
    text = "\n".join(page.texts)
    left_out = {"roc", SVG}  # the picture's file name, and what is markup
    for value in {"The title", "In a sentence.", "inside", *strings(SECTIONS)} - left_out:
        assert value in text, value
    assert page.tags.count("h2") == page.tags.count("section") == 3
    assert page.tags.count("tr") == 3
    assert page.tags.count("td") == 4
    assert page.tags.count("svg") == page.tags.count("table") == page.tags.count("article") == 1
    assert page.tags.count("mark") == 1  # an empty beginning is not marked


def test_the_page_needs_nothing_from_elsewhere():
    page = html("t", "l", SECTIONS)
    assert not re.findall(r"(?:src|href)\s*=|@import|url\((?!#)", page)


def hostile_sections(text):
    pair = Pair(text, text, ((text, text, text),))
    return (Section(text, (text,), (text, text), ((text, text),), (Picture("p", SVG, text),), (pair,)),)


@pytest.mark.parametrize("start", ["", "</p>", "<!--", "<b", "&lt;", "]]>", "' onload='"])
def test_what_models_and_data_say_is_never_markup(start):
    text = start + HOSTILE
    plain, page = (html(one, one, hostile_sections(one)) for one in ("plain", text))
    found = read(page)
    assert found.tags == read(plain).tags
    assert "<script" not in page
    assert sum(text in piece for piece in found.texts) == 15  # every place once, the title twice


def test_markdown_has_titles_tables_and_figures():
    lines = markdown("The title", "In a sentence.", SECTIONS).splitlines()
    assert lines[:3] == ["# The title", "", "In a sentence."]
    assert [line for line in lines if line.startswith("## ")] == ["## Membership", "## Texts", "## Nothing"]
    table = [line for line in lines if line.startswith("|")]
    assert [cells(line) for line in table] == [
        ["attack", "AUC", "interval"],
        ["---", "---:", "---:"],
        ["loss", "0.61", "0.55 to 0.67"],
        ["min-k", "0.72", "0.66 to 0.78"],
    ]
    assert "![Curves of the attacks.](roc.svg)" in lines
    assert "Who was in?" in lines


@given(st.lists(st.tuples(st.text("a|\\\n\r -"), st.text("b|\\\n\r -")), min_size=1, max_size=3))
def test_no_cell_breaks_a_table(rows):
    text = markdown("t", "l", (Section("s", (), ("one", "two"), tuple(rows)),))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    for line, row in zip(table[2:], rows, strict=True):
        assert [" ".join(cell.split()) for cell in cells(line)] == [" ".join(cell.split()) for cell in row]


def test_all_files_are_written(tmp_path):
    write(tmp_path, "t", "l", SECTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leakage.html", "leakage.md", "roc.svg"]
    assert (tmp_path / "leakage.html").read_text() == html("t", "l", SECTIONS)
    assert (tmp_path / "leakage.md").read_text() == markdown("t", "l", SECTIONS)
    assert (tmp_path / "roc.svg").read_text() == SVG


# Figures

CURVE = {"fpr": [0.0, 0.1, 1.0], "tpr": [0.0, 0.6, 1.0], "auc": 0.7512, "non_members": 40}
POINTS = ((0, 0.1, 0.0, 0.2), (1, 0.3, 0.2, 0.4), (64, 0.9, 0.8, 1.0))
INTERVAL = (0.6, 0.5, 0.7)
FIGURES = {
    "roc": lambda a, b: leak_plots.roc_curves([CURVE | {"name": a}, CURVE | {"name": b}]),
    "labels": lambda a, b: leak_plots.roc_curves([CURVE | {"name": "x"}] * 2, labels=[a, b]),
    "repetitions": lambda a, b: leak_plots.by_repetitions({a: POINTS, "other": POINTS[1:]}, b, level=(0.5, "chance")),
    "intervals": lambda a, b: leak_plots.intervals({a: {b: INTERVAL}, "other": {b: INTERVAL}}, "AUC", at=0.5),
    "paths": lambda a, b: leak_plots.paths({a: [(3.0, 0.5), (2.0, 0.7)], "other": [(1.0, 0.2)]}, b, "loss"),
    "matches": lambda a, b: leak_plots.matches({a: {b: 50, "other text": 3}, "control": {b: 0}}, 50),
    "bounds": lambda a, b: leak_plots.bounds({a: (0.4, None), b: (1.2, 8.0)}),
}


def words(svg):
    """The texts of a figure, which must be XML."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_xml_with_all_names_and_no_markup_in_them(name):
    hostile = "<script>'\"{{ 7 }}$x^2$</svg>"
    svg = FIGURES[name](hostile, "second & last")
    text = "\n".join(words(svg))
    for given_name in (hostile, "second & last"):
        assert given_name in text
    assert "<script" not in svg
    assert svg == FIGURES[name](hostile, "second & last"), "equal figures are equal files"


def test_figures_tell_their_values():
    text = "\n".join(words(FIGURES["roc"]("min_k", "loss")))
    assert "min k: AUC 0.751" in text
    text = "\n".join(words(FIGURES["repetitions"]("a", "b")))
    assert re.search(r"^never$", text, re.M)
    assert re.search(r"^64$", text, re.M)
    assert "chance" in text


@pytest.mark.parametrize("rows", [{"a": (0.4, None), "b": (1.0, 8.0)}, {"a": (0.4, 8.0)}, {"a": (0.4, None)}])
def test_a_figure_of_bounds_explains_the_marks_that_it_has(rows):
    text = words(leak_plots.bounds(rows))
    assert "shown by the audit" in text
    assert ("claimed" in text) == any(claimed is not None for _, claimed in rows.values())
