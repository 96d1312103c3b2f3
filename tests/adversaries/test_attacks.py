"""What every attack promises, whichever there are (each file of the room is walked), and what each of them does."""

from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same

from fedjax_llm import adversaries, trees
from fedjax_llm.adversaries.gaussian import GaussianUpdate
from fedjax_llm.adversaries.inner_product import InnerProduct
from fedjax_llm.adversaries.label_flip import LabelFlip
from fedjax_llm.adversaries.scaled import ScaledUpdate
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.catalogue import makers
from fedjax_llm.data.records import Example, Message, Record
from fedjax_llm.errors import UserError
from fedjax_llm.types import Stack

C = 6
KEY = jax.random.key(3)


every = pytest.mark.parametrize("attack", makers(adversaries), ids=lambda attack: attack.__name__)
corrupting = pytest.mark.parametrize(
    "attack", [attack for attack in makers(adversaries) if attack().make().corrupt], ids=lambda attack: attack.__name__
)
poisoning = pytest.mark.parametrize(
    "attack", [attack for attack in makers(adversaries) if attack().make().poison], ids=lambda attack: attack.__name__
)


@cache
def corrupt(attack):
    return jax.jit(attack.make().corrupt)


def sent(absent: tuple[int, ...] = ()) -> Stack:
    """Messages of several types and shapes; zeros and weight zero from those who are absent."""
    rng = np.random.default_rng(0)
    messages = {
        "delta": {"a": jnp.asarray(rng.normal(size=(C, 5, 2)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(C, 2, 3)), jnp.bfloat16),
        "ranks": jnp.asarray(rng.integers(1, 9, C), jnp.int32),
        "steps": jnp.asarray(rng.uniform(1, 5, C), jnp.float32),
    }
    weights = jnp.asarray(np.where(np.isin(np.arange(C), absent), 0, rng.integers(1, 9, C)), jnp.float32)
    return Stack(trees.select(weights > 0, messages, jax.tree.map(jnp.zeros_like, messages)), weights)


def who(*clients: int):
    return jnp.asarray(np.isin(np.arange(C), clients))


def of(stack: Stack, *clients: int):
    return trees.take(stack.messages, np.array(clients))


def test_the_walk_finds_the_attacks():
    names = {attack.__name__ for attack in makers(adversaries)}
    assert {"SignFlip", "ScaledUpdate", "GaussianUpdate", "InnerProduct", "LabelFlip"} <= names


@every
def test_it_is_a_frozen_dataclass_with_defaults_that_attacks(attack):
    assert attack.__dataclass_params__.frozen
    assert attack() == attack()
    made = attack().make()
    assert made.corrupt or made.poison


@corrupting
def test_it_changes_malicious_messages_and_no_bit_of_any_other(attack):
    stack = sent()
    found = corrupt(attack())(stack, who(1, 4), KEY)
    assert same(found.weights, stack.weights)
    assert same(of(found, 0, 2, 3, 5), of(stack, 0, 2, 3, 5))
    for client in (1, 4):
        assert not np.allclose(of(found, client)["delta"]["a"], of(stack, client)["delta"]["a"])
    types = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one.messages) for one in (found, stack)]
    assert types[0] == types[1]


@corrupting
def test_who_is_absent_sends_nothing_malicious_or_not(attack):
    stack = sent(absent=(0, 4))
    found = corrupt(attack())(stack, who(1, 4), KEY)
    assert same(of(found, 0, 2, 3, 4, 5), of(stack, 0, 2, 3, 4, 5))
    assert not same(of(found, 1), of(stack, 1))


@corrupting
def test_without_malicious_clients_nothing_happens(attack):
    assert same(corrupt(attack())(sent(), who(), KEY), sent())


@corrupting
def test_if_all_are_malicious_what_they_send_is_finite(attack):
    found = corrupt(attack())(sent(), who(*range(C)), KEY)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(found.messages))


@corrupting
def test_it_depends_on_nothing_but_its_arguments(attack):
    once, again = (corrupt(attack())(sent(), who(2), KEY) for _ in range(2))
    assert same(once, again)


@every
def test_impossible_values_are_refused_by_name(attack):
    for name in attack.__dataclass_fields__:
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"attack.{name} is {value}; it must be positive and finite"):
                replace(attack(), **{name: value}).make()


