"""Planted secrets: where they stand, how often, beside which controls, and that they are held out nowhere."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny import tiny_tokenizer

from fedjax_llm.data.chat import encode_records
from fedjax_llm.data.planted import PlantedSecrets, is_secret, records_of, secret_number
from fedjax_llm.data.records import ChoiceQuestion, Dataset, Example, Message, Record, Site, units_of
from fedjax_llm.data.secrets import KINDS, question
from fedjax_llm.data.splits import Fractions, split_of, split_site
from fedjax_llm.errors import UserError

NAMES = ("coast", "hill", "town")


def some_record(name):
    return Record(name, (Example((Message("user", name), Message("assistant", "yes"))),))


def asked(site, records, seed):
    """Questions that tell what they were made of."""
    text = f"{seed}: " + " ".join(record.id for record in site.records)
    return tuple(ChoiceQuestion(record.id, (Message("user", text),), ("a", "b"), 0) for record in records)


@dataclass(frozen=True)
class Clinics:
    """A source with four records at each of three sites."""

    questions: bool = True

    def load(self):
        sites = tuple(Site(name, tuple(some_record(f"{name}-{i}") for i in range(4))) for name in NAMES)
        return Dataset(sites, "1", "nobody", asked if self.questions else None)


settings_of = st.fixed_dictionaries(
    {
        "repetitions": st.lists(st.integers(1, 9), max_size=4, unique=True).map(tuple),
        "per_repetition": st.integers(1, 5),
        "coins": st.integers(1, 9),
        "kinds": st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5, unique=True).map(tuple),
        "sites": st.lists(st.sampled_from(NAMES), max_size=3, unique=True).map(tuple),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@given(settings_of)
def test_every_secret_is_stated_as_often_as_it_says_at_its_site(fields):
    source = PlantedSecrets(Clinics(), **fields)
    dataset, plain = source.load(), Clinics().load()
    secrets = source.secrets(NAMES)
    assert [one.number for one in secrets] == list(range(len(secrets)))
    assert len({one.person for one in secrets}) == len(secrets)
    for site, before in zip(dataset.sites, plain.sites, strict=True):
        assert site.name == before.name
        assert site.records[: len(before.records)] == before.records
        added = site.records[len(before.records) :]
        assert all(is_secret(one.id) for one in added)
        assert not any(is_secret(one.id) for one in before.records)
        assert len({one.id for one in site.records}) == len(site.records)
        stated = Counter(secret_number(one.id) for one in added)
        assert stated == Counter({one.number: one.repetitions for one in secrets if one.site == site.name})
        for record in added:
            secret = secrets[secret_number(record.id)]
            assert record.owner == secret.person
            assert record.training_only
            (example,) = record.examples
            assert example.messages == (*question(secret), Message("assistant", secret.value))


@given(settings_of)
def test_every_planned_secret_has_a_control_of_its_kind_and_site(fields):
    secrets = PlantedSecrets(Clinics(), **fields).secrets(NAMES)
    sites, kinds = fields["sites"] or NAMES, fields["kinds"]
    planned = [one for one in secrets if not one.coin and one.repetitions]
    controls = [one for one in secrets if not one.coin and not one.repetitions]
    coins = [one for one in secrets if one.coin]
    assert Counter(one.repetitions for one in planned) == dict.fromkeys(fields["repetitions"], fields["per_repetition"])
    assert [(one.kind, one.site) for one in planned] == [(one.kind, one.site) for one in controls]
    assert len(coins) == fields["coins"]
    assert all(one.repetitions in (0, 1) for one in coins)
    for group in (planned, coins):  # in turns: no kind and no site has two more than another
        for possible, drawn in ((kinds, "kind"), (sites, "site")):
            counts = Counter(getattr(one, drawn) for one in group)
            assert set(counts) <= set(possible)
            assert max(counts[name] for name in possible) - min(counts[name] for name in possible) <= 1


def test_secrets_depend_on_the_seed_and_on_no_record():
    source = PlantedSecrets(Clinics(), coins=20)
    assert source.secrets(NAMES) == replace(source, source=None).secrets(NAMES)
    other = replace(source, seed=1).secrets(NAMES)
    assert not {one.value for one in source.secrets(NAMES)} & {one.value for one in other}
    assert [one.repetitions for one in other] != [one.repetitions for one in source.secrets(NAMES)]


def test_coins_are_fair():
    # Exact binomial tests; a false alarm in 1e-6 of the seeds, 5e-7 each.
    flips = [one.repetitions for one in PlantedSecrets(Clinics(), repetitions=(), coins=1500).secrets(NAMES)]
    assert stats.binomtest(sum(flips), len(flips)).pvalue > 5e-7
    changes = sum(one != other for one, other in itertools.pairwise(flips))
    assert stats.binomtest(changes, len(flips) - 1).pvalue > 5e-7


def test_the_version_tells_what_was_planted():
    dataset = PlantedSecrets(Clinics(), (1, 4), 3, seed=8).load()
    assert dataset.version == "1, with 15 records of planted secrets (seed 8)"


def test_nothing_is_ever_held_out():
    fractions = Fractions(validation=0.45, test=0.5)
    source = PlantedSecrets(Clinics(), (1, 2, 4), 6)
    held = 0
    for salt in range(5):
        for site in source.load().sites:
            split = split_site(site, fractions, salt, require=())
            held += len(split.validation) + len(split.test)
            assert not any(is_secret(one.id) for one in (*split.validation, *split.test))
            assert sum(is_secret(one.id) for one in split.train) == sum(is_secret(one.id) for one in site.records)
    assert held, "no record was held out: the test would see nothing"


@given(st.text(min_size=1), st.integers(), st.booleans())
def test_only_training_only_overrides_the_split(name, salt, owned):
    fractions = Fractions(validation=0.0, test=1 - 1e-9)
    record = replace(some_record(name), owner="p" if owned else None)
    assert split_of(replace(record, training_only=True), fractions, salt) == "train"
    assert split_of(record, fractions, salt) == "test"  # wrong for one in 1e9 of the names


def test_copies_are_units_of_records_and_one_unit_of_a_patient():
    (secret, _) = PlantedSecrets(Clinics(), (5,), 1).secrets(NAMES)
    encoded, _ = encode_records(records_of([secret]), tiny_tokenizer(), 128, "drop")
    assert len(units_of(encoded, "record")) == 5
    assert len(units_of(encoded, "patient")) == 1


def test_questions_know_nothing_of_secrets():
    dataset = PlantedSecrets(Clinics()).load()
    for site, before in zip(dataset.sites, Clinics().load().sites, strict=True):
        assert any(is_secret(record.id) for record in site.records)
        assert dataset.questions(site, site.records, 3) == asked(before, before.records, 3)
    assert PlantedSecrets(Clinics(questions=False)).load().questions is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetitions": (0, 1)}, r"repetitions is \(0, 1\); they must be different and at least 1"),
        ({"repetitions": (2, 2)}, r"repetitions is \(2, 2\)"),
        ({"per_repetition": -1}, "per_repetition is -1; it must not be negative"),
        ({"coins": -2}, "coins is -2"),
        ({"per_repetition": 0}, "no secret would be planted"),
        ({"repetitions": ()}, "no secret would be planted; set repetitions and per_repetition, or coins"),
        ({"kinds": ("card nummer",)}, "unknown kind of secret 'card nummer'; did you mean 'card number'"),
        ({"kinds": ()}, "kinds is empty; choose some of home address, card number"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        PlantedSecrets(Clinics(), **fields)


def test_what_the_source_cannot_take_is_refused():
    with pytest.raises(UserError, match="planted at 'hil', which is no site; did you mean 'hill'"):
        PlantedSecrets(Clinics(), sites=("town", "hil")).load()
    with pytest.raises(UserError, match="2,000 secrets need as many people"):
        PlantedSecrets(Clinics(), (1,), 1000).load()
