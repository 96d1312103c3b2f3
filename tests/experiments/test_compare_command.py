"""The comparison as a command: tables, figures, names, and what it refuses."""

import json

import pytest

from experiments.compare import main

EVALUATION = {
    "sites": {"a": {"records": ["r", "s"], "nll": [5.0, 7.0], "tokens": [2, 3], "correct": [1, 1], "choice_records": [],
                    "choice_correct": []}},
    "guessers": {},
}  # fmt: skip
SUMMARY = {"setting": "federated", "rounds": 1, "tokens_trained": 50, "upload_bytes": 10, "privacy": None}
LINE = {
    "round": 1, "tokens": 50, "upload_bytes": 10, "download_bytes": 10, "loss": 2.5, "validation": None,
    "epsilon": None,
}  # fmt: skip


@pytest.fixture
def two(tmp_path):
    folders = [tmp_path / "runs" / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir(parents=True)
        for name, content in {
            "config": {},
            "summary": SUMMARY,
            "evaluation": {"base": EVALUATION},
            "metrics": LINE,
        }.items():
            ending = "jsonl" if name == "metrics" else "json"
            (folder / f"{name}.{ending}").write_text(json.dumps(content) + "\n")
    return [str(folder) for folder in folders]


def test_tables_and_figures_are_written_under_the_names_given(two, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--names", "FedAvg", "FedEx", "--table", str(out / "a.tex"), str(out / "a.csv"), "--figures", str(out)]
    assert main([*two, *words]) == 0
    assert "FedEx & 1 & 50" in (out / "a.tex").read_text()
    assert (out / "a.csv").read_text().startswith("run,setting")
    said = capsys.readouterr().out
    assert f"written: {out / 'a.tex'}" in said
    assert f"written: {out / 'loss_by_tokens.pdf'}" in said
    assert (out / "final_nll.png").exists()


def test_a_misspelt_run_or_format_is_told_before_anything_is_written(two, tmp_path, capsys):
    assert main([two[0], two[1][:-1] + "t", "--table", str(tmp_path / "a.md")]) == 2
    assert "did you mean 'second'?" in capsys.readouterr().err
    assert main([*two, "--table", str(tmp_path / "a.md"), str(tmp_path / "a.doc")]) == 2
    assert "ends in .tex, .md, .csv" in capsys.readouterr().err
    assert not (tmp_path / "a.md").exists()
