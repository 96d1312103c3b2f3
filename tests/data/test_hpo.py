"""Flashcards from a small ontology of invented terms; the real one only where marked."""

from statistics import mean

import numpy as np
import pytest

from fedjax_llm.data.hpo import HpoFlashcards, members
from fedjax_llm.data.obo import read_obo
from fedjax_llm.data.partition import Iid, partitioned
from fedjax_llm.data.records import Message, Site
from fedjax_llm.errors import UserError

NERVOUS, EYE, NEW = "HP:0000707", "HP:0000478", "HP:8888888"
COLOURS = ("amber", "beige", "coral", "denim", "ebony", "fawnish", "golden", "hazel", "indigo", "jaded")
SHAPES = ("spiral", "oblong", "square")


def stanza(term_id, name, definition=None, parents=(), synonyms=()):
    lines = ["[Term]", f"id: {term_id}", f"name: {name}"]
    lines += [f'def: "{definition}" []'] if definition else []
    lines += [f'synonym: "{synonym}" EXACT []' for synonym in synonyms]
    lines += [f"is_a: {parent} ! parent" for parent in parents]
    return "\n".join(lines) + "\n"


def grid(branch, noun, first):
    """Thirty terms of two adjectives; the definition names the shape, and of every other term the colour too."""
    pairs = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    return [
        stanza(
            f"HP:{first + i:07d}",
            f"{colour.title()} {shape} {noun}",
            f"Something {shape} that looks quite {colour if i % 2 else 'odd'}.",
            [branch],
        )
        for i, (colour, shape) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def obo(tmp_path_factory):
    stanzas = [
        stanza("HP:0000001", "All"),
        stanza("HP:0000118", "Phenotypic abnormality", "The root.", ["HP:0000001"]),
        stanza(NERVOUS, "Abnormality of the nervous system", parents=["HP:0000118"]),
        stanza(EYE, "Abnormality of the eye", parents=["HP:0000118"]),
        stanza(NEW, "Abnormality of the antenna system", parents=["HP:0000118"]),
        stanza("HP:0000005", "Inheritance of jokes", "Not a phenotype.", ["HP:0000001"]),
        *grid(NERVOUS, "twitch", 1000),
        *grid(EYE, "stare", 2000),
        stanza("HP:0003000", "Blinking twitch", "Both of eye and nerve.", [NERVOUS, EYE]),
        stanza("HP:0003001", "Undefined twitch", parents=[NERVOUS]),
        stanza(
            "HP:0003002",
            "Bent feeler",
            "A bent feeler, or BF, is a feeler bow turned as found.",
            [NEW],
            ["Feeler bow", "BF"],
        ),
        stanza("HP:0003003", "Wag", "Wag.", [NEW]),
    ]
    path = tmp_path_factory.mktemp("obo") / "hp.obo"
    path.write_text("data-version: made/up/1\n\n" + "\n".join(stanzas), encoding="utf-8")
    return str(path)


def load(obo, **options):
    return HpoFlashcards(path=obo, **({"min_records": 1} | options)).load()


def by_name(dataset):
    return {site.name: site for site in dataset.sites}


def test_sites_records_and_version(obo):
    dataset = load(obo)
    sizes = {site.name: len(site.records) for site in dataset.sites}
    assert sizes == {"antenna": 2, "eye": 30, "nervous": 30}
    assert dataset.version == "made/up/1"
    assert "Human Phenotype Ontology" in dataset.citation
    record = by_name(dataset)["nervous"].records[0]
    assert (record.id, record.label, record.fields["name"]) == ("HP:0001000", "nervous", "Amber spiral twitch")


def test_both_questions_of_a_term(obo):
    definition, name = by_name(load(obo))["antenna"].records[0].examples
    assert definition.messages == (
        Message("user", "What is Bent feeler?"),
        Message("assistant", "A bent feeler, or BF, is a feeler bow turned as found."),
    )
    assert name.messages == (
        Message("user", "Which finding is described: A ___, or ___, is a ___ turned as found?"),
        Message("assistant", "Bent feeler"),
    )


def test_kinds_of_questions_are_chosen(obo):
    only_names = by_name(load(obo, questions=("name",)))
    assert only_names["antenna"].records[0].examples[0].messages[-1].content == "Bent feeler"
    # Nothing is left of "Wag." once the name is masked: no question, and with only that kind no record.
    assert [record.id for record in only_names["antenna"].records] == ["HP:0003002"]
    assert all(len(record.examples) == 1 for record in by_name(load(obo, questions=("definition",)))["eye"].records)


def test_terms_in_two_branches(obo):
    assert all(record.id != "HP:0003000" for site in load(obo).sites for record in site.records)
    first = by_name(load(obo, overlap="first"))
    assert "HP:0003000" in {record.id for record in first["eye"].records}
    assert len(first["nervous"].records) == 30


def test_min_records_counts_unless_sites_are_named(obo):
    assert [site.name for site in load(obo, min_records=10).sites] == ["eye", "nervous"]
    assert [site.name for site in load(obo, min_records=10, sites=("nervous", "antenna")).sites] == [
        "antenna",
        "nervous",
    ]


def test_a_site_does_not_depend_on_the_others(obo):
    for overlap in ("drop", "first"):
        all_sites = by_name(load(obo, overlap=overlap))
        assert load(obo, overlap=overlap, sites=("nervous",)).sites == (all_sites["nervous"],)


def test_limited_records_are_a_nested_choice(obo):
    five = {record.id for record in load(obo, sites=("eye",), max_records_per_site=5).sites[0].records}
    nine = {record.id for record in load(obo, sites=("eye",), max_records_per_site=9).sites[0].records}
    assert len(five) == 5
    assert len(nine) == 9
    assert five < nine


def test_questions_come_from_the_given_site(obo):
    dataset = load(obo)
    site = by_name(dataset)["eye"]
    questions = dataset.questions(site, site.records, 0)
    names = {record.fields["name"] for record in site.records}
    assert len(questions) >= 10
    for question in questions:
        record = next(record for record in site.records if record.id == question.record_id)
        assert question.options[question.answer] == record.fields["name"]
        assert set(question.options) <= names
        assert question.messages == record.examples[1].messages[:-1]


def test_questions_about_one_record_do_not_depend_on_the_rest(obo):
    dataset = load(obo)
    site = by_name(dataset)["eye"]
    everything = {question.record_id: question for question in dataset.questions(site, site.records, 7)}
    for record in site.records:
        alone = dataset.questions(site, [record], 7)
        assert alone == ((everything[record.id],) if record.id in everything else ())
    assert dataset.questions(site, site.records, 8) != tuple(everything.values())


def test_questions_survive_partitioning(obo):
    dataset = partitioned(load(obo), Iid(2), np.random.default_rng(0))
    site = dataset.sites[0]
    questions = dataset.questions(site, site.records, 0)
    here = {record.fields["name"] for record in site.records}
    assert questions
    assert all(set(question.options) <= here for question in questions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ("nervos",)}, "unknown site 'nervos'; did you mean 'nervous'"),
        ({"min_records": 999}, "no site has min_records=999 records; the largest has 30"),
        ({"questions": ()}, "questions is empty"),
        ({"questions": ("nme",)}, "unknown kind of question 'nme'; did you mean 'name'"),
        ({"overlap": "frist"}, "did you mean 'first'"),
        ({"max_records_per_site": 0}, "at least 1"),
    ],
)
def test_bad_settings(obo, options, message):
    with pytest.raises(UserError, match=message):
        load(obo, **options)


