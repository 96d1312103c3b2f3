"""Asking the model of a run, from its folder to the text on the screen."""

import json

import pytest
from tiny import tiny_adapters, tiny_folder

from experiments import ask
from fedjax_llm import lora, peft
from fedjax_llm.data.chat import encode_prompt
from fedjax_llm.data.records import Message
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora
from fedjax_llm.models.decoding import stream
from fedjax_llm.models.loading import load

KIND = Lora(rank=3, alpha=6.0, targets=("q_proj", "v_proj"))
NEW = 10


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture
def run(tmp_path, model_folder):
    """A run folder as a finished run leaves it."""
    config = {"model": {"name": str(model_folder), "dtype": "float32"}, "data": {"system": "Be brief."}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = load(str(model_folder))
    adapters = tiny_adapters(base.model, targets=KIND.targets)
    peft.write_adapter(tmp_path / "adapter", adapters, KIND, base.name, base.model)
    return tmp_path


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """Leaves the cache of the tests as it is."""
    monkeypatch.setattr(ask, "use_compilation_cache", lambda: None)


def expected(model_folder, question, adapted):
    base = load(str(model_folder))
    prompt = encode_prompt([Message("system", "Be brief."), Message("user", question)], base.tokenizer)
    adapters = lora.scaled(tiny_adapters(base.model, targets=KIND.targets), 2.0) if adapted else {}
    settings = {"max_new_tokens": NEW, "end_ids": base.tokenizer.end_ids}
    return base.tokenizer.decode(list(stream(base.model, base.params, adapters, prompt, **settings)))


def test_the_tuned_answer_and_the_base_models_beside_it(run, model_folder, capsys):
    tuned, base = (expected(model_folder, "Why?", adapted) for adapted in (True, False))
    assert tuned != base
    ask.main(run, "Why?", max_new_tokens=NEW)
    assert capsys.readouterr().out == f"{tuned}\n"
    ask.main(run, "Why?", base=True, max_new_tokens=NEW)
    assert capsys.readouterr().out == f"tuned: {tuned}\nbase: {base}\n"


def test_without_a_question_it_asks_until_an_empty_line(run, model_folder, capsys, monkeypatch):
    typed = iter(["Why?", "Who?", "", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    ask.main(run, max_new_tokens=NEW)
    assert capsys.readouterr().out == "".join(expected(model_folder, q, True) + "\n" for q in ("Why?", "Who?"))
    assert next(typed) == "never"


def test_the_end_of_the_input_ends_it(run, capsys, monkeypatch):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    ask.main(run, max_new_tokens=NEW)
    assert capsys.readouterr().out == ""


def test_sampling_follows_its_seed(run, capsys):
    def said(seed):
        ask.main(run, "Why?", max_new_tokens=NEW, temperature=1.0, seed=seed)
        return capsys.readouterr().out

    assert said(0) == said(0) != said(1)


def test_folders_that_cannot_be_asked(run, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"is not the folder of a run \(it has no config.json\)"):
        ask.open_run(empty)
    with pytest.raises(UserError, match="is not the folder of a run"):
        ask.open_run(empty / "absent")
    (empty / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no adapter yet.*--resume"):
        ask.open_run(empty)
    for setting, message in (("base", "evaluated the base model alone"), ("local", "every site for itself")):
        (empty / "config.json").write_text(json.dumps({"setting": setting}))
        with pytest.raises(UserError, match=message):
            ask.open_run(empty)
    (empty / "adapter").mkdir()
    with pytest.raises(UserError, match="not the configuration of a run: 'model' is missing"):
        ask.open_run(empty)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        ask.open_run(run)


def test_impossible_sampling_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="top_p is 2"):
        ask.main(tmp_path, "Why?", temperature=1.0, top_p=2.0)


@pytest.mark.model
def test_the_real_model_knows_the_capital_of_france():
    base = load("smollm2-135m-instruct")
    tuned = ask.TunedModel(base, {}, None)
    text = "".join(ask.answer(tuned, {}, "What is the capital of France?", 24, ask.Greedy()))
    assert "Paris" in text
