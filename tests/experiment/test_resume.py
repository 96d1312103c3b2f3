"""A run that is killed, interrupted or damaged at any instant and resumed ends with the bits of an unbroken one."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from killing import at_call, in_a_process
from small_run import changed, go, outcome, write_small

from fedjax_llm import config
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import finish, prepare
from fedjax_llm.runs import metrics
from fedjax_llm.runs.checkpoints import Checkpoints, finished_steps
from fedjax_llm.runs.metrics import MetricsLog

pytestmark = pytest.mark.usefixtures("short_reports")

# A server's and clients' memory, and validation: all that a checkpoint can hold is there.
FIELDS = {
    "aggregation": FedAdam(1e-2),
    "training__keep_optimizer": "yes",
    "evaluation__validation_every": 2,
    "federation__rounds": 4,
    "output__keep_last": 1,
}

# Where one read or write of several fails, the others call a loop that is closed already; nobody waits for them.
NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "files")


@pytest.fixture(scope="module")
def experiment(files):
    return changed(config.load(files), **FIELDS)


@pytest.fixture(scope="module")
def unbroken(experiment, tmp_path_factory):
    """What an unbroken run gives."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert in_a_process(experiment, folder, needle="never") == 0
    return outcome(folder)


def resumed(experiment, folder, *words):
    """Resumes in this process; says what is then there."""
    status, seen = go(experiment, folder, resume=True)
    assert status == 0
    assert all(word in seen for word in words), seen
    return outcome(folder)


KILLS = {  # by instant: where; which checkpoints are then finished
    "while the text is read": (("fedjax_llm.experiment.prepare", "split_sites"), []),
    "line written, checkpoint not begun": (("fedjax_llm.runs.metrics:MetricsLog", "append", "", 2, True), [1]),
    "in a save, before an item is whole": (("os", "rename", "2.orbax-checkpoint-tmp/state"), [1]),
    "in a save, before the last rename": (("os", "rename", "2.orbax-checkpoint-tmp", 3), [1]),
    "just after a save": (("os", "rename", "2.orbax-checkpoint-tmp", 3, True), [1, 2]),
    "while an old checkpoint goes": (("shutil", "rmtree", "1.orbax-checkpoint-tmp-old"), [2]),
    "in the evaluation": (("fedjax_llm.experiment.finish", "_evaluation"), [4]),
    "before the summary": (("fedjax_llm.experiment.finish", "summarise"), [4]),
}


@pytest.mark.parametrize("instant", KILLS)
def test_killed_and_resumed(experiment, unbroken, tmp_path, instant):
    where, steps = KILLS[instant]
    folder = tmp_path / "run"
    assert in_a_process(experiment, folder, *where) == -signal.SIGKILL
    assert finished_steps(folder / "checkpoints") == steps
    assert list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")) or "save" not in instant or len(steps) > 1
    if steps:
        log = folder / "metrics.jsonl"
        assert len(metrics.read(log)) >= steps[-1]
        with log.open("a") as file:  # and in the middle of a line
            file.write('{"round": 3, "lo')
    word = f"Going on after round {steps[-1]}" if steps else "beginning with the first round"
    assert resumed(experiment, folder, word) == unbroken
    assert finished_steps(folder / "checkpoints") == [4]


INTERRUPTS = {
    "preparing": (prepare, "split_sites", 1, False, None),
    "line written": (MetricsLog, "append", 2, True, 1),
    "before a save": (Checkpoints, "save", 2, False, 1),
    "a save has begun": (Checkpoints, "save", 2, True, 2),
    "waiting for a save": (Checkpoints, "_wait", 3, False, 2),
    "ending the rounds": (Checkpoints, "close", 1, True, 4),
    "evaluating": (finish, "_evaluation", 1, False, 4),
}


@pytest.mark.parametrize("instant", INTERRUPTS)
def test_interrupted_and_resumed(experiment, unbroken, tmp_path, monkeypatch, instant):
    place, name, call, after, done = INTERRUPTS[instant]
    with monkeypatch.context() as patch:
        at_call(patch.setattr, place, name, partial(signal.raise_signal, signal.SIGINT), "", call, after)
        status, seen = go(experiment, tmp_path / "run")
    assert status == 130
    kept = "No round was finished" if done is None else f"Everything up to round {done} is kept"
    assert f"Stopped. {kept}. Go on with: " in seen
    assert seen.rstrip().endswith("--resume")
    assert finished_steps(tmp_path / "run" / "checkpoints")[-1:] == ([] if done is None else [done])
    assert resumed(experiment, tmp_path / "run") == unbroken


