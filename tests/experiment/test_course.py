"""A course in miniature: ordinary runs in two ways, attacked on one ground, and nothing is done twice."""

import io
import json
import shutil
from dataclasses import replace

import pytest
from attacked import OFTEN, known_experiment, load_tiny, write_words
from rich.console import Console

from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.data.splits import Fractions
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import course as courses
from fedjax_llm.experiment.course import Course, cells_of, run_course
from fedjax_llm.experiment.course_report import BASE, COLUMNS, course_rows
from fedjax_llm.experiment.ground import Attacks
from fedjax_llm.experiment.memorisation import Memorisation
from fedjax_llm.lora import Lora

ATTACKS = Attacks(candidates=12, references=7, beams=0, shadows=4, shadow_epochs=2, tokens_per_microbatch=2048)
WAYS = {
    "together, in one place": {},
    "hardly trained": {"federation.rounds": 1, "training.local_steps": 1},
}


pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    experiment = known_experiment(write_words(tmp_path_factory.mktemp("words") / "files"))
    lora = Lora(rank=2, targets=("q_proj",))
    more = Memorisation(experiment, None, lora, steps=1, checks=1, batch_size=16, validation=2, references=3)
    return Course(experiment, WAYS, seeds=(3,), attacks=ATTACKS, memorisation=more)


def go(course, folder):
    """The exit status, ``course.json`` if there is one, and what the user saw."""
    seen, path = io.StringIO(), folder / "course.json"
    status = run_course(course, folder, Console(file=seen, width=200), load_tiny)
    return status, json.loads(path.read_text()) if path.exists() else None, seen.getvalue()


@pytest.fixture(scope="module")
def ended(course, tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "whole"
    return folder, *go(course, folder)


@pytest.fixture
def copy(ended, tmp_path):
    return shutil.copytree(ended[0], tmp_path / "copy")


@pytest.fixture
def done(monkeypatch):
    """Which runs are trained, which models are measured (the base model counts), and how often shadows are trained."""
    found = {"run": [], "measure": 0, "shadow_statistics": 0}
    run, measure, shadows = courses.run_quietly, courses.measure, courses.shadow_statistics

    def ran(experiment, folder, *options):
        found["run"].append(folder.parent.name)
        return run(experiment, folder, *options)

    def counted(name, function):
        def called(*args, **options):
            found[name] += 1
            return function(*args, **options)

        return called

    monkeypatch.setattr(courses, "run_quietly", ran)
    monkeypatch.setattr(courses, "measure", counted("measure", measure))
    monkeypatch.setattr(courses, "shadow_statistics", counted("shadow_statistics", shadows))
    return found


def test_runs_figures_and_page_are_written(course, ended):
    folder, status, found, seen = ended
    assert status == 0
    assert [(one["way"], one["seed"], one["folder"]) for one in found["runs"]] == [
        ("together, in one place", 3, "together-in-one-place/seed-3"),
        ("hardly trained", 3, "hardly-trained/seed-3"),
    ]
    for one in found["runs"]:
        summary = json.loads((folder / one["folder"] / "summary.json").read_text())
        leaks = json.loads((folder / one["folder"] / "leakage.json").read_text())
        assert one["final"]["nll"] == summary["final"]["nll"]
        assert one["base"]["token_accuracy"] == summary["base"]["token_accuracy"]
        assert (one["membership"], one["secrets"]) == (leaks["membership"], leaks["secrets"])
        assert one["audit"] == leaks["audit"]
        assert {"lira", "rmia", "loss"} <= set(one["membership"])
        assert one["claim"] is None
    assert found["base"] == json.loads((folder / "base.json").read_text())
    assert set(found["memorisation"]["trainings"]) == {"full fine-tuning", "LoRA"}
    assert {path.name for path in folder.iterdir()} >= {"shadows.npz", "leakage.html", "leakage.md", "full-fine-tuning"}
    for text in (seen, (folder / "leakage.md").read_text()):
        assert "together, in one place" in text
        assert BASE in text
    assert "Full fine-tuning and LoRA" in (folder / "leakage.html").read_text()


def test_the_table_has_a_row_for_every_model(ended):
    _, _, found, _ = ended
    table = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in course_rows(found)}
    assert tuple(table) == (BASE, *WAYS)
    trained, hardly = (table[name] for name in WAYS)
    assert {row["among the beams"] for row in table.values()} == {"-"}  # no beams were made
    assert (table[BASE]["epsilon"], trained["epsilon"]) == ("-", "none")
    assert int(trained["secrets given back, greedy"].split("%")[0]) >= 50
    for row in (table[BASE], hardly):
        assert row["secrets given back, greedy"].startswith("0% [0%, ")
    assert trained[f"exposure, {OFTEN}x and more"].startswith("3.00 [3.00, 3.00]")
    areas = [float(row["best membership AUC"].split()[0]) for row in (table[BASE], trained)]
    assert areas[1] > max(0.9, areas[0])
    nll = found["runs"][0]["final"]["nll"]
    assert trained["loss, nats a token"].startswith(f"{nll:.3f} [")
    assert trained["seeds' spread"] == "-"


