"""Partitioners: what all promise, and what each is for."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedjax_llm.data.partition import ByField, DirichletByLabel, Iid, PowerLawSizes, Shards, partitioned
from fedjax_llm.data.records import Dataset, Example, Message, Record, Site
from fedjax_llm.errors import UserError

EXAMPLES = (Example((Message("user", "q"), Message("assistant", "a"))),)


def record(number, label="x", owner=None, **fields):
    return Record(f"r{number:04d}", EXAMPLES, label, owner, fields)


def rng(seed=0):
    return np.random.default_rng(seed)


def sizes(sites):
    return [len(site.records) for site in sites]


labels = st.sampled_from("xyz")
owners = st.none() | st.sampled_from(["o1", "o2", "o3"])
tables = st.lists(st.tuples(labels, owners), min_size=1, max_size=60).map(
    lambda rows: [record(i, label, owner, ward=label) for i, (label, owner) in enumerate(rows)]
)
counts = st.integers(1, 5)
partitioners = st.one_of(
    st.builds(Iid, counts),
    st.builds(DirichletByLabel, counts, st.sampled_from([0.3, 5.0])),
    st.builds(Shards, counts, st.integers(1, 3)),
    st.builds(PowerLawSizes, counts, st.floats(0, 4)),
    st.just(ByField("ward")),
)


@settings(deadline=None)
@given(tables, partitioners, st.integers(0, 2**32), st.randoms())
def test_a_partition_is_exact_keeps_owners_together_and_forgets_the_order(records, partitioner, seed, random):
    try:
        sites = partitioner.split(records, rng(seed))
    except UserError:
        owners_there = {record.owner or record.id for record in records}
        parts = getattr(partitioner, "sites", 1) * getattr(partitioner, "shards_per_site", 1)
        # Only a Dirichlet with few owners may find no draw.
        assert parts > len(owners_there) or isinstance(partitioner, DirichletByLabel)
        assume(False)
    dealt = [record for site in sites for record in site.records]
    assert Counter(record.id for record in dealt) == Counter(record.id for record in records)
    assert all(site.records for site in sites)
    assert len({site.name for site in sites}) == len(sites)
    homes = {(record.owner, site.name) for site in sites for record in site.records if record.owner}
    assert len(homes) == len({owner for owner, _ in homes})
    assert partitioner.split(random.sample(records, len(records)), rng(seed)) == sites


@pytest.mark.parametrize("partitioner", [Iid(4), DirichletByLabel(4, 1.0), Shards(4), PowerLawSizes(4, 1.0)])
def test_another_seed_is_another_partition(partitioner):
    records = [record(i, "xyz"[i % 3]) for i in range(60)]
    assert partitioner.split(records, rng(0)) != partitioner.split(records, rng(1))


def test_sites_are_numbered():
    records = [record(i) for i in range(120)]
    assert [site.name for site in Iid(2).split(records, rng())] == ["site-01", "site-02"]
    assert Iid(100).split(records, rng())[-1].name == "site-100"


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(sizes(Iid(4).split([record(i) for i in range(10)], rng()))) == [2, 2, 3, 3]


def label_skew(sites):
    """The mean share of a site's most frequent label."""
    return np.mean([max(Counter(r.label for r in site.records).values()) / len(site.records) for site in sites])


def test_dirichlet_skew_falls_with_alpha():
    records = [record(i, "vwxyz"[i % 5]) for i in range(1000)]
    strong, mild, none = (label_skew(DirichletByLabel(5, alpha).split(records, rng(3))) for alpha in (0.1, 1, 1000))
    assert strong > mild > none
    assert none < 0.25


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    # One label, two sites: a site's share is Beta(alpha, alpha), with variance 1 / (4 (2 alpha + 1)).
    records, alpha = [record(i) for i in range(500)], 2.0
    shares = [sizes(DirichletByLabel(2, alpha).split(records, rng(seed)))[0] / 500 for seed in range(300)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.25)


