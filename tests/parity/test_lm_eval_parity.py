"""The same weights in lm-eval, once as its own ``hf`` model and once as ours: the same scores, windows and texts."""

import json

import numpy as np
import pytest
from tiny import tiny_adapters, tiny_folder

from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load
from fedjax_llm.peft import write_adapter

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
ours_module = pytest.importorskip("fedjax_llm.experiment.lm_eval_model")
tasks_module = pytest.importorskip("lm_eval.tasks")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
KIND = Lora(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: ["e", "xyz"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, an adapter, and three tasks with their data."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tiny_folder(
        folder / "model", model_type="llama", num_hidden_layers=1, bos_token_id=None, eos_token_id=2, pad_token_id=2
    )
    model = load(str(folder / "model")).model
    write_adapter(folder / "adapter", tiny_adapters(model, targets=KIND.targets), KIND, "tiny", model)
    rng = np.random.default_rng(0)
    words = ["heart", "lung", "tumour", "gene", "fever", "renal", "naïve", "12 mg", "Übelkeit"]

    def said(count):
        return " ".join(rng.choice(words, count))

    rows = [
        {
            "question": said(int(rng.integers(1, 12))),
            "options": [said(int(rng.integers(1, 4))) for _ in range(4)],
            "answer": int(rng.integers(4)),
            "text": said(int(rng.integers(1, 40))),
        }
        for _ in range(9)
    ]
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(path=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Keeps the data sets' cache to these tests, and the compilation cache out of them."""
    patch = pytest.MonkeyPatch()
    import datasets

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    patch.setattr(ours_module, "use_compilation_cache", lambda: None)
    yield
    patch.undo()


def evaluated(places, model, model_args, task, **options):
    manager = tasks_module.TaskManager(include_path=str(places / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[task],
        task_manager=manager,
        bootstrap_iters=0,
        device="cpu",
        **options,
    )
    scores = {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return scores, [sample["resps"] for sample in samples]


def both(places, task, adapted, **options):
    common, tuned = f"batch_size=9,max_length={options.pop('length', 64)}", f",peft={places / 'adapter'}"
    theirs = f"pretrained={places / 'model'},dtype=float32,{common}" + (tuned if adapted else "")
    ours = f"model={places / 'model'},{common}" + (f",adapter={places / 'adapter'}" if adapted else "")
    return evaluated(places, "hf", theirs, task, **options), evaluated(places, "fedjax_llm", ours, task, **options)


@pytest.mark.parametrize("adapted", [False, True])
def test_choices_are_scored_alike(places, adapted):
    """Contexts that are too long for 64 tokens among them."""
    (their_scores, theirs), (our_scores, ours) = both(places, "tiny_choice", adapted)
    assert our_scores == their_scores
    assert 0 < our_scores["acc,none"] < 1
    for one, other in zip(theirs, ours, strict=True):
        values = [np.array([answer[0][0] for answer in answers], float) for answers in (one, other)]
        np.testing.assert_allclose(*values, atol=TOLERANCE)
        assert [answer[0][1] for answer in one] == [answer[0][1] for answer in other]


def test_the_adapter_matters(places):
    (_, before), (_, after) = (evaluated(places, "fedjax_llm", args, "tiny_choice") for args in arguments(places))
    assert abs(float(before[0][0][0][0]) - float(after[0][0][0][0])) > 0.1


def arguments(places):
    yield f"model={places / 'model'}"
    yield f"model={places / 'model'},adapter={places / 'adapter'}"


@pytest.mark.parametrize("length", [64, 512])
def test_whole_texts_are_scored_alike_in_windows(places, length):
    (their_scores, theirs), (our_scores, ours) = both(places, "tiny_rolling", True, length=length)
    values = [np.array([float(np.ravel(answer)[0]) for answer in answers]) for answers in (theirs, ours)]
    np.testing.assert_allclose(*values, atol=TOLERANCE)
    assert our_scores.keys() == their_scores.keys()
    for name, value in their_scores.items():
        assert our_scores[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_texts_are_the_same(places, adapted):
    (_, theirs), (_, ours) = both(places, "tiny_writing", adapted)
    assert ours == theirs
    assert len({answer[0][0] for answer in ours}) > 3


def test_chats_are_rendered_alike(places):
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "length": 512}
    (their_scores, theirs), (our_scores, ours) = both(places, "tiny_writing", False, **options)
    assert (their_scores, theirs) == (our_scores, ours)
    plain = both(places, "tiny_writing", False)[1]
    assert plain[1] != ours