def test_the_base_model_is_measured_as_the_runs_are(ended):
    _, _, found, _ = ended
    assert found["base"]["audit"]["lower_bound"] == 0.0
    assert [one["value"] for one in found["base"]["secrets"]] == [one["value"] for one in found["runs"][0]["secrets"]]
    assert found["base"]["membership"]["reference"]["auc"] == 0.5


def test_started_again_it_does_nothing_and_says_the_same(course, copy, ended, done):
    status, found, _ = go(course, copy)
    assert status == 0
    assert done == {"run": [], "measure": 0, "shadow_statistics": 0}
    for name in ("runs", "base", "memorisation"):
        assert found[name] == ended[2][name]


def test_it_goes_on_where_it_ended(course, copy, ended, done):
    (copy / "hardly-trained/seed-3/leakage.json").unlink()
    (copy / "course.json").unlink()
    assert go(course, copy)[1]["runs"] == ended[2]["runs"]
    assert done == {"run": [], "measure": 1, "shadow_statistics": 0}
    shutil.rmtree(copy / "hardly-trained")
    (copy / "shadows.npz").unlink()
    (copy / "base.json").unlink()
    _, found, _ = go(course, copy)
    assert done == {"run": ["hardly-trained"], "measure": 3, "shadow_statistics": 1}
    before = ended[2]["runs"][1]
    assert found["runs"][1]["final"] == before["final"]
    assert found["runs"][1]["secrets"] == before["secrets"]


def test_ctrl_c_keeps_what_is_finished(course, tmp_path, monkeypatch):
    monkeypatch.setattr(courses, "run_quietly", lambda *_: 130)
    monkeypatch.setattr(courses, "_attack_all", lambda *_: pytest.fail("attacks what was not trained"))
    status, found, seen = go(course, tmp_path)
    assert (status, found) == (130, None)
    assert "Stopped. Finished runs are kept; the same command goes on with the others." in seen


def test_a_contradicted_claim_shows_in_the_exit_status(course, copy):
    path = copy / "together-in-one-place/seed-3/leakage.json"
    leaks = json.loads(path.read_text())
    path.write_text(json.dumps(leaks | {"claim": {"epsilon": 0.01, "delta": 1e-3, "unit": "record"}}))
    status, found, seen = go(course, copy)
    assert status == 3
    assert found["runs"][0]["audit"]["contradicted"] is True
    assert "AUDIT FAILED" in seen


def test_other_settings_are_refused_before_anything_is_done(course, copy, done):
    other = replace(course, experiment=replace(course.experiment, data=replace(course.experiment.data, max_length=150)))
    with pytest.raises(UserError, match=r"was started with other settings:\n  data.max_length: 160 -> 150"):
        go(other, copy)
    harder = replace(course, attacks=replace(ATTACKS, candidates=10))
    with pytest.raises(UserError, match=r"attacked with other settings:\n  candidates: 12 -> 10"):
        go(harder, copy)
    assert done == {"run": [], "measure": 0, "shadow_statistics": 0}


def test_more_seeds_can_be_added(course, tmp_path):
    cells = cells_of(replace(course, seeds=(3, 4)), tmp_path)
    assert [(cell.way, cell.seed) for cell in cells] == [(way, seed) for seed in (3, 4) for way in WAYS]
    assert cells[:2] == cells_of(course, tmp_path)
    assert {cell.experiment.seed for cell in cells} == {3, 4}
    assert cells[1].experiment.federation.rounds == 1


REFUSED = {
    "nothing": ({"ways": {}}, "at least one way and one seed"),
    "no seed": ({"seeds": ()}, "at least one way and one seed"),
    "the base model": ({"ways": {BASE: {}}}, "no way can be called 'base model'"),
    "other data": ({"ways": {"x": {"data.fractions": Fractions(0.2, 0.2)}}}, "way 'x' changes data or model"),
    "another model": ({"ways": {"x": {"model.name": "other"}}}, "way 'x' changes data or model"),
    "adapters of sites": ({"ways": {"x": {"setting": "local"}}}, "way 'x' has the setting local"),
    "no such field": ({"ways": {"x": {"lora.rnk": 2}}}, "lora.rnk, which does not exist"),
    "no name": ({"ways": {"/": {}}}, "'/' cannot name a folder"),
    "one folder for two": ({"ways": {"a b": {}, "a-b": {}}}, "would share the folder 'a-b'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_course_is_refused(case, course):
    fields, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        replace(course, **fields)


def test_a_course_plants_secrets(course):
    data = course.experiment.data
    for source in (data.source.source, PlantedSecrets(data.source.source, per_repetition=0, coins=4)):
        with pytest.raises(UserError, match="a course needs secrets planted without coins"):
            replace(course, experiment=replace(course.experiment, data=replace(data, source=source)))
