"""Held-out scores against the plain computation with all logits, in NumPy."""

import jax
import numpy as np
import pytest
from tiny import tiny_adapters, tiny_model

from fedjax_llm import lora
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.evaluation import heldout
from fedjax_llm.evaluation.heldout import Scores, by_record, score

SCALING = 0.5


def some_examples(count=23, seed=0, longest=40):
    """Ragged examples; three of a record."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(rng.integers(2, longest))
        tokens = rng.integers(0, 97, length).astype(np.int32)
        found.append(EncodedExample(f"r{number // 3}", tokens, int(rng.integers(1, length))))
    return found


def oracle(model, params, adapters, examples):
    """One example at a time, all logits at once, log-softmax in f64."""
    rows = []
    for example in examples:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(example.tokens)] = example.tokens
        logits = np.asarray(_logits(model, params, adapters, padded), np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(example.prompt_length, len(example.tokens))
        answer = example.tokens[places]
        correct = int((logs[places - 1].argmax(-1) == answer).sum())
        rows.append((-logs[places - 1, answer].sum(), len(places), correct))
    return Scores(*(np.array(column) for column in zip(*rows, strict=True)))


_logits = jax.jit(
    lambda model, params, adapters, tokens: model.logits(
        params, model.hidden(params, lora.scaled(adapters, SCALING), tokens)[0]
    ),
    static_argnums=0,
)


def learnt(model, params, adapters, examples):
    """The examples with half of the answers' tokens replaced by what the model would say, so that some are correct."""
    changed = []
    for example in examples:
        tokens = example.tokens.copy()
        for place in range(example.prompt_length, len(tokens), 2):
            padded = np.zeros((1, 64), np.int32)
            padded[0, :place] = tokens[:place]
            tokens[place] = int(np.argmax(_logits(model, params, adapters, padded)[place - 1]))
        changed.append(EncodedExample(example.record_id, tokens, example.prompt_length))
    return changed


def quiet(count):
    """Takes progress and shows nothing."""


@pytest.mark.parametrize(("kind", "adapted"), [({}, True), ({"window": 5, "tied": True}, False)])
def test_scores_are_those_of_the_full_logits(kind, adapted):
    model, params = tiny_model(**kind)
    adapters = tiny_adapters(model) if adapted else {}
    examples = learnt(model, params, adapters, some_examples())
    expected = oracle(model, params, adapters, examples)
    shapes = choose_shapes(examples, tokens_per_microbatch=128, buckets=2)
    found = score(model, SCALING, params, adapters, examples, shapes=shapes, advance=quiet)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5, atol=1e-5)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.correct.tolist() == expected.correct.tolist()
    assert 0 < found.correct.sum() < found.tokens.sum()


def test_how_it_is_packed_and_chunked_changes_nothing(monkeypatch):
    model, params = tiny_model(layers=1)
    adapters, examples = tiny_adapters(model, targets=("q_proj",)), some_examples()
    settings = [(64, 1), (300, 2)]
    results = []
    for tokens, buckets in settings:
        shapes = choose_shapes(examples, tokens_per_microbatch=tokens, buckets=buckets)
        results.append(score(model, SCALING, params, adapters, examples, shapes=shapes, advance=quiet))
    monkeypatch.setattr(heldout, "_CHUNK", 7)
    heldout.slots.clear_cache()
    results.append(score(model, SCALING, params, adapters, examples, shapes=(Shape(3, 40, 120),), advance=quiet))
    heldout.slots.clear_cache()
    for other in results[1:]:
        np.testing.assert_allclose(other.nll, results[0].nll, rtol=1e-5, atol=1e-5)
        assert np.array_equal(other.tokens, results[0].tokens)
        assert np.array_equal(other.correct, results[0].correct)


def test_all_logits_are_never_held_at_once():
    model, params = tiny_model()
    vocabulary, targets = model.config.vocab_size, 1500
    arguments = [np.zeros(targets, np.int32)] * 3
    tokens = np.zeros((1, 64), np.int32)
    traced = jax.make_jaxpr(lambda *given: heldout.slots(model, 1.0, params, {}, tokens, None, None, *given))(
        *arguments
    )
    sizes = [np.prod(var.aval.shape) for var in variables(traced.jaxpr) if vocabulary in var.aval.shape]
    assert max(sizes) == heldout._CHUNK * vocabulary


def variables(jaxpr):
    """Every intermediate result, those of inner computations too."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from variables(inner)


def test_progress_counts_every_example_once():
    model, params = tiny_model(layers=1)
    examples, seen = some_examples(), []
    shapes = choose_shapes(examples, tokens_per_microbatch=64, buckets=2)
    score(model, SCALING, params, {}, examples, shapes=shapes, advance=seen.append)
    assert sum(seen) == len(examples)
    assert len(seen) > 3
    assert [len(column) for column in score(model, SCALING, params, {}, [], shapes=shapes, advance=quiet)] == [0, 0, 0]


def test_records_sum_their_examples():
    examples = [EncodedExample(name, np.zeros(2, np.int32), 1) for name in ("b", "a", "b")]
    scores = Scores(np.array([1.0, 2.0, 4.0]), np.array([1, 2, 3]), np.array([0, 1, 3]))
    ids, sums = by_record(examples, scores)
    assert ids == ["b", "a"]
    assert [column.tolist() for column in sums] == [[5.0, 2.0], [4, 2], [3, 1]]
