"""The evaluation of a whole run on small sites: what is taken, and that it adds up."""

import json
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_adapters, tiny_base

from fedjax_llm.data.chat import encode_records
from fedjax_llm.data.records import ChoiceQuestion, Dataset, Example, Message, Record
from fedjax_llm.data.splits import SplitSite
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.evaluate import (
    Evaluation,
    evaluate_sites,
    first_by_hash,
    guessers,
    hold_out,
    validate,
)
from fedjax_llm.runs.summary import paired_difference, summarise_evaluation

SCALING = 0.5
NAMES = ("x", "y")


def record(name):
    examples = ((f"What is {name}?", f"{name} is it"), (f"Which is {name * 2}?", name))
    return Record(name, tuple(Example((Message("user", q), Message("assistant", a))) for q, a in examples))


def split_site(name, tests=5, validations=3):
    held_out = tuple(record(f"{name}{number}") for number in range(tests))
    validation = tuple(record(f"{name}v{number}") for number in range(validations))
    return SplitSite(name, (record(f"{name}t"),), validation, held_out)


def questions(site, records, seed):
    """Asks about all but the first record, with names of the whole site as options."""
    assert len(site.records) > len(records)
    return tuple(
        ChoiceQuestion(one.id, (Message("user", f"{seed}?"),), (one.id, "no", "an other", "q"), 0, {"longest": 0.25})
        for one in records[1:]
    )


DATASET = Dataset((), "1", "", questions)


def held(config, sites=None, dataset=DATASET, max_length=80, too_long="drop", base=None, seed=3):
    base = base or tiny_base()
    encode = partial(encode_records, tokenizer=base.tokenizer, max_length=max_length, too_long=too_long)
    sites = [split_site(name) for name in NAMES] if sites is None else sites
    return hold_out(config, dataset, sites, base, encode, system=None, seed=seed, tokens_per_microbatch=400, buckets=1)


class Phases:
    """Remembers what a display would show."""

    def __init__(self):
        self.seen = {}

    @contextmanager
    def __call__(self, name, total):
        done = []
        yield done.append
        self.seen[name] = (sum(done), total)


CONFIG = Evaluation(test_records=4, validation_every=1, validation_records=2, choice_questions=3, generations=3)


@pytest.fixture(scope="module")
def everything():
    base, data, phases = tiny_base(), held(CONFIG), Phases()
    shared = tiny_adapters(base.model, targets=("q_proj",))
    result = evaluate_sites(base, SCALING, dict.fromkeys(NAMES, shared), data, phases)
    return base, data, shared, result, phases


def test_what_is_taken_follows_the_settings(everything):
    _, data, _, result, phases = everything
    for name in NAMES:
        tests = [one.id for one in first_by_hash(split_site(name).test, None)]
        site = result["sites"][name]
        assert site["records"] == tests[:4]
        assert site["choice_records"] == tests[1:4]
        assert len(data.test[name]) == 8
        assert {example.record_id for example in data.validation[name]} < {f"{name}v{n}" for n in range(3)}
        assert len(data.validation[name]) == 4
        assert data.lengths[name].kept == 8
    assert len(data.prompts) == 3
    assert phases.seen == {"Held-out answers": (16, 16), "Multiple choice": (6, 6)}


def test_an_evaluation_can_be_written_and_summarised(everything):
    result = everything[3]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    summary = summarise_evaluation(result, seed=0, resamples=50)
    assert summary["guessers"] == {"longest": 0.25}
    assert 2 < summary["nll"] < 12
    assert summary["choice_accuracy"] is not None


def test_adapters_of_each_site_give_what_they_give_alone(everything):
    base, data, shared, together, _ = everything
    other = tiny_adapters(base.model, seed=9, targets=("q_proj",))
    own = evaluate_sites(base, SCALING, {"x": shared, "y": other}, data, Phases())
    other_for_all = evaluate_sites(base, SCALING, dict.fromkeys(NAMES, other), data, Phases())
    for site, expected in (("x", together), ("y", other_for_all)):
        for column, values in own["sites"][site].items():
            wanted = expected["sites"][site][column]
            if column == "nll":
                np.testing.assert_allclose(values, wanted, rtol=1e-5)
            else:
                assert values == wanted
    assert not np.allclose(own["sites"]["y"]["nll"], together["sites"]["y"]["nll"], rtol=1e-3)


