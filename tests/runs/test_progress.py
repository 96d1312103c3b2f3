"""The display: complete in a terminal, plain in a log; tables that fit 80 columns."""

import io
import re

import pytest
from private_runs import privacy, spent
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
    with progress.RunProgress(10, console, budget=8.0) as display:
        with display.phase("Reading [the] text", 20, "records") as advance:
            for _ in range(2):
                advance(10)
        display.round(line(1))
        display.round(line(2, epsilon=spent({"skin": 1.0, "eye": 1.234}), excluded=["skin"], validation={"nll": 3.25}))


def test_a_log_has_one_plain_line_a_round():
    text = shown(False, a_run)
    assert not re.search(r"[^\x20-\x7e\n]", text), "no control characters"
    lines = text.splitlines()
    assert lines[0] == "Reading [the] text ..."
    assert re.fullmatch(r"Reading \[the\] text: done in .*, 20 records", lines[1])
    assert lines[2] == "round 1/10  loss 2.5000  200 tok/s  epsilon -  27.0s left"
    guarantee = "epsilon 1.24 of 8 (+/-1 record, delta 1e-05)"
    assert lines[3] == f"round 2/10  loss 2.5000  200 tok/s  {guarantee}  held-out 3.2500  left out: skin  24.0s left"
    assert len(lines) == 4


def test_a_terminal_shows_the_same():
    text = shown(True, a_run)
    for part in ("Reading [the] text", "2/10", "loss 2.5000", "200 tok/s", "24.0s left", "left out: skin"):
        assert part in text
    assert "epsilon 1.24 of 8 (+/-1 record, delta 1e-05)" in text, "whole, within 80 columns"
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


def test_many_sites_fill_no_screen():
    sites = {f"clinic {place}": {"records": 3} for place in range(300)}
    text = shown(False, lambda console: console.print(progress.sites_table(sites)))
    assert len(text.splitlines()) < 50
    assert "and 260 more" in text
    assert re.search(r"all +900", text)


def in_100_columns(statement):
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(progress.privacy_table(statement))
    lines = [row.rstrip() for row in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 100
    return lines


def test_the_table_of_privacy_has_each_site_the_maximum_and_what_is_not_covered():
    sampling = {"sampling_probability": None, "releases": 1200}
    lines = in_100_columns(privacy({"[b]eye": 2.5, "skin": 7.977}, warning="It is only a [toy].", account=sampling))
    assert lines[0] == "Privacy (epsilon at delta 1e-05, add or remove one record; DpFedSgd)"
    assert lines[1].split("  ")[0] == "site"
    for heading in ("epsilon", "noise multiplier", "sampling probability", "releases", "records"):
        assert heading in lines[1]
    rows = [re.split(r"  +", row) for row in lines[2:6]]
    assert rows[0] == ["skin", "7.98", "1.5", "-", "1,200", "900"]
    assert rows[1][:2] == ["[b]eye", "2.50"], "the worst comes first"
    assert ["maximum", "7.98"] in rows
    text = " ".join(lines)
    assert "Epsilon <= 7.977 at delta 1e-05 for one record (add or remove one record), the worst of 2 sites." in text
    assert "Holds against: Whoever sees the sums." in text
    assert "- Held-out figures have no noise." in lines
    assert "Warning: It is only a [toy]." in lines
    assert "Stopped" not in text


def test_the_table_of_privacy_shows_the_worst_of_many():
    lines = in_100_columns(privacy({f"clinic {place}": 1 + place / 100 for place in range(300)}))
    assert len(lines) < 40
    assert lines[2].startswith("clinic 299")
    assert "... and 284 more, none of a larger epsilon" in lines


def test_without_privacy_the_table_says_so():
    assert "no differential privacy" in " ".join(in_100_columns(None))


def test_a_stop_by_the_budget_is_told():
    text = " ".join(in_100_columns(privacy({"eye": 7.9}, stopped="round 12 would exceed the budget")))
    assert "Stopped: round 12 would exceed the budget" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0s"), (61, "1m 01s"), (119.7, "2m 00s"), (7860, "2h 11m")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3 PB")]
)
def test_byte_sizes(count, text):
    assert progress.byte_size(count) == text
