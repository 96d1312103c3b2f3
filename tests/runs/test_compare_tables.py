"""Tables of runs for papers, pages and spreadsheets: the right figures, whole guarantees, nothing that breaks LaTeX."""

import csv
import io
import re

import pytest
from compared import comparison, run

from fedjax_llm.errors import UserError
from fedjax_llm.runs.compare_tables import format_of, latex, markdown, spreadsheet, write_tables


def rows(text):
    """The cells of a Markdown table."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]


def test_markdown_has_a_row_for_each_run_with_intervals_and_differences():
    heads, rule, first, second = rows(markdown(comparison(one=run(), two=run(nll=2.25, bytes=0))))
    assert len(rule) == len(heads)
    cells = dict(zip(heads, zip(first, second, strict=True), strict=True))
    assert cells == {
        "run": ("one", "two"),
        "rounds": ("3", "3"),
        "tokens": ("192k", "192k"),
        "bytes": ("3 MB", ""),
        "nats per answer token": ("2.500 [2.400, 2.600]", "2.250 [2.150, 2.350]"),
        "next-token accuracy (%)": ("50.0 [40.0, 60.0]",) * 2,
        "nats minus one": ("", "-0.250 [-0.500, +0.125]"),
    }  # multiple choice, which no run has, is left out


def test_an_epsilon_stands_below_its_unit_and_delta_rounded_up():
    runs = comparison(plain=run(), records=run(epsilon=7.981), patients=run(epsilon=2.0, unit="patient"))
    heads, _, *lines = rows(markdown(runs))
    columns = {head: [line[place] for line in lines] for place, head in enumerate(heads)}
    assert columns["epsilon (+/-1 record, delta 1e-05)"] == ["none", "7.99", ""]
    assert columns["epsilon (+/-1 patient, delta 1e-05)"] == ["none", "", "2.00"]


def test_latex_is_a_balanced_tabular_of_booktabs():
    text = latex(comparison(["unlike & unequal"], one=run(), two=run(epsilon=3.0)))
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", text)[1]
    assert {line.count("&") for line in body} == {len(columns) - 1}
    assert [line for line in text.splitlines() if line.startswith("\\")] == [
        f"\\begin{{tabular}}{{{columns}}}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert text.count("{") == text.count("}")
    assert text.count("$") % 2 == 0
    assert r"$\varepsilon$ ($\pm$1 record, $\delta$ 1e-05)" in text
    assert r"$-$0.250 {\scriptsize [$-$0.500, $+$0.125]}" in text
    assert "% unlike & unequal\n" in text


def test_names_cannot_break_a_table():
    wild = r"a_b & 50% {x} $5 #1 ~ ^ \end | <z>"
    text = latex(comparison(**{wild: run()}))
    line = next(line for line in text.splitlines() if line.startswith("a"))
    assert line.startswith(
        r"a\_b \& 50\% \{x\} \$5 \#1 \textasciitilde{} \textasciicircum{} \textbackslash{}end \textbar{} \textless{}z"
    )
    assert rows(markdown(comparison(**{wild: run()})))[2][0] == wild.replace("|", r"\|")


def test_a_spreadsheet_has_every_figure_in_full():
    lines = list(csv.DictReader(io.StringIO(spreadsheet(comparison(one=run(nll=1 / 3), two=run(epsilon=7.981))))))
    assert [line["run"] for line in lines] == ["one", "two"]
    assert float(lines[0]["nll"]) == 1 / 3
    assert float(lines[1]["nll_minus_one_high"]) == 0.125
    assert lines[0]["nll_minus_one"] == lines[0]["epsilon"] == lines[0]["choice_accuracy"] == ""
    assert (lines[1]["epsilon"], lines[1]["adjacency"]) == ("7.981", "add or remove one record")


def test_files_have_the_format_that_their_names_end_in(tmp_path):
    found, paths = comparison(one=run()), [tmp_path / "new" / f"runs.{end}" for end in ("tex", "md", "csv")]
    write_tables(found, paths)
    assert [path.read_text("utf-8") for path in paths] == [latex(found), markdown(found), spreadsheet(found)]


def test_another_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"runs\.xls: a table's file ends in \.tex, \.md, \.csv"):
        write_tables(comparison(one=run()), [tmp_path / "a.md", tmp_path / "runs.xls"])
    assert not list(tmp_path.iterdir())
    assert format_of(tmp_path / "a.csv") is spreadsheet