def test_a_named_site_without_records(tmp_path):
    path = tmp_path / "hp.obo"
    root, eye = stanza("HP:0000118", "Root"), stanza(EYE, "Eye", parents=["HP:0000118"])
    path.write_text(f"data-version: 1\n\n{root}\n{eye}", encoding="utf-8")
    with pytest.raises(UserError, match="site 'eye' has no records"):
        load(str(path), sites=("eye",))
    path.write_text(f"data-version: 1\n\n{eye}", encoding="utf-8")
    with pytest.raises(UserError, match="no term HP:0000118"):
        load(str(path))


@pytest.mark.model
def test_real_ontology():
    """Counts of release 2025-01-16; the guessers over all questions. Random distractors give "overlap" 0.83."""
    from fedjax_llm import assets

    terms = list(members(read_obo(assets.fetch(assets.HPO))))
    assert len(terms) == 15_817
    assert sum(len(sites) == 1 for _, sites in terms) == 10_596
    counted = {name: [0, 0] for name in ("musculoskeletal", "nervous", "limbs", "ear")}
    for _, sites in terms:
        for name in counted.keys() & set(sites):
            counted[name][0] += 1
            counted[name][1] += len(sites) == 1
    assert counted == {"musculoskeletal": [3348, 886], "nervous": [2495, 1941], "limbs": [1939, 62], "ear": [266, 234]}

    dataset = HpoFlashcards().load()
    assert dataset.version == "hp/releases/2025-01-16"
    assert len(dataset.sites) == 14
    assert sum(len(site.records) for site in dataset.sites) == 10_097
    assert dataset.questions is not None
    asked = [(site, Site(site.name, site.records[::5]).records) for site in dataset.sites]
    questions = [question for site, records in asked for question in dataset.questions(site, records, 0)]
    assert len(questions) > 0.45 * sum(len(records) for _, records in asked)
    assert mean(question.guesses["overlap"] for question in questions) == pytest.approx(0.28, abs=0.04)
    assert mean(question.guesses["longest"] for question in questions) == pytest.approx(0.19, abs=0.04)