@pytest.mark.parametrize(("attack", "factor"), [(SignFlip(), -1), (SignFlip(100.0), -100), (ScaledUpdate(6.0), 6)])
def test_messages_are_multiplied(attack, factor):
    stack = sent()
    found = corrupt(attack)(stack, who(3), KEY).messages
    expected = factor * np.asarray(stack.messages["delta"]["a"][3])
    np.testing.assert_allclose(found["delta"]["a"][3], expected, rtol=1e-6)
    assert found["ranks"][3] == factor * stack.messages["ranks"][3]


def test_a_scaled_update_replaces_the_mean_of_still_clients():
    deltas = jnp.zeros((C, 3)).at[2].set(jnp.array([1.0, -2.0, 3.0]))
    found = corrupt(ScaledUpdate(float(C)))(Stack(deltas, jnp.ones(C)), who(2), KEY)
    np.testing.assert_allclose(found.messages.mean(axis=0), deltas[2], rtol=1e-6)


def test_gaussian_messages_have_their_deviation_and_share_nothing():
    stack = Stack({"one": jnp.ones((C, 50, 20)), "two": jnp.ones((C, 50, 20))}, jnp.ones(C))
    found = corrupt(GaussianUpdate(3.0))(stack, who(0, 1), KEY).messages
    draws = np.stack([leaf[client].ravel() for leaf in found.values() for client in (0, 1)])
    np.testing.assert_allclose(draws.std(axis=1), 3.0, rtol=0.1)
    np.testing.assert_allclose(draws.mean(axis=1), 0.0, atol=0.4)
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.15
    other = corrupt(GaussianUpdate(3.0))(stack, who(0, 1), jax.random.key(4)).messages
    assert not np.allclose(other["one"][0], found["one"][0])


def test_the_inner_product_with_the_honest_mean_is_negative():
    stack = sent(absent=(5,))
    found = corrupt(InnerProduct(0.5))(stack, who(1, 4), KEY).messages
    mean = np.asarray(stack.messages["delta"]["a"])[[0, 2, 3]].mean(axis=0)  # unweighted, of those who are there
    for client in (1, 4):
        np.testing.assert_allclose(found["delta"]["a"][client], -0.5 * mean, rtol=1e-5)


def site(answers: list[list[str]]) -> tuple[Record, ...]:
    """A record for each list of answers; questions all differ."""
    return tuple(
        Record(
            f"record-{i}",
            tuple(
                Example((Message("system", "s"), Message("user", f"{i} {j}?"), Message("assistant", answer)))
                for j, answer in enumerate(own)
            ),
            label="l",
            owner=f"owner-{i}",
        )
        for i, own in enumerate(answers)
    )


def answers_of(records) -> list[str]:
    return [example.messages[-1].content for record in records for example in record.examples]


SITES = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=9)


@poisoning
@settings(max_examples=50)
@given(answers=SITES, seed=st.integers(0, 99))
def test_poison_changes_answers_and_nothing_else(attack, answers, seed):
    records, poison = site(answers), attack().make().poison
    found, again = (poison(records, np.random.default_rng(seed)) for _ in range(2))
    assert found == again
    assert records == site(answers)
    assert isinstance(found, tuple)

    def blank(records):
        return [
            replace(
                record,
                examples=tuple(
                    Example((*example.messages[:-1], replace(example.messages[-1], content="")))
                    for example in record.examples
                ),
            )
            for record in records
        ]

    assert blank(found) == blank(records)


@settings(max_examples=200)
@given(answers=SITES, seed=st.integers(0, 99))
def test_no_example_keeps_its_answer_where_there_are_two(answers, seed):
    records = site(answers)
    before = answers_of(records)
    after = answers_of(LabelFlip().make().poison(records, np.random.default_rng(seed)))
    if len(set(before)) < 2:
        assert after == before
        return
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert set(after) <= set(before)
    if max(Counter(before).values()) <= len(before) / 2:
        assert Counter(after) == Counter(before)


def test_answers_are_dealt_out_at_random():
    records, poison = site([[letter] for letter in "abcdefgh"]), LabelFlip().make().poison
    found = {tuple(answers_of(poison(records, np.random.default_rng(seed)))) for seed in range(40)}
    assert len(found) > 30
    assert {dealt[0] for dealt in found} == set("bcdefgh")


def test_a_site_without_records_stays_so():
    assert LabelFlip().make().poison((), np.random.default_rng(0)) == ()