def test_base_and_tuned_are_paired_and_untrained_adapters_change_nothing(everything):
    base, data, shared, tuned, _ = everything
    fresh = jax.tree.map(np.zeros_like, shared)
    before = evaluate_sites(base, SCALING, {name: {} for name in NAMES}, data, Phases())
    same = evaluate_sites(base, SCALING, dict.fromkeys(NAMES, fresh), data, Phases())
    assert before == same
    assert paired_difference(before, tuned, seed=0, resamples=50)["x"]["difference"] != 0


def test_validation_is_what_a_test_of_these_records_would_give(everything):
    base, data, shared, _, _ = everything
    adapters = dict.fromkeys(NAMES, shared)
    found = validate(base, SCALING, adapters, data)
    sites = [SplitSite(site.name, site.train, (), site.validation) for site in map(split_site, NAMES)]
    config = Evaluation(test_records=2, validation_every=0, choice_questions=0, generations=0)
    tested = evaluate_sites(base, SCALING, adapters, held(config, sites), Phases())["sites"]
    expected = {name: sum(tested[name]["nll"]) / sum(tested[name]["tokens"]) for name in NAMES}
    assert found["sites"] == pytest.approx(expected, rel=1e-5)
    assert found["nll"] == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


@given(st.lists(st.text("abcdef", min_size=1, max_size=4), unique=True), st.integers(0, 6), st.randoms())
def test_which_records_are_taken_depends_on_no_order_and_fewer_are_the_first_of_more(names, most, random):
    records = [record(name) for name in names]
    shuffled = random.sample(records, len(records))
    taken = first_by_hash(records, most)
    assert taken == first_by_hash(shuffled, most) == first_by_hash(records, most + 1)[:most]
    assert len(taken) == min(most, len(names))


def test_little_can_be_asked_for():
    config = Evaluation(validation_every=0, choice_questions=0, generations=0)
    base, data, phases = tiny_base(), held(config), Phases()
    assert (data.validation, data.questions, data.prompts, data.choice_shapes) == ({}, {}, (), ())
    result = evaluate_sites(base, SCALING, {name: {} for name in NAMES}, data, phases)
    assert result["sites"]["x"]["choice_correct"] == []
    assert result["guessers"] == {}
    assert list(phases.seen) == ["Held-out answers"]
    assert held(CONFIG, dataset=Dataset((), "1", "")).questions == {}


def test_a_site_without_test_records_is_left_out_and_one_without_validation_is_not():
    data = held(CONFIG, [split_site("x", validations=0), split_site("y", tests=0)])
    assert list(data.test) == ["x"]
    assert list(data.validation) == ["y"]


def test_guessers_weigh_sites_alike():
    def lopsided(site, records, seed):
        count, score = (1, 1.0) if site.name == "x" else (3, 0.0)
        return tuple(
            ChoiceQuestion(one.id, (Message("user", "?"),), ("a", "b"), 0, {"g": score}) for one in records[:count]
        )

    assert guessers(held(CONFIG, dataset=Dataset((), "1", "", lopsided))) == {"g": 0.5}


def test_a_site_whose_examples_are_all_too_long_is_named():
    with pytest.raises(
        UserError, match=r"site 'x': all 8 held-out examples are too long \(up to \d+ tokens\).*truncate"
    ):
        held(CONFIG, max_length=20)
    assert held(CONFIG, max_length=72, too_long="truncate").lengths["x"].dropped == 0


def test_validation_without_records_is_refused():
    with pytest.raises(UserError, match="validation_every is 1, but no site has a validation record"):
        held(CONFIG, [split_site(name, validations=0) for name in NAMES])


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("test_records", 0, 1),
        ("validation_records", 0, 1),
        ("validation_every", -1, 0),
        ("choice_questions", -1, 0),
        ("generations", -2, 0),
        ("max_new_tokens", 0, 1),
        ("bootstrap_resamples", 0, 1),
    ],
)
def test_impossible_settings_are_refused(field, value, least):
    with pytest.raises(UserError, match=f"evaluation.{field} is {value}; it must be at least {least}"):
        Evaluation(**{field: value})
    Evaluation(**{field: least})
