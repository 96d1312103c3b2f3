"""Every benchmark, in every form that it is published in, gives the same questions."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest

from fedjax_llm.data import hub
from fedjax_llm.data.benchmark_files import read_rows
from fedjax_llm.data.medical_choice import MMLU_SUBJECTS, MedicalChoice, MedicalQuestion, as_choice, most_frequent
from fedjax_llm.errors import UserError

PUBMED = {
    "21645374": {
        "QUESTION": "Do mitochondria play a role?",
        "CONTEXTS": ["Lace plants.", "They have holes."],
        "LABELS": ["BACKGROUND", "RESULTS"],
        "final_decision": "yes",
        "LONG_ANSWER": "They do.",
    },
    "16418930": {"QUESTION": "Is it safe?", "CONTEXTS": ["A trial."], "final_decision": "maybe", "LONG_ANSWER": "?"},
}
PUBMED_QUESTIONS = (
    MedicalQuestion(
        "21645374", "Do mitochondria play a role?", "Lace plants.\nThey have holes.", ("yes", "no", "maybe"), 0
    ),
    MedicalQuestion("16418930", "Is it safe?", "A trial.", ("yes", "no", "maybe"), 2),
)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str | int) else repr(value) for key, value in row.items()} for row in rows
    )
    return out.getvalue()


def pubmed_hub():
    return [
        {
            "pubid": int(key),
            "question": row["QUESTION"],
            "context": {"contexts": row["CONTEXTS"], "meshes": []},
            "final_decision": row["final_decision"],
        }
        for key, row in PUBMED.items()
    ]


PUBMED_FILES = {
    "ori_pqal.json": json.dumps(PUBMED),
    "hub.jsonl": lines(pubmed_hub()),
    "hub.json": json.dumps(pubmed_hub()),
    "hub.csv": table(pubmed_hub()),
    "plain.jsonl": lines({**row, "context": "\n".join(row["context"]["contexts"])} for row in pubmed_hub()),
}


@pytest.mark.parametrize("name", PUBMED_FILES)
def test_pubmedqa(tmp_path, name):
    (tmp_path / name).write_text(PUBMED_FILES[name])
    assert MedicalChoice("pubmedqa", str(tmp_path / name)).load() == PUBMED_QUESTIONS


def test_pubmedqas_official_test_set_restricts_it(tmp_path):
    (tmp_path / "ori_pqal.json").write_text(json.dumps(PUBMED))
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"16418930": "maybe", "1": "no"}))
    source = MedicalChoice("pubmedqa", str(tmp_path / "ori_pqal.json"), only=str(tmp_path / "test_ground_truth.json"))
    assert source.load() == PUBMED_QUESTIONS[1:]
    (tmp_path / "test_ground_truth.json").write_text(json.dumps(["7"]))
    with pytest.raises(UserError, match="none of its 1 ids"):
        source.load()


def medmcqa(first):
    letters = ("opa", "opb", "opc", "opd")
    return [
        {"id": f"q{number}", "question": f"Which {number}?", "cop": number + first, "subject_name": "Anatomy"}
        | {letter: f"{letter} {number}" for letter in letters}
        for number in range(4)
    ]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["dev.json", "dev.jsonl", "dev.csv"])
def test_medmcqa_counts_options_from_zero_or_from_one(tmp_path, first, name):
    """The authors' ``dev.json`` is JSON Lines in spite of its name."""
    (tmp_path / name).write_text(table(medmcqa(first)) if name.endswith("csv") else lines(medmcqa(first)))
    found = MedicalChoice("medmcqa", str(tmp_path / name)).load()
    assert [question.answer for question in found] == [0, 1, 2, 3]
    assert found[2] == MedicalQuestion("q2", "Which 2?", "", ("opa 2", "opb 2", "opc 2", "opd 2"), 2)


def test_where_the_first_option_cannot_be_told_it_is_asked_for(tmp_path):
    (tmp_path / "dev.json").write_text(lines(medmcqa(0)[1:3]))
    with pytest.raises(UserError, match=r"\[1, 2\].*benchmark\.first_option"):
        MedicalChoice("medmcqa", str(tmp_path / "dev.json")).load()
    (question, _) = MedicalChoice("medmcqa", str(tmp_path / "dev.json"), first_option=1).load()
    assert question.answer == 0
    (tmp_path / "test.json").write_text(lines([medmcqa(0)[0] | {"cop": -1}, medmcqa(0)[0]]))
    with pytest.raises(UserError, match=r"test\.json:1: cop is -1, no option; the test split"):
        MedicalChoice("medmcqa", str(tmp_path / "test.json")).load()


def medqa():
    question = {"question": "A fever of 39 °C?", "answer": "Sepsis", "answer_idx": "C", "meta_info": "step1"}
    texts = {"A": "Flu", "B": "Cold", "C": "Sepsis", "D": "Gout"}
    listed = [{"key": letter, "value": text} for letter, text in texts.items()]
    yield question | {"options": texts}
    yield question | {"options": listed}
    yield {"question": question["question"], "answer": "Sepsis", "options": listed}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_medqa(tmp_path, place, suffix):
    row = list(medqa())[place]
    (tmp_path / f"test.{suffix}").write_text(table([row]) if suffix == "csv" else lines([row]))
    (found,) = MedicalChoice("medqa", str(tmp_path / f"test.{suffix}")).load()
    assert (found.question, found.options, found.answer) == ("A fever of 39 °C?", ("Flu", "Cold", "Sepsis", "Gout"), 2)


def test_careqa(tmp_path):
    row = {"exam_id": 1, "question": "Who?", "op1": "a", "op2": "b", "op3": "c", "op4": "d", "cop": 4}
    (tmp_path / "careqa.jsonl").write_text(lines([row, row | {"question": "What?", "cop": 1}]))
    assert [one.answer for one in MedicalChoice("careqa", str(tmp_path / "careqa.jsonl")).load()] == [3, 0]