def test_dirichlet_keeps_to_min_records():
    records = [record(i, "xyz"[i % 3]) for i in range(60)]
    for seed in range(10):
        assert min(sizes(DirichletByLabel(4, 0.3, min_records=7).split(records, rng(seed)))) >= 7


def test_owner_goes_by_its_first_label():
    records = [record(0, "x", "o"), record(1, "y", "o"), record(2, "y", "o"), record(3, "y")]
    sites = Shards(2, 1).split(records, rng())
    assert {tuple(r.id for r in site.records) for site in sites} == {("r0000", "r0001", "r0002"), ("r0003",)}


def test_by_field():
    records = [record(0, ward="south"), record(1, ward="north"), record(2, ward="south")]
    sites = ByField("ward").split(records, rng())
    assert [(site.name, sizes([site])) for site in sites] == [("north", [1]), ("south", [2])]


def test_shards_limit_the_labels_of_a_site():
    records = [record(i, f"label{i % 10}") for i in range(1000)]
    sites = Shards(20, 2).split(records, rng())
    assert sizes(sites) == [50] * 20
    assert max(len({r.label for r in site.records}) for site in sites) == 2


def test_power_law_sizes():
    records = [record(i) for i in range(1003)]
    assert sizes(PowerLawSizes(3, 0).split(records, rng())) == pytest.approx([334, 334, 334], abs=1)
    # 3 records are one for each site; the rest in proportion 1 : 1/4 : 1/9.
    wanted = np.array([1, 1 / 4, 1 / 9]) / (1 + 1 / 4 + 1 / 9) * 1000 + 1
    assert sizes(PowerLawSizes(3, 2).split(records, rng())) == pytest.approx(wanted, abs=1)
    assert min(sizes(PowerLawSizes(50, 9.0).split(records, rng()))) == 1


def test_partitioned_keeps_all_but_the_sites():
    def questions(site, records, seed):
        return ()

    old = Dataset((Site("b", (record(0),)), Site("a", (record(1), record(2)))), "v", "c", questions)
    new = partitioned(old, Iid(3), rng())
    assert sizes(new.sites) == [1, 1, 1]
    assert (new.version, new.citation, new.questions) == ("v", "c", questions)


TEN = [record(i, ward="north") for i in range(10)]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda: Iid(0), "sites is 0; it must be at least 1"),
        (lambda: Iid(11).split(TEN, rng()), "11 parts are wanted, but 10 records of 10 owners"),
        (lambda: Iid(2).split([record(i, owner="o") for i in range(9)], rng()), "9 records of 1 owners"),
        (lambda: DirichletByLabel(2, 0.0), "alpha is 0.0; it must be a positive number"),
        (lambda: DirichletByLabel(2, float("nan")), "alpha is nan"),
        (lambda: DirichletByLabel(2, 1.0, min_records=0), "min_records is 0"),
        (lambda: DirichletByLabel(2, 1.0, min_records=6).split(TEN, rng()), "want more than 10 records"),
        (lambda: DirichletByLabel(5, 1e-3).split(TEN, rng()), "no draw in 1000 .* raise alpha"),
        (lambda: DirichletByLabel(2, 1.0).split([record(i, None) for i in range(4)], rng()), "'r0000' has no label"),
        (lambda: Shards(2, 0), "shards_per_site is 0"),
        (lambda: Shards(6, 2).split(TEN, rng()), "12 parts are wanted"),
        (lambda: Shards(1, 2).split([record(i, None) for i in range(4)], rng()), "has no label"),
        (lambda: PowerLawSizes(2, -1.0), "exponent is -1.0"),
        (lambda: PowerLawSizes(2, float("inf")), "exponent is inf"),
        (lambda: ByField("wrd").split(TEN, rng()), "no field 'wrd'; did you mean 'ward'"),
        (lambda: ByField("ward").split([*TEN, record(11)], rng()), "record 'r0011' has no value for the field 'ward'"),
    ],
)
def test_impossible_partitions(split, message):
    with pytest.raises(UserError, match=message):
        split()