INTERRUPTED = """
import os, runpy, signal
from fedjax_llm.runs.checkpoints import Checkpoints

save = Checkpoints.save

def interrupted(self, step, *rest):
    save(self, step, *rest)
    if step == 2:
        os.kill(os.getpid(), signal.SIGINT)  # while orbax writes

Checkpoints.save = interrupted
get_config = runpy.run_path({config!r})["get_config"]
"""


def test_ctrl_c_at_the_command_line(files, tmp_path):
    """The real command, with a configuration file that presses Ctrl-C in the middle of a save."""
    (tmp_path / "pressed.py").write_text(INTERRUPTED.format(config=str(files)))
    arguments = ["-m", "experiments.run", f"--config={tmp_path / 'pressed.py'}", "--out", str(tmp_path / "a run")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("Stopped. Everything up to round 2 is kept. Go on with: ")
    options = f"--config={tmp_path}/pressed.py --out '{tmp_path}/a run' --resume"
    assert last.endswith(f"{Path(sys.executable).name} -m experiments.run {options}")
    plain = config.load(files)
    assert go(plain, tmp_path / "unbroken")[0] == 0
    assert resumed(plain, tmp_path / "a run", "Going on after round 2") == outcome(tmp_path / "unbroken")


@pytest.fixture
def stopped(experiment, tmp_path, monkeypatch):
    """A run that was stopped after round 3, with two checkpoints."""
    experiment = changed(experiment, output__keep_last=2)
    with monkeypatch.context() as patch:
        at_call(patch.setattr, Checkpoints, "save", partial(signal.raise_signal, signal.SIGINT), "", 3, True)
        assert go(experiment, tmp_path / "run")[0] == 130
    assert finished_steps(tmp_path / "run" / "checkpoints") == [2, 3]
    return experiment, tmp_path / "run"


def damage(checkpoint: Path, how: str) -> None:
    """Damages the arrays of a checkpoint."""
    for path in (checkpoint / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else content)


@NOISE
@pytest.mark.parametrize("how", ["truncated", "one bit flipped"])
def test_a_damaged_newest_checkpoint(stopped, unbroken, how):
    experiment, folder = stopped
    damage(folder / "checkpoints" / "3", how)
    said = ("checkpoint 3 in", "is damaged", "taking the one before", "Going on after round 2")
    assert resumed(experiment, folder, *said) == unbroken
    assert finished_steps(folder / "checkpoints") == [3, 4]


@NOISE
def test_no_intact_checkpoint_is_an_error(stopped):
    experiment, folder = stopped
    for step in ("2", "3"):
        damage(folder / "checkpoints" / step, "truncated")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is intact; start a new run"):
        go(experiment, folder, resume=True)


@NOISE
def test_the_layout_may_change_on_resuming(stopped, unbroken):
    experiment, folder = stopped
    layout = {"execution__clients_per_chunk": 1, "execution__tokens_per_microbatch": 128, "output__keep_last": 1}
    found = resumed(changed(experiment, **layout), folder)
    for kind in ("base", "final"):
        assert found["summary"][kind]["nll"] == pytest.approx(unbroken["summary"][kind]["nll"], abs=1e-5)
    assert config.to_json(changed(experiment, **layout)) == finish.directory.read_json(folder / "config.json")


def test_other_settings_are_refused_and_listed(stopped):
    experiment, folder = stopped
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        go(changed(experiment, lora__rank=4, training__optimizer__learning_rate=0.5, seed=3), folder, resume=True)
    message = str(caught.value)
    assert "lora.rank: 2 -> 4\n" in message
    assert "training.optimizer.learning_rate: 0.01 -> 0.5\n" in message
    assert "seed: 0 -> 3\n" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", ["weights", "text"])
def test_another_model_or_text_is_refused(stopped, files, what):
    experiment, folder = stopped
    path = files.parent / ("model/model.safetensors" if what == "weights" else "sites/hill.jsonl")
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + b"\x3e" if what == "weights" else before.replace(b"Ada", b"Eva"))
        with pytest.raises(UserError, match="the model's weights or the text are not those"):
            go(experiment, folder, resume=True)
    finally:
        path.write_bytes(before)
    assert finished_steps(folder / "checkpoints") == [2, 3]


def test_a_finished_run_can_be_resumed_and_stays_what_it_is(experiment, unbroken, tmp_path):
    assert go(experiment, tmp_path / "run")[0] == 0
    assert resumed(experiment, tmp_path / "run", "Going on after round 4") == unbroken