def test_mmlu_from_the_authors_folder(tmp_path):
    """Without header, with commas in quotes; only medical subjects, only the split."""
    for name in ("anatomy_test", "anatomy_dev", "virology_test", "college_medicine_test"):
        (tmp_path / f"{name}.csv").write_text(f'"{name}, which?",one,two,"three, or four",five,C\n')
    found = MedicalChoice("mmlu", str(tmp_path)).load()
    assert [(question.subject, question.question) for question in found] == [
        ("anatomy", "anatomy_test, which?"),
        ("college_medicine", "college_medicine_test, which?"),
    ]
    assert found[0].options == ("one", "two", "three, or four", "five")
    assert found[0].answer == 2
    (dev,) = MedicalChoice("mmlu", str(tmp_path), split="dev").load()
    assert dev.question == "anatomy_dev, which?"
    (alone,) = MedicalChoice("mmlu", str(tmp_path / "anatomy_test.csv")).load()
    assert alone == found[0]


def test_mmlu_as_the_hub_lays_it_out(tmp_path):
    row = {"question": "Which?", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 3}
    (tmp_path / "anatomy").mkdir()
    (tmp_path / "anatomy" / "test-00000-of-00001.jsonl").write_text(lines([row]))
    (found,) = MedicalChoice("mmlu", str(tmp_path)).load()
    assert (found.subject, found.options, found.answer) == ("anatomy", ("w", "x", "y", "z"), 3)
    (tmp_path / "all.jsonl").write_text(lines([row, row | {"subject": "astronomy"}]))
    assert MedicalChoice("mmlu", str(tmp_path / "all.jsonl")).load() == (found,)
    with pytest.raises(UserError, match=r"no file such as anatomy_validation\.csv"):
        MedicalChoice("mmlu", str(tmp_path), split="validation").load()


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra 'hub' brings pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(pubmed_hub()), tmp_path / "train.parquet")
    assert MedicalChoice("pubmedqa", str(tmp_path / "train.parquet")).load() == PUBMED_QUESTIONS


def test_parquet_without_its_package_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'fedjax_llm\[hub\]'"):
        list(read_rows(tmp_path / "a.parquet"))


def test_from_the_hub(monkeypatch):
    """What is asked for, and that its rows are read as those of files are."""
    asked = []

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        return pubmed_hub() if "PubMedQA" in name else [{"question": subset, "choices": list("wxyz"), "answer": 1}]

    monkeypatch.setattr(hub.importlib, "import_module", lambda name: SimpleNamespace(load_dataset=load_dataset))
    assert MedicalChoice("pubmedqa", revision="abc").load() == PUBMED_QUESTIONS
    assert len(MedicalChoice("mmlu").load()) == len(MMLU_SUBJECTS)
    assert asked[0] == ("qiaojin/PubMedQA", "pqa_labeled", "train", "abc")
    assert asked[1:] == [("cais/mmlu", subject, "test", None) for subject in MMLU_SUBJECTS]


def test_a_part_is_chosen_by_hash_and_equal_questions_count_once(tmp_path):
    rows = medmcqa(0)
    (tmp_path / "dev.json").write_text(lines([*rows, rows[0]]))
    every = MedicalChoice("medmcqa", str(tmp_path / "dev.json")).load()
    assert len(every) == 4
    two = MedicalChoice("medmcqa", str(tmp_path / "dev.json"), most=2).load()
    three = MedicalChoice("medmcqa", str(tmp_path / "dev.json"), most=3).load()
    assert len(two) == 2
    assert set(two) < set(three) < set(every)
    with pytest.raises(UserError, match=r"benchmark\.most is 0"):
        MedicalChoice("medmcqa", str(tmp_path / "dev.json"), most=0).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json:1: not JSON"),
        ("a.json", "[1]", "a.json:1: an object"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", '{"question": "x"}', "no column CONTEXTS or context; the columns are: question"),
        ("a.jsonl", '{"context": "c", "final_decision": "perhaps", "question": "x"}', "'perhaps'; it must be yes"),
        ("a.csv", "question,context,final_decision\nx,c\n", "a.csv:2: 2 values for 3 columns"),
        ("a.txt", "", "must end in .json, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        MedicalChoice("pubmedqa", str(tmp_path / name)).load()
    with pytest.raises(UserError, match=rf"no such file; did you mean '{name}'"):
        MedicalChoice("pubmedqa", str(tmp_path / f"{name}x")).load()
    with pytest.raises(UserError, match="is a folder; name the file of pubmedqa"):
        MedicalChoice("pubmedqa", str(tmp_path)).load()


def test_both_forms_of_a_question():
    question = MedicalQuestion("1", "Which organ pumps?", "", ("lung", "the pumping organ"), 1)
    letters, answers = as_choice(question, "letters"), as_choice(question, "answers")
    (message,) = letters.messages
    assert message.content.startswith("Which organ pumps?\n\nA. lung\nB. the pumping organ\n\n")
    assert (letters.options, letters.answer) == (("A", "B"), 1)
    assert answers.messages[0].content == "Which organ pumps?"
    assert answers.options == question.options
    assert letters.guesses == answers.guesses == {"overlap": 1.0, "longest": 1.0}


def test_pubmedqa_says_what_to_answer():
    asked = as_choice(PUBMED_QUESTIONS[1], "answers").messages[0].content
    assert asked == "A trial.\n\nIs it safe?\n\nAnswer yes, no or maybe."
    assert most_frequent([*PUBMED_QUESTIONS, PUBMED_QUESTIONS[0]]) == 2 / 3
