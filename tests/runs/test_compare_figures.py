"""Figures of runs for papers: what they show, what they leave out and say so, and the sizes that papers ask for."""

import json
import re

import numpy as np
import pytest
from compared import comparison, run
from private_runs import spent

from fedjax_llm.errors import UserError
from fedjax_llm.runs import compare_figures
from fedjax_llm.runs.compare_figures import apart, curve, labels, running_mean, write_figures


def make(folder, rounds=3, nbytes=1000, validation=True, **epsilon):
    """A folder with metrics."""
    folder.mkdir(parents=True)
    lines = [
        {
            "round": number, "tokens": 50, "upload_bytes": nbytes, "download_bytes": nbytes, "loss": 3 - number / 10,
            "validation": {"nll": 4 - number} if validation and number != 2 else None,
            "epsilon": spent({"a": float(number)}, **epsilon) if epsilon else None,
        }
        for number in range(1, rounds + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drawn(monkeypatch, runs, folder):
    """What :func:`write_figures` gives, and the figures by their files' stems."""
    figures = {}
    monkeypatch.setattr(compare_figures, "_saved", lambda figure, stem: figures.setdefault(stem.name, figure) and [])
    return write_figures(comparison(**{name: run() for name in runs}), runs, folder), figures


def lines_of(figure):
    return [line.get_xydata().tolist() for line in figure.axes[0].lines]


def test_a_curve_adds_costs_up(tmp_path):
    found = curve("one", make(tmp_path / "one", unit="record") / "metrics.jsonl")
    assert found.tokens == [50, 100, 150]
    assert found.bytes == [2000, 4000, 6000]
    assert (found.epsilon, found.terms) == ([1, 2, 3], "+/-1 record, delta 1e-05")
    assert found.training == pytest.approx([2.9, 2.8, 2.7])
    assert found.validation == [3, None, 1]


def test_validation_loss_is_shown_where_every_run_has_it_else_that_of_training(tmp_path, monkeypatch):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", validation=False)
    _, figures = drawn(monkeypatch, {"one": one}, tmp_path)
    assert lines_of(figures["loss_by_tokens"]) == [[[50, 3], [150, 1]]]
    assert figures["loss_by_tokens"].axes[0].get_ylabel().startswith("validation loss")
    _, figures = drawn(monkeypatch, {"one": one, "two": two}, tmp_path)
    assert np.shape(lines_of(figures["loss_by_tokens"])) == (2, 3, 2)
    assert figures["loss_by_tokens"].axes[0].get_ylabel().startswith("training loss")


def test_lines_are_named_at_their_ends_in_their_colours_without_titles_or_legends(tmp_path, monkeypatch):
    runs = {"one": make(tmp_path / "one"), "two": make(tmp_path / "two", rounds=2)}
    _, figures = drawn(monkeypatch, runs, tmp_path)
    axes = figures["loss_by_tokens"].axes[0]
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        name: line.get_color() for name, line in zip(runs, axes.lines, strict=True)
    }
    for figure in figures.values():
        assert not figure.axes[0].get_title()
        assert figure.axes[0].get_legend() is None
        assert figure.get_figwidth() == 3.25


def test_what_a_figure_cannot_show_is_left_out_and_said(tmp_path, monkeypatch):
    runs = {
        "records": make(tmp_path / "records", unit="record"),
        "patients": make(tmp_path / "patients", unit="patient"),
        "central": make(tmp_path / "central", nbytes=0),
        "base": tmp_path / "base",
    }
    written, figures = drawn(monkeypatch, runs, tmp_path)
    assert [text.get_text() for text in figures["loss_by_epsilon"].axes[0].texts] == ["records"]
    assert figures["loss_by_epsilon"].axes[0].get_xlabel() == "epsilon spent (±1 record, delta 1e-05)"
    assert len(figures["loss_by_bytes"].axes[0].lines) == 2
    assert written.notes == (
        "base trained nothing: it has no curve",
        "loss_by_bytes leaves out central: there are no bytes",
        "loss_by_epsilon leaves out patients (+/-1 patient, delta 1e-05): another guarantee",
    )
    assert "loss_by_epsilon" not in drawn(monkeypatch, {"central": runs["central"]}, tmp_path)[1]


def test_final_figures_have_a_row_for_each_run_that_has_them(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(compare_figures, "_saved", lambda figure, stem: figures.setdefault(stem.name, figure) and [])
    chosen = run(nll=2.0, choice_accuracy=0.5, choice_accuracy_low=0.25, choice_accuracy_high=0.75)
    write_figures(comparison(one=run(), two=chosen), {"one": tmp_path, "two": tmp_path}, tmp_path)
    assert set(figures) == {"final_nll", "final_token_accuracy", "final_choice_accuracy"}
    assert [line[0] for line in lines_of(figures["final_nll"])] == [[2.5, 0], [2.0, 1]]
    (interval,) = figures["final_choice_accuracy"].axes[0].collections
    assert interval.get_segments()[0].tolist() == [[25, 0], [75, 0]]


def test_files_are_there_in_both_formats_with_text_that_can_be_searched(tmp_path):
    runs = {"one": make(tmp_path / "one")}
    files = write_figures(comparison(one=run()), runs, tmp_path / "out").files
    assert {path.name for path in files} == {
        f"{stem}.{end}" for stem in ("loss_by_tokens", "loss_by_bytes", "final_nll", "final_token_accuracy")
        for end in ("pdf", "png")
    }  # fmt: skip
    first = {path.name: path.read_bytes() for path in files}
    assert all(data[:4] == b"%PDF" for name, data in first.items() if name.endswith("pdf"))
    assert b"/FontFile2" in first["final_nll.pdf"]  # TrueType, which submission systems ask for
    assert not re.search(b"/Subtype /Type3", first["final_nll.pdf"])
    again = write_figures(comparison(one=run()), runs, tmp_path / "again").files
    assert {path.name: path.read_bytes() for path in again} == first


def test_runs_that_colours_and_dashes_cannot_tell_apart_are_too_many(tmp_path):
    runs = {str(number): tmp_path for number in range(25)}
    with pytest.raises(UserError, match="25 runs are too many for one figure, which can tell 24 apart"):
        write_figures(comparison(**{name: run() for name in runs}), runs, tmp_path)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_running_mean_is_centred_everywhere(width):
    line = np.arange(20.0)
    assert running_mean(line, width) == pytest.approx(line)  # a line stays: no lag, not even at the ends
    noisy = np.random.default_rng(0).normal(size=20)
    assert running_mean(noisy, width)[10] == pytest.approx(noisy[10 - width // 2 : 11 + width // 2].mean())


def test_labels_keep_their_distance_and_move_no_more_than_they_must():
    for seed in range(20):
        values = sorted(np.random.default_rng(seed).uniform(0, 3, 6))
        places = apart(values, 0.5)
        assert np.all(np.diff(places) > 0.5 - 1e-9)
        assert np.mean(places) == pytest.approx(np.mean(values))
    assert apart([0.0, 1.0, 5.0], 0.5) == [0.0, 1.0, 5.0]


def test_labels_are_short_and_never_the_same():
    assert labels(["runs/x/one/seed-0", "runs/x/two/seed-0", "own"], 16) == {
        "runs/x/one/seed-0": "one", "runs/x/two/seed-0": "two", "own": "own",
    }  # fmt: skip
    long = ["federated-with-noise-4", "federated-with-noise-8"]
    assert list(labels(long, 16).values()) == ["federat…noise-4", "federat…noise-8"]
    same = ["a" * 10 + end + "b" * 10 for end in "xy"]
    assert list(labels(same, 12).values()) == same
