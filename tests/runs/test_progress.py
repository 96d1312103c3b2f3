"""The display: complete in a terminal, plain in a log; tables that fit 80 columns."""

import io
import re

import pytest
from rich.console import Console

from fedjax_llm.runs import progress


def line(number, **changes):
    return {
        "round": number, "loss": 2.5, "excluded": [], "tokens": 600, "validation": None, "epsilon": None,
        "timing": {"seconds": 4.0, "compile_seconds": 1.0},
    } | changes  # fmt: skip


def shown(terminal, use):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    use(console)
    return out.getvalue()


def a_run(console):
    with progress.RunProgress(10, console) as display:
        with display.phase("Reading [the] text", 20, "records") as advance:
            for _ in range(2):
                advance(10)
        display.round(line(1))
        display.round(line(2, epsilon=1.234, excluded=["skin"], validation={"nll": 3.25}))


def test_a_log_has_one_plain_line_a_round():
    text = shown(False, a_run)
    assert not re.search(r"[^\x20-\x7e\n]", text), "no control characters"
    lines = text.splitlines()
    assert lines[0] == "Reading [the] text ..."
    assert re.fullmatch(r"Reading \[the\] text: done in .*, 20 records", lines[1])
    assert lines[2] == "round 1/10  loss 2.5000  200 tok/s  eps -  27.0s left"
    assert lines[3] == "round 2/10  loss 2.5000  200 tok/s  eps 1.23  held-out 3.2500  left out: skin  24.0s left"
    assert len(lines) == 4


def test_a_terminal_shows_the_same():
    text = shown(True, a_run)
    for part in ("Reading [the] text", "2/10", "loss 2.5000", "200 tok/s", "eps 1.23", "24.0s left", "left out: skin"):
        assert part in text
    assert "\x1b[" in text


def test_a_failing_phase_is_not_called_done():
    def use(console):
        with pytest.raises(KeyError), progress.RunProgress(1, console) as display, display.phase("Loading"):
            raise KeyError

    assert "done" not in shown(False, use)


def test_time_left_after_a_resume_counts_the_rounds_that_are_left():
    def use(console):
        with progress.RunProgress(10, console, completed=7) as display:
            display.round(line(8))

    assert "round 8/10" in shown(False, use)
    assert "6.0s left" in shown(False, use)


FIGURES = {
    "nll": 3.0, "nll_low": 2.9, "nll_high": 3.1, "perplexity": 20.1, "perplexity_low": 18.2, "perplexity_high": 22.2,
    "token_accuracy": 0.456, "token_accuracy_low": 0.4, "token_accuracy_high": 0.5, "choice_accuracy": None,
    "guessers": {"overlap": 0.27},
}  # fmt: skip


def test_tables_hold_everything_within_80_columns():
    name = "abnormality of the nervous system and a very long name that goes on and on and on"
    sites = {name: {"train_records": 1234, "held_out_records": 5}, "[b]skin": {"train_records": 1}}

    def use(console):
        console.print(progress.settings_table([("model", "x" * 200), ("rank [bold]", 8), ("parameters", 134515008)]))
        console.print(progress.sites_table(sites))
        console.print(progress.results_table({"base": FIGURES, "final": FIGURES | {"nll": 2.5}}))
        console.print(progress.results_table({"base": FIGURES}))

    text = shown(False, use)
    assert max(len(row) for row in text.splitlines()) <= 80
    for part in ("134,515,008", "train records", "1,234", "1,235", "[b]skin", "rank [bold]", "2.500 [2.900, 3.100]"):
        assert part in text
    assert "45.6% [40.0%, 50.0%]" in text
    assert re.search(r"multiple choice +- +-", text)
    assert "guesser: overlap" in text


def test_an_empty_table_of_sites_can_be_shown():
    assert "Sites" in shown(False, lambda console: console.print(progress.sites_table({})))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0s"), (61, "1m 01s"), (119.7, "2m 00s"), (7860, "2h 11m")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3 PB")]
)
def test_byte_sizes(count, text):
    assert progress.byte_size(count) == text
