"""``python -m experiments.privacy``: what a configuration will guarantee, and what a run has released."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from small_run import changed, write_sites

from experiments.privacy import main
from fedjax_llm import config
from fedjax_llm.data.partition import Iid
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.experiment import charging, forecast
from fedjax_llm.federation.plan import Federation
from fedjax_llm.privacy import accounting, ledger
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import EVERY_SITE
from fedjax_llm.runs.progress import RunProgress

ROOT = Path(__file__).parents[2]
CONFIG = '''"""Private training of a model that does not exist."""

from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.data.splits import Fractions
from fedjax_llm.federation.plan import Federation
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining


def get_config():
    return Experiment(
        model=Model("there-is-no-such-model"),
        data=Data(SiteFiles((({sites!r}),), id_column="id"), fractions=Fractions(0.2, 0.2)),
        training=LocalTraining(batch_size=2, local_steps=3),
        federation=Federation(rounds=4, cohort=2),
        privacy=Privacy(DpSgd(noise_multiplier=1.5), delta=1e-3),
    )
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    sites = write_sites(folder / "sites")
    (folder / "private.py").write_text(CONFIG.format(sites=str(sites)))
    return folder / "private.py"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


@pytest.fixture
def small_grid(monkeypatch):
    """Fewer figures; those in the table are tested once."""
    monkeypatch.setattr(forecast, "NOISE_FACTORS", (1.0,))
    monkeypatch.setattr(forecast, "ROUND_FACTORS", (1.0,))


def foreseen(experiment):
    found = forecast.forecast(experiment, RunProgress(1, Console(quiet=True)))
    assert found is not None
    return found


def protected(experiment):
    """The sites, the mechanism and the population of an experiment."""
    sites = forecast.split_sites(experiment, forecast.load_dataset(experiment))
    return sites, *forecast.protection(experiment, sites)


def test_a_look_needs_no_model_and_says_all(file, capsys):
    assert main(["--config", str(file)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "unit of privacy         record",
        "add or remove one record",
        "0.001",
        "DpSgd, PLD accounting, reproducible randomness",
        "every record's gradient in each step, to 1 (flat)",
        "by each site, to the sum of each of its steps",
        "noise multiplier 1.5, of Poisson samples (q = ",
        "Holds against: ",
        "Not covered:",
        "Assumed:",
        "is public",
        "Epsilon at delta 0.001 (add or remove one record) of ",
        "4 rounds",
        "16 rounds",
    ):
        assert words in shown, words


def test_the_figures_are_those_of_the_events(file):
    experiment = config.load(file)
    found = foreseen(experiment)
    sites = {site.name: site for site in forecast.split_sites(experiment, forecast.load_dataset(experiment))}
    accounts = found.statement["accounts"]
    assert accounts.keys() == sites.keys()
    rounds = 0
    for name, figures in accounts.items():
        steps, units = figures["releases"], len(sites[name].train)
        assert steps % 3 == 0
        rounds += steps // 3
        expected = accounting.epsilon([Event("gaussian", 1.5, min(1.0, 2 / units), steps)], 1e-3)
        assert figures["epsilon"] == pytest.approx(expected)
        assert (figures["units"], figures["noise_multiplier"]) == (units, 1.5)
    assert rounds == 4 * 2, "two sites in each of four rounds"
    assert found.statement["epsilon"] == max(figures["epsilon"] for figures in accounts.values())


def test_the_grid_lies_around_the_configuration(file):
    found = foreseen(config.load(file))
    grid = found.grid
    assert grid.rounds == (1, 2, 4, 8, 16)
    assert grid.noise == pytest.approx((0.75, 1.5 / math.sqrt(2), 1.5, 1.5 * math.sqrt(2), 3.0))
    assert grid.epsilon[2][2] == found.statement["epsilon"] == found.statement["accounts"][grid.account]["epsilon"]
    for row, quieter in zip(grid.epsilon[1:], grid.epsilon, strict=False):
        assert all(more_noise <= less_noise for more_noise, less_noise in zip(row, quieter, strict=True))
    for row in grid.epsilon:
        assert list(row) == sorted(row)


def test_noise_that_is_made_for_one_number_of_rounds_is_shown_for_that_alone(file):
    experiment = config.load(file)
    sites, mechanism, _ = protected(experiment)
    whole = mechanism._replace(events=dict.fromkeys(mechanism.events, Event("matrix", 1.5, count=3)))
    grid = forecast.grid_around(experiment, sites, whole, "hill")
    assert grid.rounds == (4,)
    assert [row[0] for row in grid.epsilon] == [accounting.epsilon([Event("matrix", z)], 1e-3) for z in grid.noise]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_what_fits_a_budget_fits_and_no_more_does(file, accountant):
    experiment = changed(config.load(file), privacy__budget_epsilon=2.0, privacy__accountant=accountant)
    _, mechanism, population = protected(experiment)
    (planned,) = forecast.releases_planned(mechanism, population, 4)["hill"]
    done = []
    found = forecast.fit(experiment, mechanism, "hill", (planned,), lambda: done.append(1))

    def epsilon(event, **other):
        return accounting.epsilon([replace(event, **other)], 1e-3, accountant)

    assert 1 <= found.rounds < 4
    one = mechanism.events["hill"]
    assert epsilon(one, count=3 * found.rounds) <= 2.0 < epsilon(one, count=3 * (found.rounds + 1))
    assert found.probability is not None
    assert 0 < found.probability < planned.sampling_probability
    more = found.probability + 1e-6
    assert epsilon(planned, sampling_probability=found.probability) <= 2.0 < epsilon(planned, sampling_probability=more)
    assert len(done) == 2


@pytest.mark.parametrize(
    ("mechanism", "account", "sampled"),
    [
        (LocalDp(noise_multiplier=100.0), "hill", False),
        (DpFedAvg(noise_multiplier=100.0), EVERY_SITE, True),
        (DpFedAvg(noise_multiplier=100.0, cohort_is_secret=False), EVERY_SITE, False),
    ],
)
def test_only_sampling_that_counts_is_fitted(file, mechanism, account, sampled):
    privacy = Privacy(mechanism, "site", budget_epsilon=0.1, delta=1e-3)
    federation = Federation(rounds=2, weighting="uniform")
    experiment = changed(config.load(file), federation=federation, privacy=privacy)
    _, made, population = protected(experiment)
    assert forecast.fits_are_found(experiment, made, account)
    found = forecast.fit(experiment, made, account, forecast.releases_planned(made, population, 2)[account])
    assert found.probability == (1.0 if sampled else None)
    assert found.rounds > 2


def test_what_cannot_be_fitted_is_not(file):
    open_ended = config.load(file)
    _, mechanism, _ = protected(open_ended)
    budget = changed(open_ended, privacy__budget_epsilon=1.0)
    assert not forecast.fits_are_found(open_ended, mechanism, "hill")
    assert forecast.fits_are_found(budget, mechanism, "hill")
    assert not forecast.fits_are_found(budget, mechanism, "coast / hill")
    banded = mechanism._replace(events={"hill": Event("banded", 1.5, 0.5, 3, 2)})
    assert not forecast.fits_are_found(budget, banded, "hill")


def test_overrides_are_those_of_a_run(file, capsys, small_grid):
    words = ["--privacy.mechanism.noise-multiplier=3.0", "--federation.rounds=7", "--privacy.delta=1e-4"]
    assert main([f"--config={file}", *words]) == 0
    shown = capsys.readouterr().out
    assert "noise multiplier 3, of Poisson samples" in shown
    assert "Epsilon at delta 0.0001" in shown
    assert "7 rounds" in shown
    with pytest.raises(SystemExit):
        main([f"--config={file}", "--privacy.mechanism.noise-multiplyer=3.0"])
    assert "noise-multiplier" in capsys.readouterr().err


def test_a_budget_that_does_not_suffice_is_told(file, capsys, small_grid):
    assert main([f"--config={file}", "--privacy.budget-epsilon=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "more than the budget of 0.5: the run will end before that" in shown
    assert "Calibrating rounds and sampling: done" in shown
    assert "What fits epsilon 0.5 at delta 0.001 (add or remove one record) of hill" in shown
    assert re.search(r"rounds, at this noise and sampling +none: a single round spends more", shown)
    assert re.search(r"these rounds +0\.\d+, which is 0\.\d+ records a step on average", shown)


@pytest.mark.parametrize(
    ("fit", "texts"),
    [
        (forecast.Fit(0, 0.0), ("none: a single round spends more", "none: even one in a million spends more")),
        (forecast.Fit(1_000_000, 1.0), ("1,000,000 or more", "1, which is 6 records a step on average")),
        (forecast.Fit(7, 0.1234), ("sampling                    7 ", "0.1234, which is 0.74 records a step")),
        (None, ("Not computed: the rounds and the sampling that fit the budget",)),
    ],
)
def test_a_fit_is_told_in_words(file, small_grid, fit, texts):
    experiment = config.load(file)
    found = replace(foreseen(experiment), fit=fit)
    assert foreseen(experiment).fit is None, "there is no budget"
    stated = {**found.statement, "budget": 0.5}
    console = Console(file=io.StringIO(), width=200)
    experiment = changed(experiment, privacy__budget_epsilon=0.5)
    forecast.render(console, experiment, replace(found, statement=stated))
    for text in texts:
        assert text in console.file.getvalue()


def test_rounds_of_an_account_are_those_that_it_takes_part_in(file, small_grid):
    experiment = config.load(file)
    found = foreseen(experiment)
    found = replace(found, grid=replace(found.grid, account="town"), fit=forecast.Fit(9, None))
    console = Console(file=io.StringIO(), width=200)
    stated = {**found.statement, "budget": 5.0}
    forecast.render(console, experiment, replace(found, statement=stated))
    assert "9 that town takes part in (of the 4 configured: 1)" in console.file.getvalue()


@pytest.mark.parametrize(("part", "stops"), [(1.0, False), (1 - 5e-10, False), (1 - 2e-9, True)])
def test_a_budget_is_exceeded_as_in_a_run(file, part, stops):
    experiment = config.load(file)
    _, mechanism, population = protected(experiment)
    needed = forecast.promised(experiment, mechanism, population)["epsilon"]
    tight = changed(experiment, privacy__budget_epsilon=needed * part)
    assert (forecast.promised(tight, mechanism, population)["stopped"] is not None) == stops
    assert charging.exceeds(tight.privacy, needed) == stops


def test_a_configuration_without_privacy_says_so(file, tmp_path, capsys):
    text = file.read_text().replace("privacy=Privacy(DpSgd(noise_multiplier=1.5), delta=1e-3),", "")
    (tmp_path / "open.py").write_text(text)
    assert main([f"--config={tmp_path / 'open.py'}"]) == 0
    assert "no differential privacy" in capsys.readouterr().out


def test_what_cannot_be_protected_is_an_error(file, capsys):
    assert main([f"--config={file}", "--privacy.unit=site"]) == 2
    assert "privacy.unit" in capsys.readouterr().err
    assert main([f"--config={file}", "--federation.cohort=9"]) == 2
    assert "federation.cohort is 9, but there are only 3 sites" in capsys.readouterr().err
    assert main(["--config=no/such.py"]) == 2
    assert "there is no configuration file" in capsys.readouterr().err


def test_the_noise_that_is_taught_protects_nobody(file, small_grid):
    experiment = config.load(ROOT / "configs/course/dp_as_taught.py")
    mechanism = experiment.privacy.mechanism
    assert (mechanism.clip_norm, mechanism.noise_multiplier, experiment.federation.rounds) == (0.5, 0.02, 200)
    sites = SiteFiles((str(file.parent / "sites"),), id_column="id")
    found = foreseen(changed(experiment, data__source=sites, data__fractions=config.Fractions(0.0, 0.0)))
    assert found.planned == {EVERY_SITE: (Event("gaussian", 0.02, 0.8, 200),)}
    assert (found.statement["unit"], found.statement["delta"]) == ("site", 1e-5)
    # No larger than without sampling, and no smaller than where each site is known to be in 160 of the 200 rounds.
    least, most = (accounting.epsilon([Event("gaussian", 0.02, 1.0, rounds)], 1e-5) for rounds in (160, 200))
    assert least < found.statement["epsilon"] < most
    assert 200_000 < found.statement["epsilon"] < 300_000
    assert experiment.data.partition == Iid(20)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was killed after three rounds."""
    settings = {"seed": 1, "execution": {"buckets": 3}, "privacy": {"mechanism": {"class": "DpSgd"}}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    header = ledger.Header(
        unit="record",
        adjacency="add or remove one record",
        mechanism="DpSgd",
        delta=1e-5,
        accountant="pld",
        randomness="secret",
        accounts={"north": 100},
        shared=(),
        config=ledger.config_hash(settings, config.MAY_CHANGE),
    )
    book = ledger.create(tmp_path / ledger.LEDGER, header)
    for number in (1, 2, 3):
        ledger.append(book, number, "a", {"north": Event("gaussian", 5.0)}, repeatable=True)
    return tmp_path


def claim(run, epsilon):
    line = {"unit": "record", "delta": 1e-5, "max": epsilon, "accounts": {"north": epsilon}}
    (run / "metrics.jsonl").write_text(json.dumps({"round": 3, "epsilon": line}) + "\n")


def test_a_run_that_claims_what_it_released_passes(run, capsys):
    assert main([str(run)]) == 0
    assert "claimed no epsilon yet" in capsys.readouterr().out
    claim(run, accounting.epsilon([Event("gaussian", 5.0, count=3)], 1e-5))
    assert main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert "agrees with the ledger" in shown
    assert "Notice" not in shown, "the configuration is that of the ledger, and its randomness is secret"


def test_a_run_that_claims_less_than_it_released_fails(run, capsys):
    claim(run, 0.5)
    assert main([str(run), "--delta", "1e-3"]) == 1
    shown = capsys.readouterr().out
    assert "at delta 0.001 for one record" in shown
    assert "The claim of metrics.jsonl, round 3 is too small: epsilon 0.5 for " in shown


def test_a_run_that_cannot_be_counted_is_an_error(run, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    raw = (run / ledger.LEDGER).read_bytes()
    (run / ledger.LEDGER).write_bytes(raw.replace(b"5.0", b"9.0", 1))
    assert main([str(run)]) == 2
    assert "line 2: its content does not fit its hash" in capsys.readouterr().err
