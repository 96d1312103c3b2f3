"""The page of one run: what its folder holds, rendered once."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fedjax_llm.errors import UserError
from fedjax_llm.experiment.leak_report import run_sections
from fedjax_llm.runs import report
from fedjax_llm.runs.directory import read_json
from fedjax_llm.runs.leak_page import Section
from fedjax_llm.runs.progress import byte_size, duration
from fedjax_llm.serving.voices import HOTTEST, Voices

LEAKAGE = "leakage.json"
# As in app.css: a drawing is shown as an image, which does not inherit the page's colours.
_COLOURS = (
    "<style>svg { --ink: #16232d; --muted: #526370; --rule: #d9e1e6; --base: #7b8a95; --tuned: #0b6e75; "
    "--paper: #ffffff; --tint: #f1f5f7; color: var(--ink); "
    "font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }"
    "svg * { stroke-linejoin: round; stroke-linecap: butt; }"
    "@media (prefers-color-scheme: dark) { svg { --ink: #e4ebef; --muted: #9dadb8; --rule: #33424d; --base: #8d9ca7; "
    "--tuned: #5cc8ce; --paper: #161f26; --tint: #1c2830; } }</style>"
)


@dataclass(frozen=True)
class RunPage:
    """Everything that a browser can get of a run.

    Attributes:
      html: of the page.
      figures: drawings by name, as ``/figures/NAME.svg`` gives them.
    """

    html: str
    figures: Mapping[str, str]


def run_page(run: Path, voices: Voices) -> RunPage:
    """Reads a run's folder and renders its page.

    What is missing is told on the page, in the section that would show it.

    Args:
      run: its folder, encrypted or not (under :func:`fedjax_llm.runs.keys.using`).
      voices: the models that are asked.
    """
    content, missing = _content(run)
    leaks, why_no_leaks = _leaks(run)
    training = content["figures"] if content else []
    leaking = [picture.svg for section in (leaks[1] if leaks else ()) for picture in section.figures]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, report.TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": byte_size, "duration": duration}
    html = environment.get_template("index.html").render(
        name=run.absolute().name,
        folder=shlex.quote(str(run)),
        run=content,
        missing=missing,
        leaks=leaks,
        why_no_leaks=why_no_leaks,
        training_figures=[(f"run-{number}", one["caption"]) for number, one in enumerate(training)],
        examples=_examples(run),
        model=voices.base.name,
        parameters=voices.base.size,
        system=voices.system,
        limits=voices.limits,
        longest_prompt=voices.longest_prompt,
        hottest=HOTTEST,
    )
    figures = {f"run-{number}": _coloured(str(one["drawing"])) for number, one in enumerate(training)}
    figures |= {f"leak-{number}": svg for number, svg in enumerate(leaking)}
    return RunPage(html, figures)


def _content(run: Path) -> tuple[dict[str, Any] | None, str]:
    """What a run's report says; else why there is none."""
    try:
        return report.content(report.read(run.absolute())), ""
    except UserError as error:
        return None, str(error)


def _leaks(run: Path) -> tuple[tuple[str, list[Section]] | None, str]:
    """What an attack on the run has found, if there was one; else, if it cannot be shown, why."""
    if not (run / LEAKAGE).exists():
        return None, ""
    try:
        return run_sections(read_json(run / LEAKAGE)), ""
    except UserError as error:
        return None, str(error)
    except (KeyError, TypeError) as error:
        return None, f"{run / LEAKAGE} is of another version: {error} is missing. Make it again"


def _examples(run: Path) -> list[dict[str, Any]]:
    """The held-out questions that the run's evaluation answered in full, with their reference answers."""
    try:
        return read_json(run / "evaluation.json").get("generations", [])
    except UserError:
        return []


def _coloured(svg: str) -> str:
    """A drawing of a report as a file of its own, in the colours of the page."""
    head, _, rest = svg.partition(">")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return head.replace("<svg", f"<svg {spaces}", 1) + ">" + _COLOURS + rest
