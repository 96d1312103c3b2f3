"""The attack's command line, and the attacks that come along."""

from pathlib import Path

import pytest
from small_run import go, write_small

from experiments.attack import main
from fedjax_llm import config
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import attack, attacked_run, open_model
from fedjax_llm.experiment.course import Course, cells_of
from fedjax_llm.experiment.open_model import OpenModel

ROOT = Path(__file__).parents[2]
SMALL = ["--attacks.candidates=4", "--attacks.tokens-per-microbatch=384"]


def written(folder, body):
    """A configuration of an attack."""
    path = folder / "mine.py"
    path.write_text(f"from fedjax_llm.experiment.open_model import OpenModel\n\n\ndef get_attack():\n    {body}\n")
    return f"--config={path}"


@pytest.fixture(scope="module")
def base(tmp_path_factory, short_reports):
    """A folder with a configuration, and the run of it."""
    folder = tmp_path_factory.mktemp("small")
    small = write_small(folder / "files")
    assert go(config.load(small), folder / "run")[0] == 0
    return folder


def test_a_run_is_attacked(base, capsys):
    assert main([str(base / "run"), *SMALL]) == 0
    seen = capsys.readouterr().out
    assert "Membership inference" in seen
    assert "Planted secrets" not in seen  # none were
    assert f"Figures: {base}/run/leakage.json" in seen
    assert (base / "run" / "leakage.html").is_file()


def test_a_run_with_its_own_configuration_and_with_another(base, capsys, tmp_path):
    small = base / "files" / "small.py"
    assert main([str(base / "run"), f"--config={small}", *SMALL]) == 0
    other = tmp_path / "other.py"
    other.write_text(small.read_text().replace("batch_size=2", "batch_size=3"))
    capsys.readouterr()
    assert main([str(base / "run"), f"--config={other}", *SMALL]) == 2
    assert "training.batch_size: 2 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 3])
def test_what_is_found_is_the_exit_status(status, monkeypatch, tmp_path):
    given = []

    def attack_run(run, attacks, console, **options):
        given.append((run, attacks.shadows, options))
        return status

    monkeypatch.setattr(attacked_run, "attack_run", attack_run)
    assert main([str(tmp_path), "--site=hill", "--attacks.shadows=4"]) == status
    assert given == [(tmp_path, 4, {"site": "hill", "experiment": None})]


@pytest.mark.parametrize("status", [0, 3, 130])
def test_a_configuration_is_carried_out_where_its_name_says(status, monkeypatch, tmp_path):
    given = []
    runners = ((OpenModel, lambda attack, folder, console: given.append((attack, folder)) or status),)
    monkeypatch.setattr("fedjax_llm.experiment.attack.RUNNERS", runners)
    words = written(tmp_path, "return OpenModel(letters=2)")
    assert main([words]) == status
    assert main([words, f"--out={tmp_path / 'there'}"]) == status
    assert given == [(OpenModel(letters=2), folder) for folder in (Path("runs/mine"), tmp_path / "there")]


WRONG = {
    "nothing": ([], "name the folder of a run, or a configuration"),
    "no run": (["{folder}"], "is not the folder of a run"),
    "an output of a run": (["{folder}", "--out=x"], "--out is for a configuration"),
    "a site without a run": (["{mine}", "--site=hill"], "--site, --key-file and --attacks are for runs"),
    "a key without a run": (["{mine}", "--key-file=k"], "--site, --key-file and --attacks are for runs"),
    "attacks without a run": (["{mine}", "--attacks.beams=0"], "--site, --key-file and --attacks are for runs"),
    "no such file": (["--config=configs/attacks/corse.py"], "did you mean 'course.py'?"),
    "another kind of file": (["--config=configs/quickstart.py"], "has no function get_attack()"),
    "impossible attacks": (["{folder}", "--attacks.shadows=3"], "attacks.shadows is 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words, message = WRONG[case]
    mine = written(tmp_path, "return OpenModel()")
    try:
        status = main([word.format(folder=tmp_path, mine=mine) for word in words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_no_attack_is_refused(tmp_path, capsys):
    assert main([written(tmp_path, "return 3")]) == 2
    names = ", ".join(kind.__name__ for kind, _ in attack.RUNNERS)
    assert f"get_attack() gave a int; it must give one of {names}" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c(tmp_path, capsys, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(open_model, "passages", pressed)
    monkeypatch.setattr("fedjax_llm.experiment.attack.RUNNERS", ((OpenModel, pressed),))
    assert main([written(tmp_path, "return OpenModel()")]) == 130
    assert capsys.readouterr().out == "Stopped. The same command goes on.\n"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/attacks").glob("*.py")), ids=lambda path: path.stem)
def test_the_attacks_that_come_along_are_possible(path, tmp_path):
    found = attack.load(path)
    assert isinstance(found, tuple(kind for kind, _ in attack.RUNNERS))
    if isinstance(found, Course):
        cells = cells_of(found, tmp_path)
        assert len({cell.folder for cell in cells}) == len(cells) == len(found.ways) * len(found.seeds)


def test_of_every_kind_there_is_one():
    kinds = {type(attack.load(path)) for path in (ROOT / "configs/attacks").glob("*.py")}
    assert kinds <= {kind for kind, _ in attack.RUNNERS}
    with pytest.raises(UserError, match="it must give one of"):
        attack.run_attack(object(), Path("nowhere"), None)
