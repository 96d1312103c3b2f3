"""Medical multiple choice as it is published: PubMedQA, MedMCQA, MedQA, CareQA, and the medical subjects of MMLU.

Sources: Jin et al. 2019 (arXiv 1909.06146), Pal et al. 2022 (2203.14371), Jin et al. 2020 (2009.13081), Arias-Duart et
al. 2025 (2502.06666), Hendrycks et al. 2021 (2009.03300). The files are those of the authors or of the hub; nothing of
them is part of this project.
"""

import ast
import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedjax_llm.data.benchmark_files import SUFFIXES, read_rows
from fedjax_llm.data.choice import guesses
from fedjax_llm.data.hub import HubDataset
from fedjax_llm.data.records import ChoiceQuestion, Message
from fedjax_llm.data.table import Row
from fedjax_llm.errors import UserError

Name = Literal["pubmedqa", "medmcqa", "medqa", "careqa", "mmlu"]
Form = Literal["letters", "answers"]
MMLU_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
_DECISIONS = ("yes", "no", "maybe")
_MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")


@dataclass(frozen=True)
class MedicalQuestion:
    """One question, whatever file it came from.

    Attributes:
      id: of the benchmark where it has ids, else a hash of question and options.
      question: what is asked.
      context: what it is asked about (the abstract, in PubMedQA), else empty.
      options: the answers to choose from, in the benchmark's order.
      answer: which is right.
      subject: of MMLU, else empty.
    """

    id: str
    question: str
    context: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""


@dataclass(frozen=True)
class MedicalChoice:
    """A benchmark, from local files or from the hub.

    Attributes:
      name: of the benchmark.
      path: its file (.json, .jsonl, .csv, .parquet), for MMLU a folder of them; without it, the hub is asked (extra
        ``hub``).
      split: which part: ``test``, but ``validation`` of MedMCQA, whose test keys are not published, and the labelled
        questions of PubMedQA, which the hub calls ``train``.
      only: a JSON file with ids to restrict it to, such as PubMedQA's ``test_ground_truth.json``.
      most: questions at most, chosen by a hash of their ids; all if not given.
      first_option: what MedMCQA and CareQA call their first option, 0 or 1; without it, it is read off the file.
      revision: of the hub's dataset: a commit, tag or branch.
    """

    name: Name = "pubmedqa"
    path: str | None = None
    split: str | None = None
    only: str | None = None
    most: int | None = None
    first_option: Literal[0, 1] | None = None
    revision: str | None = None

    def load(self) -> tuple[MedicalQuestion, ...]:
        """Reads the questions, in the benchmark's order; equal ones are kept once.

        Raises:
          UserError: there is no such file, the hub cannot be reached, or a row is not of the benchmark's form.
        """
        if self.most is not None and self.most < 1:
            raise UserError(f"benchmark.most is {self.most}; it must be at least 1")
        rows = list(self._rows())
        first = self._first_option(rows)
        parsed = (_PUBLISHED[self.name].parse(where, row, first) for where, row in rows)
        found = {question.id: question for question in parsed}
        if self.only is not None:
            wanted = set(_ids(Path(self.only).expanduser()))
            found = {key: question for key, question in found.items() if key in wanted}
            if not found:
                raise UserError(f"{self.only}: none of its {len(wanted)} ids is that of a question of {self.name}")
        if self.most is not None:
            chosen = sorted(found, key=lambda key: hashlib.sha256(key.encode()).digest())[: self.most]
            found = {key: question for key, question in found.items() if key in set(chosen)}
        return tuple(found.values())

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """(where, row) from files or from the hub; MMLU's rows are told their subject."""
        published = _PUBLISHED[self.name]
        split = self.split or published.split
        if self.path is None:
            for subset in published.subsets:
                source = HubDataset(published.hub, subset, split, self.revision)
                where = f"{published.hub}[{split}]"
                yield from ((f"{where} row {number}", row) for number, row in enumerate(source.table()))
            return
        path = Path(self.path).expanduser()
        if self.name == "mmlu":
            for subject, file in _mmlu_files(path, split):
                for where, row in read_rows(file, _MMLU_COLUMNS):
                    if (row.get("subject") or subject) in MMLU_SUBJECTS:
                        yield where, {"subject": subject, **row}
            return
        if path.is_dir():
            files = ", ".join(sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[:10])
            raise UserError(f"{path} is a folder; name the file of {self.name} in it (it holds: {files or 'none'})")
        yield from read_rows(path)

    def _first_option(self, rows: Sequence[tuple[str, Row]]) -> int:
        """What ``cop`` calls the first option: the authors' files count from one, the hub's of MedMCQA from zero."""
        if self.first_option is not None or self.name not in ("medmcqa", "careqa"):
            return self.first_option or 0
        keys = {int(str(row["cop"])) for _, row in rows if str(row.get("cop", "")).lstrip("-").isdigit()}
        if keys & {0, 4} in ({0}, {4}):
            return 1 if 4 in keys else 0
        raise UserError(
            f"the column cop of {self.path or self.name} holds {sorted(keys)}, which does not say whether the first "
            "option is 0 or 1; set benchmark.first_option"
        )


