"""Splits by hash."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data.records import Example, Message, Record, Site
from fedjax_llm.data.splits import Fractions, split_of, split_site
from fedjax_llm.errors import UserError

EXAMPLES = (Example((Message("user", "q"), Message("assistant", "a"))),)
THIRDS = Fractions(validation=0.3, test=0.3)


def site_of(pairs):
    return Site("clinic", tuple(Record(record_id, EXAMPLES, owner=owner) for record_id, owner in pairs))


def parts(split):
    return {"train": split.train, "validation": split.validation, "test": split.test}


pairs = st.lists(
    st.tuples(st.text(min_size=1), st.none() | st.sampled_from(["p1", "p2"])), unique_by=lambda pair: pair[0]
)


@given(pairs, st.integers(), st.randoms())
def test_exact_stable_under_reordering_and_consistent_for_an_owner(pairs, salt, random):
    split = split_site(site_of(pairs), THIRDS, salt, require=())
    got = {name: {record.id for record in records} for name, records in parts(split).items()}
    assert sorted(record_id for ids in got.values() for record_id in ids) == sorted(record_id for record_id, _ in pairs)
    shuffled = split_site(site_of(random.sample(pairs, len(pairs))), THIRDS, salt, require=())
    assert got == {name: {record.id for record in records} for name, records in parts(shuffled).items()}
    places = {(record.owner, name) for name, records in parts(split).items() for record in records if record.owner}
    assert len(places) == len({owner for owner, _ in places})


def test_a_record_alone_is_where_it_is_among_others():
    site = site_of([(f"r{i}", None) for i in range(50)])
    split = split_site(site, THIRDS, 1)
    for name, records in parts(split).items():
        assert all(split_of(record, THIRDS, 1) == name for record in records)


def test_known_hash():
    # sha256("0:HP:0000001") begins with aa: 0xaa / 256 = 0.66. A change here would move every held-out record.
    record = Record("HP:0000001", EXAMPLES)
    assert split_of(record, Fractions(0.3, 0.4), 0) == "validation"
    assert split_of(record, Fractions(0.2, 0.4), 0) == "train"
    assert split_of(record, Fractions(0.0, 0.7), 0) == "test"


def test_fractions_are_met_and_the_salt_matters():
    records = [Record(f"r{i}", EXAMPLES) for i in range(5000)]
    one = [split_of(record, Fractions(0.2, 0.1), 0) for record in records]
    other = [split_of(record, Fractions(0.2, 0.1), 1) for record in records]
    shares = {name: count / 5000 for name, count in Counter(one).items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.2, "test": 0.1}, abs=0.02)
    agree = sum(a == b for a, b in zip(one, other, strict=True)) / 5000
    assert agree == pytest.approx(0.7**2 + 0.2**2 + 0.1**2, abs=0.03)


def test_nothing_held_out():
    split = split_site(site_of([("a", None), ("b", None)]), Fractions(0, 0), 0)
    assert (len(split.train), split.validation, split.test) == (2, (), ())


def test_required_splits():
    site = site_of([(f"r{i}", "one patient") for i in range(4)])
    with pytest.raises(
        UserError, match=r"site 'clinic' has no (validation|test) record: 4 records of 1 owners"
    ) as caught:
        split_site(site, Fractions(0.01, 0.01), 0, require=("train", "validation", "test"))
    assert "leave the site out" in str(caught.value)
    with pytest.raises(UserError, match="has no train record"):
        split_site(site, Fractions(0.0, 0.999), 0)
    with pytest.raises(UserError, match="has no train record: 0 records"):
        split_site(site_of([]), THIRDS, 0)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.1, 1.0), (0.5, 0.5), (float("nan"), 0.1)])
def test_impossible_fractions(validation, test):
    with pytest.raises(UserError, match=r"validation|test"):
        Fractions(validation, test)
