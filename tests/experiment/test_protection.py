"""Whom a mechanism protects: units, patients of several sites, and how often each site takes part."""

import io
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_private import DELTA, private, summary
from small_run import SITES, changed, go, write_small

from fedjax_llm import config
from fedjax_llm.data.records import Example, Message, Record
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.data.splits import Fractions, SplitSite
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import prepare as preparation
from fedjax_llm.experiment.prepare import load_dataset, prepare, split_sites
from fedjax_llm.experiment.protection import population_of, protection
from fedjax_llm.federation.availability import Availability
from fedjax_llm.federation.cohorts import answers_of, cohort_of
from fedjax_llm.privacy import accounting, ledger
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.runs import metrics
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.runs.recount import recount

PATIENT = Privacy(DpSgd(noise_multiplier=2.0), unit="patient", delta=DELTA)
ANSWERED = Example((Message("user", "Who?"), Message("assistant", "Ada.")))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return config.load(write_small(tmp_path_factory.mktemp("small") / "files"))


@pytest.fixture(scope="module")
def patients(experiment, tmp_path_factory):
    """The miniature with two records a patient; some patients of the coast and the hill are the same."""
    folder = tmp_path_factory.mktemp("patients")
    for site, count in SITES.items():
        rows = [
            {
                "prompt": f"Who is {site} {i}?",
                "answer": "Ada.",
                "who": f"{'town' if site == 'town' else 'shared'}-{i // 2}",
            }
            for i in range(count)
        ]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SiteFiles((str(folder),), owner_column="who")
    return changed(experiment, data__source=source, data__fractions=Fractions(0.0, 0.3), privacy=PATIENT)


def population(experiment):
    sites = split_sites(experiment, load_dataset(experiment))
    return sites, population_of(experiment, sites)


def test_records_are_counted_in_training_alone(experiment):
    sites, found = population(private(experiment))
    assert found.sites == tuple(sorted(SITES))
    assert found.units == tuple(len(site.train) for site in sites)
    assert sum(found.units) < sum(SITES.values())
    assert found.shared == ()


def test_patients_are_counted_once_a_site_and_those_of_two_sites_are_told(patients):
    sites, found = population(patients)
    owners = {site.name: {record.owner for record in site.train} for site in sites}
    assert dict(zip(found.sites, found.units, strict=True)) == {name: len(own) for name, own in owners.items()}
    assert all(count < len(site.train) for count, site in zip(found.units, sites, strict=True))
    assert owners["coast"] & owners["hill"]
    assert found.shared == (("coast", "hill"),)
    by_record = population(changed(patients, privacy__unit="record"))[1]
    assert by_record.shared == ()
    assert sum(by_record.units) > sum(found.units)


def test_a_site_is_one_unit(experiment):
    assert population(private(experiment, "LocalDp"))[1].units == (1, 1, 1)


def test_one_holder_of_everything(patients):
    sites, found = population(changed(patients, setting="centralised"))
    everybody = {record.owner for site in sites for record in site.train}
    assert (found.sites, found.units, found.shared) == (("all",), (len(everybody),), ())
    assert (found.participations, found.min_separation) == ((patients.federation.rounds,), (1,))
    assert len(everybody) < sum(population(patients)[1].units)
    alone = population(changed(patients, setting="centralised", privacy__unit="record"))[1]
    assert alone.units == (sum(len(site.train) for site in sites),)


@st.composite
def holdings(draw):
    """Sites that hold records of a few owners, or of nobody."""
    sites = draw(
        st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=5), min_size=1, max_size=4)
    )
    return [
        SplitSite(f"s{s}", tuple(Record(f"{s}-{r}", (ANSWERED,), owner=owner) for r, owner in enumerate(own)), (), ())
        for s, own in enumerate(sites)
    ]


@given(holdings())
@settings(max_examples=40)
def test_every_set_of_sites_that_share_a_patient_is_found(experiment, sites):
    found = population_of(changed(experiment, privacy=PATIENT), sites)
    places = {owner: [s.name for s in sites if owner in {r.owner for r in s.train}] for owner in "abc"}
    assert set(found.shared) == {tuple(names) for names in places.values() if len(names) > 1}
    assert len(set(found.shared)) == len(found.shared)
    for site, count in zip(sites, found.units, strict=True):
        assert count == len({r.owner for r in site.train} - {None}) + sum(r.owner is None for r in site.train)