def as_choice(question: MedicalQuestion, form: Form) -> ChoiceQuestion:
    """The question as a chat whose answers are scored by their likelihood.

    Args:
      question: any.
      form: ``letters``: the options stand in the prompt and the answers are A, B, ...; ``answers``: the prompt has the
        question alone, and the options are the answers.
    """
    asked = f"{question.context}\n\n{question.question}".strip()
    letters = string.ascii_uppercase[: len(question.options)]
    if form == "letters":
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, question.options, strict=True))
        asked = f"{asked}\n\n{listed}\n\nAnswer with the letter of the right option."
        options: tuple[str, ...] = tuple(letters)
    else:
        options = question.options
        if options == _DECISIONS:
            asked = f"{asked}\n\nAnswer yes, no or maybe."
    known = guesses(question.options, question.answer, asked if form == "answers" else question.question)
    return ChoiceQuestion(question.id, (Message("user", asked),), options, question.answer, known)


def most_frequent(questions: Sequence[MedicalQuestion]) -> float:
    """The score of a guesser who always takes the place that is right most often, and is told which that is."""
    return max(Counter(question.answer for question in questions).values()) / len(questions)


def _pubmedqa(where: str, row: Row, first: int) -> MedicalQuestion:
    """The authors' JSON, or the hub's rows: yes, no or maybe, about an abstract."""
    context = _any(where, row, "CONTEXTS", "context")
    if isinstance(context, str) and context.lstrip().startswith(("{", "[")):
        context = _decoded(where, context)
    if isinstance(context, Mapping):
        context = context.get("contexts", "")
    text = context if isinstance(context, str) else "\n".join(map(str, context))
    decision = str(_any(where, row, "final_decision")).strip().lower()
    if decision not in _DECISIONS:
        raise UserError(f"{where}: final_decision is {decision!r}; it must be yes, no or maybe")
    question = str(_any(where, row, "QUESTION", "question"))
    return _named(row, MedicalQuestion("", question, text, _DECISIONS, _DECISIONS.index(decision)))


def _by_number(*columns: str) -> Callable[[str, Row, int], MedicalQuestion]:
    """Four columns of options, and ``cop``, the number of the right one."""

    def parse(where: str, row: Row, first: int) -> MedicalQuestion:
        options = tuple(str(_any(where, row, column)) for column in columns)
        key = str(_any(where, row, "cop"))
        if not key.lstrip("-").isdigit() or not 0 <= int(key) - first < len(options):
            raise UserError(
                f"{where}: cop is {key}, no option; the test split of MedMCQA is published without keys: take "
                "validation"
            )
        return _named(row, MedicalQuestion("", str(_any(where, row, "question")), "", options, int(key) - first))

    return parse


