"""A page about leaks: sections of words, tables, figures and texts side by side; HTML that opens offline, Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fedjax_llm.runs.directory import write_text
from fedjax_llm.runs.report import style


@dataclass(frozen=True)
class Picture:
    """A figure: the content of an SVG file, the file's name without ``.svg``, and what it shows."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Pair:
    """Texts side by side.

    Attributes:
      where: which text, and its figures.
      prompt: what the model was given.
      texts: label, what is the same as in the original, the rest.
    """

    where: str
    prompt: str
    texts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    paragraphs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figures: tuple[Picture, ...] = ()
    pairs: tuple[Pair, ...] = ()


def write(folder: Path, title: str, lede: str, sections: Sequence[Section]) -> None:
    """Writes ``leakage.html``, ``leakage.md`` and every figure as ``<name>.svg``.

    Args:
      folder: that takes the files.
      title: of the page.
      lede: the result in a sentence or two.
      sections: in order.
    """
    write_text(folder / "leakage.html", html(title, lede, sections))
    write_text(folder / "leakage.md", markdown(title, lede, sections))
    for section in sections:
        for picture in section.figures:
            write_text(folder / f"{picture.name}.svg", picture.svg)


def html(title: str, lede: str, sections: Sequence[Section]) -> str:
    """The page; what comes from models and data is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("leak_page.html").read_text("utf-8"))
    return template.render(title=title, lede=lede, sections=sections, style=style())


def markdown(title: str, lede: str, sections: Sequence[Section]) -> str:
    """The page as Markdown, without the texts side by side."""
    lines = [f"# {title}", "", lede, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        if section.rows:
            lines += [_row(section.columns), _row(["---", *["---:"] * (len(section.columns) - 1)])]
            lines += [*map(_row, section.rows), ""]
        for picture in section.figures:
            lines += [f"![{picture.caption}]({picture.name}.svg)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    """A line of a table, whatever stands in its cells."""
    plain = [" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(plain) + " |"
