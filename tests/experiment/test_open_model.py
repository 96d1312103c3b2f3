"""Extraction from an open model on known ground: a tiny model that knows one text by heart, and no other."""

import io
import json
from dataclasses import replace

import numpy as np
import optax
import pytest
import tokenizers
from rich.console import Console
from tiny import tiny_base

from fedjax_llm.data.known_texts import KnownText
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import open_model
from fedjax_llm.experiment.open_model import COLUMNS, OpenModel, passages, rows, run_open_model
from fedjax_llm.training import whole

pytestmark = pytest.mark.usefixtures("short_reports")

SEED = 1  # a word of the first text that is to be continued is replaced
ATTACK = OpenModel("tiny", prefix=12, continuation=20, samples=2, temperature=0.3, letters=3, seed=SEED)
TEXTS = (
    KnownText("The flowerpot", "licence", "Permission to use the key is granted under the third flowerpot.", "a file"),
    KnownText("The river", "public domain", "Nobody shall carry any water from the river to those mills.", "a book"),
    KnownText("Too short", "licence", "To be continued.", "a file"),
)


@pytest.fixture(scope="module", autouse=True)
def known():
    """These texts are what there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_model, "known_texts", lambda: TEXTS)
        yield


@pytest.fixture(scope="module")
def base():
    """A model whose weights were trained on the first text."""
    plain = tiny_base(width=64)
    tokens = np.array(plain.tokenizer.encode(TEXTS[0].text)[:32], np.int32)
    optimizer = optax.adam(3e-3)
    state = whole.start(optimizer, plain.params, {}, "weights")
    for batch in whole.batches([EncodedExample("text", tokens, 1)], 1, 60, np.random.default_rng(0)):
        state, _ = whole.step(plain.model, 1.0, optimizer, "weights", state, whole.arrays_of(batch))
    return replace(plain, params=state.params)


def go(attack, folder, base):
    """The exit status, ``open_model.json`` and what the user saw."""
    seen = io.StringIO()
    status = run_open_model(attack, folder, Console(file=seen, width=220), lambda name, dtype: base)
    return status, json.loads((folder / "open_model.json").read_text()), seen.getvalue()


@pytest.fixture(scope="module")
def attacked(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("open") / "model"
    return folder, *go(ATTACK, folder, base)


def named(found, group):
    return [one for one in found["texts"] if one["group"] == group]


def test_what_it_knows_by_heart_is_given_back_in_full(attacked):
    _, status, found, _ = attacked
    assert status == 0
    (one,) = named(found, "licence")
    assert one["name"] == "The flowerpot"
    for name in ("tokens", "greedy_prefix", "generated_prefix", "longest_match"):
        assert one[name] == ATTACK.continuation, name
    assert one["prompt"] + one["true"] == TEXTS[0].text[:32]
    assert one["greedy"] == one["true"] == one["same"] == one["best_sample"]
    assert one["edit_similarity"] == 1.0
    assert one["sampled_prefixes"] == [ATTACK.continuation] * 2
    assert one["sampled_matches"] == 2
    assert one["nats_per_token"] < 0.1
    assert one["log_probability"] == pytest.approx(-one["nats_per_token"] * ATTACK.continuation, rel=1e-4)
    assert 1 <= one["tries_top_k"]["0.5"] <= one["tries"]["0.5"] <= 5


def test_controls_and_other_texts_are_not(attacked):
    _, _, found, _ = attacked
    others = [one for one in found["texts"] if one["group"] != "licence"]
    assert [len(named(found, group)) for group in ("public domain", "words replaced", "written now")] == [1, 2, 3]
    for one in others:
        assert one["generated_prefix"] < one["tokens"]
        assert one["sampled_matches"] == 0
        assert one["nats_per_token"] > 1
        assert one["tries"]["0.5"] > 1e6
        assert one["same"] == one["true"][: len(one["same"])]


def test_greedy_decoding_and_one_forward_pass_agree(attacked):
    """Both count how many tokens come back before the first that differs."""
    for one in attacked[2]["texts"]:
        assert one["generated_prefix"] == one["greedy_prefix"]


def test_all_is_written_and_shown(attacked):
    folder, _, found, seen = attacked
    lede = "gives back the next 20 word for word for 1 of 2 well-known passages, and for 0 of 5 controls."
    for name in ("leakage.html", "leakage.md"):
        text = (folder / name).read_text()
        assert lede in text
        assert "What is found is memorised." in text
        assert "The flowerpot" in text
    assert lede in " ".join(seen.split())
    assert found["attack"] == {name: getattr(ATTACK, name) for name in found["attack"]}
    assert found["model"] == {"name": "tiny", "fingerprint": "0" * 64}
    table = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows(found["texts"])}
    assert table["licence"]["full matches"].startswith("1 [")
    assert table["licence"]["full matches, sampled"] == "2 of 2"
    assert table["written now"]["passages"] == "3"
    assert table["written now"]["full matches"].startswith("0 [0%, ")
    assert table["public domain"]["samples for a half chance, median"].startswith(("10^", "> 10^"))


def test_an_untrained_model_knows_nothing(tmp_path):
    _, found, seen = go(replace(ATTACK, samples=0), tmp_path, tiny_base(width=64))
    assert max(one["generated_prefix"] for one in found["texts"]) < ATTACK.continuation
    assert {one["best_sample"] for one in found["texts"]} == {None}
    assert "No verbatim memorisation was found." in seen
    assert rows(found["texts"])[0][3] == "-"


def test_texts_begin_as_the_model_expects(base):
    begun = tokenizers.Tokenizer.from_str(base.tokenizer.backend.to_str())
    begun.post_processor = tokenizers.processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    tokenizer = replace(base.tokenizer, backend=begun, bos_id=1)
    assert (base.tokenizer.opening, tokenizer.opening) == ((), (1,))
    for plain, own in zip(passages(ATTACK, base), passages(ATTACK, replace(base, tokenizer=tokenizer)), strict=True):
        assert own.tokens.tolist() == [1, *plain.tokens[:-1].tolist()]


def test_controls_are_of_their_texts_and_as_long(base):
    found = passages(ATTACK, base)
    assert {len(one.tokens) for one in found} == {32}
    texts = {(one.text.group, one.text.name): one.text.text for one in found}
    assert texts["words replaced", "The river"] != TEXTS[1].text
    assert passages(ATTACK, base)[3].tokens.tolist() == found[3].tokens.tolist()
    letters = [[one.text.text for one in passages(replace(ATTACK, seed=seed), base)[-3:]] for seed in (0, 1)]
    assert not set(letters[0]) & set(letters[1])


REFUSED = {
    "prefix": (0, "be at least 1"),
    "continuation": (0, "be at least 1"),
    "top_k": (0, "be at least 1"),
    "letters": (0, "be at least 1"),
    "samples": (-1, "not be negative"),
    "temperature": (0.0, "be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_values_are_refused(name):
    value, message = REFUSED[name]
    with pytest.raises(UserError, match=f"{name} is {value}; it must {message}"):
        OpenModel(**{name: value})


def test_a_short_context_and_short_texts_are_refused(base):
    with pytest.raises(UserError, match="prefix and continuation take 513 tokens, the context 512"):
        passages(OpenModel(prefix=512, continuation=1), base)
    with pytest.raises(UserError, match="no text has 512 tokens; make prefix and continuation shorter"):
        passages(OpenModel(prefix=500, continuation=12), base)
