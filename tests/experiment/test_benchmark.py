"""A benchmark on a tiny model: what is scored, kept and shown, against NumPy and one question after the other."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_adapters, tiny_base

from fedjax_llm.data.medical_choice import MedicalChoice, as_choice
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation import flowertune
from fedjax_llm.experiment.benchmark import Scoring, keep, run_benchmark, table_rows
from fedjax_llm.experiment.tuned import TunedModel
from fedjax_llm.lora import Lora
from fedjax_llm.models.decoding import generate

KIND = Lora(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))
BASE = tiny_base(layers=1, context=1600)
TUNED = TunedModel(BASE, KIND, tiny_adapters(BASE.model, targets=KIND.targets), "Be brief.")


@contextlib.contextmanager
def silent(name, total):
    yield lambda count: None


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    rng = np.random.default_rng(3)
    words = ["heart", "lung", "gene", "fever", "renal", "skin"]
    rows = [
        {"id": str(n), "question": f"Which {rng.choice(words)} {n}?", "cop": int(rng.integers(4)) if n else 0}
        | {f"op{letter}": " ".join(rng.choice(words, int(rng.integers(1, 4)))) for letter in "abcd"}
        for n in range(6)
    ]
    path = tmp_path_factory.mktemp("data") / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MedicalChoice("medmcqa", str(path), first_option=0)


@pytest.fixture(scope="module")
def found(benchmark):
    return run_benchmark(TUNED, benchmark, Scoring(("letters", "answers", "match"), 4096, 2), silent)


def likeliest(question, adapters, system):
    """Each option alone behind the prompt, in one forward pass, with NumPy's softmax in f64."""
    turns = ([f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []) + [
        f"<|im_start|>user\n{question.messages[0].content}<|im_end|>\n<|im_start|>assistant\n"
    ]
    prompt, scores = BASE.tokenizer.encode("".join(turns)), []
    for option in question.options:
        answer = BASE.tokenizer.encode(option)
        tokens = np.zeros((1, 320), np.int32)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        hidden = BASE.model.hidden(BASE.params, adapters, jnp.asarray(tokens))
        logits = np.asarray(BASE.model.logits(BASE.params, hidden[0]), np.float64)
        rows = logits[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        own = rows[np.arange(len(answer)), answer] - np.log(np.exp(rows).sum(axis=1))
        scores.append(own.mean())
    return int(np.argmax(scores))


@pytest.mark.parametrize("form", ["letters", "answers"])
def test_answers_are_the_likeliest_options(found, benchmark, form):
    asked = [as_choice(question, form) for question in benchmark.load()]
    for voice, adapters in (("base", {}), ("tuned", TUNED.scaled)):
        wanted = [int(likeliest(question, adapters, "Be brief.") == question.answer) for question in asked]
        assert found["forms"][form][voice] == wanted


def test_the_tuned_model_is_another(found):
    assert any(found["forms"][form]["base"] != found["forms"][form]["tuned"] for form in ("letters", "answers")) or (
        found["forms"]["match"]["written"]["base"] != found["forms"]["match"]["written"]["tuned"]
    )


def test_what_is_generated_is_matched(found, benchmark):
    """With the prompt of FlowerTune, not the model's template, and one token for a letter."""
    match, questions = found["forms"]["match"], benchmark.load()
    for voice, adapters in (("base", {}), ("tuned", TUNED.scaled)):
        prompts = [BASE.tokenizer.encode(flowertune.prompt("medmcqa", question)) for question in questions]
        options = {"max_new_tokens": 1, "end_ids": BASE.tokenizer.end_ids, "pad_id": 0}
        made = generate(BASE.model, BASE.params, adapters, prompts, **options)
        # Special tokens are dropped from the text, as there.
        texts = [BASE.tokenizer.backend.decode(tokens, skip_special_tokens=True) for tokens in made]
        assert match["written"][voice] == texts
        keys = [flowertune.key("medmcqa", question) for question in questions]
        assert match[voice] == [
            int(flowertune.matches("medmcqa", text, key)) for text, key in zip(texts, keys, strict=True)
        ]


def test_guessers_are_beside(found, benchmark):
    questions = benchmark.load()
    guessers = found["forms"]["answers"]["guessers"]
    assert guessers["chance"] == 0.25
    places = [question.answer for question in questions]
    assert guessers["most_frequent"] == max(map(places.count, range(4))) / 6
    longest = [as_choice(question, "answers").guesses["longest"] for question in questions]
    assert guessers["longest"] == pytest.approx(np.mean(longest))
    assert set(found["forms"]["match"]["guessers"]) == {"chance", "most_frequent"}


def test_the_table_has_intervals_and_a_paired_difference(found):
    rows = table_rows(
        {"forms": {"letters": {**found["forms"]["letters"], "base": [0, 0, 1, 1], "tuned": [1, 0, 1, 1]}}}
    )
    ((title, count, base, tuned, change, _),) = rows
    assert (title, count) == ("likeliest letter", "4")
    assert base == "50.0% [6.8%, 93.2%]"  # Clopper and Pearson's, from tables
    assert tuned == "75.0% [19.4%, 99.4%]"
    assert change == "+25.0% [+0.0%, +75.0%]"


def test_what_is_kept_can_be_read_again(found, tmp_path):
    path = keep(tmp_path, found)
    assert path == tmp_path / "benchmarks" / "medmcqa.json"
    read = json.loads(path.read_text())
    assert table_rows(read) == table_rows(found)
    assert read["questions"] == [str(n) for n in range(6)]


def test_without_an_adapter_the_base_model_stands_alone(benchmark):
    alone = run_benchmark(TunedModel(BASE, system="Be brief."), benchmark, Scoring(("letters",)), silent)
    assert "tuned" not in alone["forms"]["letters"]
    assert table_rows(alone)[0][3:5] == ("-", "-")


def test_questions_that_do_not_fit_are_left_out_and_counted(benchmark, tmp_path):
    short = TunedModel(tiny_base(layers=1, context=140))
    long = {"id": "long", "question": "Why " * 60 + "?", "cop": 0, "opa": "a", "opb": "b", "opc": "c", "opd": "d"}
    brief = long | {"id": "brief", "question": "Why?"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(brief) + "\n")
    source = MedicalChoice("medmcqa", str(tmp_path / "dev.jsonl"), first_option=0)
    found = run_benchmark(short, source, Scoring(("answers",)), silent)
    assert found["forms"]["answers"]["left_out"] == ["long"]
    assert table_rows(found)[0][1] == "1 (1 too long)"
    with pytest.raises(UserError, match="every question is longer than the model's context of 140"):
        run_benchmark(short, source, Scoring(("match",)), silent)


def test_impossible_settings_are_told_before_the_questions_are_read():
    with pytest.raises(UserError, match="does not evaluate mmlu"):
        run_benchmark(TUNED, MedicalChoice("mmlu", "none"), Scoring(("match",)), silent)
    with pytest.raises(UserError, match=r"scoring\.forms is empty"):
        Scoring(())
    with pytest.raises(UserError, match=r"scoring\.buckets is 0"):
        Scoring(buckets=0)