def _medqa(where: str, row: Row, first: int) -> MedicalQuestion:
    """Options by letter, as an object or as a list of ``{"key", "value"}``; the key as a letter or as the text."""
    options = _any(where, row, "options")
    if isinstance(options, str):
        options = _decoded(where, options)
    if isinstance(options, Mapping):
        pairs = [(str(key), str(value)) for key, value in options.items() if value is not None]
    else:
        pairs = [(str(one["key"]), str(one["value"])) for one in options]
    letters, texts = zip(*pairs, strict=True)
    letter = str(row.get("answer_idx") or "")
    right = letters.index(letter) if letter in letters else _place(where, str(_any(where, row, "answer")), texts)
    return _named(row, MedicalQuestion("", str(_any(where, row, "question")), "", texts, right))


def _mmlu(where: str, row: Row, first: int) -> MedicalQuestion:
    """The authors' columns A to D with a letter, or the hub's list with a number."""
    if row.get("choices") is None:
        choices = [_any(where, row, letter) for letter in "ABCD"]
    else:
        choices = _any(where, row, "choices")
    options = tuple(map(str, _decoded(where, choices) if isinstance(choices, str) else choices))
    key = str(_any(where, row, "answer")).strip()
    letters = string.ascii_uppercase[: len(options)]
    right = int(key) if key.isdigit() and int(key) < len(options) else _place(where, key, tuple(letters))
    subject = str(row.get("subject", ""))
    return _named(row, MedicalQuestion("", str(_any(where, row, "question")), "", options, right, subject))


class _Published(NamedTuple):
    """Where a benchmark is on the hub, and how a row of it is read."""

    hub: str
    subsets: tuple[str | None, ...]
    split: str
    parse: Callable[[str, Row, int], MedicalQuestion]


_PUBLISHED: dict[Name, _Published] = {
    "pubmedqa": _Published("qiaojin/PubMedQA", ("pqa_labeled",), "train", _pubmedqa),
    "medmcqa": _Published("openlifescienceai/medmcqa", (None,), "validation", _by_number("opa", "opb", "opc", "opd")),
    "medqa": _Published("GBaker/MedQA-USMLE-4-options", (None,), "test", _medqa),
    "careqa": _Published("HPAI-BSC/CareQA", ("CareQA_en",), "test", _by_number("op1", "op2", "op3", "op4")),
    "mmlu": _Published("cais/mmlu", MMLU_SUBJECTS, "test", _mmlu),
}


def _mmlu_files(path: Path, split: str) -> Iterable[tuple[str, Path]]:
    """(subject, file): one subject's file, or the medical ones of a folder that is laid out as authors or hub do."""
    if path.is_file():
        return [(path.stem.removesuffix(f"_{split}"), path)]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
    found = [
        (subject, file)
        for subject in MMLU_SUBJECTS
        for file in files
        if file.stem in (subject, f"{subject}_{split}")
        or (file.parent.name == subject and file.stem.split("-")[0] == split)
    ]
    if not found:
        raise UserError(f"{path}: no file such as anatomy_{split}.csv or anatomy/{split}-*.parquet")
    return found


def _any(where: str, row: Row, *columns: str) -> Any:
    """The value of the first of these columns that the row has."""
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    raise UserError(f"{where}: no column {' or '.join(columns)}; the columns are: {', '.join(sorted(map(str, row)))}")


def _place(where: str, wanted: str, options: Sequence[str]) -> int:
    """Which option a key names."""
    if wanted not in options:
        raise UserError(f"{where}: the answer {wanted!r} is none of the options {', '.join(map(repr, options))}")
    return options.index(wanted)


def _decoded(where: str, text: str) -> Any:
    """A list or an object that a CSV file holds as text, JSON or as Python prints it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    raise UserError(f"{where}: {text[:60]!r} is neither JSON nor a Python literal")


def _named(row: Row, question: MedicalQuestion) -> MedicalQuestion:
    """The question with the row's id, or with a hash of its content."""
    for column in ("id", "pubid", "PMID"):
        if row.get(column) not in (None, ""):
            return replace(question, id=str(row[column]))
    content = json.dumps([question.subject, question.context, question.question, question.options])
    return replace(question, id=hashlib.sha256(content.encode()).hexdigest()[:16])


def _ids(path: Path) -> Iterable[str]:
    """The ids in a JSON file: a list, or the keys of an object."""
    try:
        return [str(one) for one in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON list of ids, and no JSON object with ids as keys: {error}") from error