@pytest.mark.parametrize("cohort", [None, 1, 2])
def test_participations_are_those_of_the_cohorts(experiment, cohort):
    longer = private(experiment, federation__rounds=11, federation__cohort=cohort, seed=3)
    _, found = population(longer)
    prepared = prepare(longer, RunProgress(1, Console(file=io.StringIO())))
    assert prepared.population == found
    present = [[] for _ in found.sites]
    for number in range(1, 12):
        for place in cohort_of(prepared.plan, number):
            present[place].append(number)
    assert found.participations == tuple(len(numbers) for numbers in present)
    gaps = [[later - former for former, later in itertools.pairwise(n)] for n in present]
    assert found.min_separation == tuple(min(gap, default=11) for gap in gaps)


def test_whoever_is_selected_counts_whether_or_not_the_server_waits(experiment):
    """Noise is calibrated for every round in which a site may have sent something, and such rounds are charged."""
    hasty = Availability(dropout=0.2, jitter=1.0, over_selection=1.5)
    longer = private(experiment, federation__rounds=11, federation__cohort=2, federation__availability=hasty, seed=3)
    _, found = population(longer)
    prepared = prepare(longer, RunProgress(1, Console(file=io.StringIO())))
    assert found.participations == (11, 11, 11)  # ceil(1.5 * 2) of 3
    late = 0
    for number in range(1, 12):
        answers = answers_of(prepared.plan, number)
        late += len(answers.late)
        assert set(cohort_of(prepared.plan, number)) == set(answers.cohort) | set(answers.late)
    assert late > 3


def test_a_mechanism_that_draws_cohorts_charges_every_site_for_every_round(experiment):
    _, found = population(private(experiment, "DpFedAvg", federation__rounds=7))
    assert found.participations == (7, 7, 7)
    assert found.min_separation == (1, 1, 1)


@pytest.mark.parametrize("cohort", [None, 2])
def test_the_one_client_of_everything_is_charged_for_the_whole_cohorts_steps(experiment, cohort):
    pooled = private(experiment, setting="centralised", federation__cohort=cohort)
    prepared = prepare(pooled, RunProgress(1, Console(file=io.StringIO())))
    mechanism = prepared.plan.mechanism
    assert mechanism.events["all"].count == prepared.plan.local.local_steps == 2 * (cohort or 3)
    assert mechanism.events["all"].sampling_probability == 2 / prepared.population.units[0]
    assert [len(client.units) for client in prepared.plan.clients] == list(prepared.population.units)


def test_a_patient_of_two_sites_has_an_account_of_their_own(patients, tmp_path):
    status, seen = go(patients, tmp_path / "run")
    assert status == 0
    stated = summary(tmp_path / "run")["privacy"]
    epsilons = {name: each["epsilon"] for name, each in stated["accounts"].items()}
    assert list(epsilons) == ["coast", "hill", "town", "coast / hill"]
    assert stated["epsilon"] == epsilons["coast / hill"] > max(epsilons["coast"], epsilons["hill"]) > 0
    # All that either site released, one round after the other.
    contents = ledger.read(tmp_path / "run" / ledger.LEDGER)
    both = [event for entry in contents.entries for name, event in entry.events.items() if name != "town"]
    assert epsilons["coast / hill"] == pytest.approx(accounting.epsilon(both, DELTA), rel=1e-6)
    assert contents.header.shared == (("coast", "hill"),)
    assert stated["accounts"]["coast / hill"]["releases"] == sum(event.count for event in both)
    assert metrics.read(tmp_path / "run/metrics.jsonl")[-1]["epsilon"]["accounts"] == epsilons
    assert "the worst of 3 sites and 1 set of sites that share patients" in stated["line"]
    found = recount(tmp_path / "run")
    assert found.sound
    assert found.epsilon == pytest.approx(epsilons)
    for text in (seen, (tmp_path / "run" / "report.html").read_text()):
        assert "coast / hill" in text
        assert "add or remove all records of one patient" in text


def test_too_large_a_delta_is_told_before_anything_is_loaded(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "load", lambda *names: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"delta = 0.01 is too large .*: 'town' has 12 \(delta at most 0.0083\)\."):
        go(private(experiment, privacy__delta=0.01), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_few_sites_for_a_delta(experiment):
    sites = split_sites(experiment, load_dataset(experiment))
    with pytest.raises(UserError, match=r"delta = 0.05 is too large .*'every site' has 3 \(delta at most 0.033\)"):
        protection(private(experiment, "LocalDp", privacy__delta=0.05), sites)


def test_nothing_is_protected_where_nothing_is_trained_or_no_mechanism_chosen(experiment):
    sites = split_sites(experiment, load_dataset(experiment))
    assert protection(experiment, sites) is None
    assert protection(private(experiment, setting="base"), sites) is None
