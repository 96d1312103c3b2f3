"""Trackers of every temper: told what they may know, and no danger to a run."""

import dataclasses
import threading
import time
from dataclasses import dataclass, field

import pytest

from fedjax_llm.config import MAY_CHANGE, Experiment, check, to_json
from fedjax_llm.errors import UserError
from fedjax_llm.privacy.ledger import config_hash
from fedjax_llm.runs import directory
from fedjax_llm.runs.keys import Encryption
from fedjax_llm.runs.mlflow_tracker import MLflow
from fedjax_llm.runs.output import Output
from fedjax_llm.runs.tensorboard import scalars
from fedjax_llm.runs.tracking import MEMORY, Tracked, Trackers, aggregate, table
from fedjax_llm.runs.wandb_tracker import Wandb

LINE = {
    "round": 4, "loss": 2.5, "cohort": ["a", "b"], "sites": {"a": {"loss": 2.25}}, "validation": None,
    "epsilon": {"unit": "record", "delta": 1e-5, "max": 3.0, "accounts": {"a": 3.0}}, "timing": {"seconds": 1.5},
}  # fmt: skip
SUMMARY = {
    "final": {"nll": 2.5, "sites": {"a": {"nll": 2.0}}}, "sites": {"a": {"train_records": 7}}, "rounds": 3,
    "privacy": {"line": "epsilon <= 3.00 ...", "epsilon": 3.0, "accounts": {"a": {"epsilon": 3.0}}}, "secure": None,
}  # fmt: skip


@dataclass(frozen=True)
class Diary:
    """Writes down what it is told; fails or waits where it is bidden to."""

    name: str = "diary"
    sites: bool = False
    fails_at: str = ""
    waits: threading.Event | None = None
    told: list = field(default_factory=list, repr=False)

    def check(self):
        """Has nothing to refuse."""

    def begin(self, run):
        self._do("begin", run)
        return Tracked(run.known or f"{self.name}-1", lambda step, numbers: self._do("scalars", (step, numbers)),
                       lambda summary: self._do("finish", summary))  # fmt: skip

    def _do(self, what, value):
        if self.waits is not None:
            self.waits.wait(20)
        if what == self.fails_at:
            raise ConnectionError("no route to the service.\nand a long story")
        self.told.append((what, value))


def follow(folder, *diaries, rounds=1, summary=SUMMARY, patience=20.0):
    said = []
    with Trackers(diaries, {"seed": 0}, folder, said.append, patience) as trackers:
        for _ in range(rounds):
            trackers.round(LINE)
            time.sleep(0.05)
        if summary is not None:
            trackers.finish(summary)
    return said


def test_aggregates_are_told_and_sites_only_where_wanted(tmp_path):
    plain, whole = Diary("plain"), Diary("whole", sites=True)
    assert follow(tmp_path, plain, whole) == []
    assert [what for what, _ in plain.told] == ["begin", "scalars", "finish"]
    assert whole.told[1][1] == (4, dict(scalars(LINE)))  # all that TensorBoard has
    assert plain.told[1][1] == (4, {name: value for name, value in scalars(LINE) if "/a" not in name})
    assert {"loss", "cohort", "epsilon/max", "epsilon/delta", "timing/seconds"} == set(plain.told[1][1][1])
    assert plain.told[2][1] == {
        "final/nll": 2.5, "rounds": 3.0, "privacy/epsilon": 3.0, "privacy/line": "epsilon <= 3.00 ...",
    }  # fmt: skip
    assert whole.told[2][1] == table(SUMMARY)
    assert plain.told[0][1].config == {"seed": 0}


def test_what_is_aggregate_loses_sites_at_any_depth():
    assert aggregate({"a": {"b": {"sites": 1, "c": 2}}, "accounts": {}}) == {"a": {"b": {"c": 2}}}


@pytest.mark.parametrize("fails_at", ["begin", "scalars", "finish"])
def test_a_failing_tracker_is_given_up_with_one_warning_and_harms_no_other(tmp_path, fails_at):
    broken, sound = Diary("broken", fails_at=fails_at), Diary("sound")
    said = follow(tmp_path, broken, sound, rounds=3)
    (warning,) = said
    assert warning.startswith("Warning: tracking by Diary is given up, the run goes on: ConnectionError: no route to ")
    assert "long story" not in warning
    assert [what for what, _ in sound.told] == ["begin", "scalars", "scalars", "scalars", "finish"]


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path):
    released = threading.Event()
    stuck = Diary(waits=released)
    said = follow(tmp_path, stuck, rounds=2, patience=0.1)  # it would wait for 20 seconds
    released.set()
    assert len(said) == 1
    assert "it has not ended within 0.1 seconds" in said[0]


def test_a_resume_hands_every_tracker_its_own_id(tmp_path):
    follow(tmp_path, Diary("one"), Diary("two"), summary=None)
    assert sorted(directory.read_json(tmp_path / MEMORY).values()) == ["one-1", "two-1"]
    again, new = Diary("two"), Diary("three")
    follow(tmp_path, again, new)
    assert (again.told[0][1].known, new.told[0][1].known) == ("two-1", None)
    assert len(directory.read_json(tmp_path / MEMORY)) == 3


def test_an_interrupted_run_has_not_ended_for_its_trackers(tmp_path):
    diary = Diary()
    with pytest.raises(KeyboardInterrupt), Trackers((diary,), {}, tmp_path, print):
        raise KeyboardInterrupt
    assert diary.told[-1] == ("finish", None)


def test_names_of_runs_within_a_sweep_differ(tmp_path):
    folder = tmp_path / "runs/grid/FedAvg/seed-0"
    folder.mkdir(parents=True)
    diary = Diary()
    follow(folder, diary)
    assert diary.told[0][1].name == "grid/FedAvg/seed-0"


def test_without_trackers_nothing_is_left_behind(tmp_path):
    follow(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_encrypted_runs_refuse_trackers_with_the_reason():
    with pytest.raises(UserError, match=r"output\.tracking and output\.encryption.*in clear"):
        Output(encryption=Encryption(key_variable="RUN_KEY"), tracking=(MLflow(),))


@pytest.mark.parametrize("wrong", ["wandb", [MLflow()], (3,), (Wandb,)])
def test_what_is_no_tuple_of_trackers_is_refused(wrong):
    with pytest.raises(UserError, match=r"output\.tracking(\[0\])? is .*; it must be a t"):
        Output(tracking=wrong)


def test_fields_of_trackers_are_checked():
    with pytest.raises(UserError, match=r"output\.tracking\[0\]\.mode is 'on'"):
        check(Experiment(output=Output(tracking=(Wandb("p", mode="on"),))))  # pyrefly: ignore
    check(Experiment(output=Output(tracking=(Wandb("p"), Diary()))))


def test_tracking_changes_no_hash_and_may_change_when_a_run_goes_on():
    plain = Experiment()
    tracked = dataclasses.replace(plain, output=Output(tracking=(Wandb("p"), MLflow())))
    before, after = to_json(plain), to_json(tracked)
    assert "tracking" not in before["output"]
    assert after["output"]["tracking"][0] == {
        "class": "Wandb", "project": "p", "entity": None, "group": None, "mode": "online", "sites": False,
    }  # fmt: skip
    assert config_hash(before, MAY_CHANGE) == config_hash(after, MAY_CHANGE)
    assert directory.differences(before, after)
    assert not directory.differences(before, after, MAY_CHANGE)
