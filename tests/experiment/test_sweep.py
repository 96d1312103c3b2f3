"""Sweeps of tiny runs: the cells are ordinary runs, the table is their figures, and what was done is not done again."""

import csv
import io
import json
import os
import signal
import statistics
import sys
from dataclasses import replace
from functools import partial

import pytest
from killing import PROCESSES, at_call
from rich.console import Console
from small_run import changed, go, outcome, write_small

from fedjax_llm import config
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fedavgm import FedAvgM
from fedjax_llm.data.partition import Iid
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import sweep as sweeping
from fedjax_llm.experiment.sweep import Sweep
from fedjax_llm.federation import rounds
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.runs import metrics
from fedjax_llm.runs.checkpoints import finished_steps
from fedjax_llm.training import client_update
from fedjax_llm.training.optimizers import Optimizer

ALGORITHMS = {
    "FedAvg": {},
    "FedAdam": {"aggregation": FedAdam(server_lr=0.02)},
    "B alone": {"lora.train": "b"},
}
DATA = {"own sites": {}, "at random": {"data.partition": Iid(3)}}


pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    experiment = config.load(write_small(tmp_path_factory.mktemp("small") / "files"))
    return changed(
        experiment,
        federation__rounds=2,
        federation__cohort=None,
        evaluation__validation_every=1,
        evaluation__validation_records=3,
        evaluation__test_records=3,
        evaluation__generations=0,
        output__keep_last=1,
        output__keep_best=0,
    )


@pytest.fixture(scope="module")
def grid(base):
    return Sweep("A grid", base, ALGORITHMS, DATA, seeds=(0, 1))


@pytest.fixture(scope="module")
def swept(grid, tmp_path_factory):
    """The grid's folder, and what the user saw."""
    folder = tmp_path_factory.mktemp("sweeps") / "grid"
    status, seen = run(grid, folder)
    assert status == 0
    return folder, seen


def run(sweep, folder):
    seen = io.StringIO()
    return sweeping.run_sweep(sweep, folder, console=Console(file=seen, width=250)), seen.getvalue()


def small(grid, **fields):
    """One data skew and one seed, unless other fields are given."""
    return replace(grid, **{"data": {"own sites": {}}, "seeds": (0,)} | fields)


def read(folder):
    return json.loads((folder / "sweep.json").read_text())


def table(folder):
    """The lines of ``table.csv`` by data and algorithm."""
    with (folder / "table.csv").open() as file:
        return {(line["data"], line["algorithm"]): line for line in csv.DictReader(file)}


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("seed-*/**/*") if path.is_file()}


def test_every_cell_is_an_ordinary_run(grid, swept, tmp_path):
    folder, _ = swept
    names = {"FedAvg": "FedAvg", "FedAdam": "FedAdam", "B alone": "B-alone"}
    for algorithm in ALGORITHMS:
        for data in ("own-sites", "at-random"):
            for seed in (0, 1):
                files = {path.name for path in (folder / names[algorithm] / data / f"seed-{seed}").iterdir()}
                assert {"config.json", "metrics.jsonl", "summary.json", "report.html", "adapter"} <= files
    alone = changed(grid.base, data__partition=Iid(3), aggregation=FedAdam(server_lr=0.02), seed=1)
    assert go(alone, tmp_path / "alone")[0] == 0
    assert outcome(tmp_path / "alone") == outcome(folder / "FedAdam" / "at-random" / "seed-1")


def test_what_the_user_reads(swept):
    folder, seen = swept
    assert "12 runs, 0 of them finished before." in seen
    lines = [line for line in seen.splitlines() if "seed" in line and "left)" in line]
    assert len(lines) == 12
    loss = json.loads((folder / "FedAvg/own-sites/seed-0/summary.json").read_text())["final"]["nll"]
    assert lines[0].startswith(f"FedAvg, own sites, seed 0: {loss:.4f} nats per token  ")
    assert "(12/12, 0.0s left)" in lines[-1]
    assert "round 1" not in seen
    text = (folder / "table.md").read_text()
    assert all(f"\n## {data}\n" in text for data in DATA)
    assert text.count("\n| B alone | 2 | ") == 2
    assert "t-interval" in text


def test_the_table_holds_the_means_of_the_cells_own_figures(swept):
    folder, _ = swept
    found = table(folder)
    assert len(found) == 6
    for (data, algorithm), line in found.items():
        runs = [folder / sweeping.folder_name(algorithm) / sweeping.folder_name(data) / f"seed-{n}" for n in (0, 1)]
        summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
        logs = [metrics.read(run / "metrics.jsonl") for run in runs]
        losses = [summary["final"]["nll"] for summary in summaries]
        assert float(line["nll"]) == pytest.approx(statistics.mean(losses), rel=1e-12)
        assert (float(line["nll_low"]), float(line["nll_high"])) == (min(losses), max(losses))
        assert (line["interval"], line["seeds"]) == ("range", "2")
        accuracies = [summary["final"]["token_accuracy"] for summary in summaries]
        assert float(line["token_accuracy"]) == pytest.approx(statistics.mean(accuracies), rel=1e-12)
        errors = [[one["aggregation_error"] for one in log] for log in logs]
        means = [statistics.mean(own) for own in errors]
        assert float(line["aggregation_error"]) == pytest.approx(statistics.mean(means), rel=1e-9)
        assert float(line["aggregation_error_last"]) == pytest.approx(statistics.mean(own[-1] for own in errors))
        assert (float(line["aggregation_error"]) < 1e-5) == (algorithm == "B alone")
        for key in ("upload_bytes", "download_bytes"):
            assert float(line[key]) == statistics.mean(summary[key] for summary in summaries)
        seconds = [
            sum(one["timing"]["seconds"] - one["timing"]["compile_seconds"] for one in log)
            / sum(len(one["cohort"]) for one in log)
            for log in logs
        ]
        assert float(line["client_seconds"]) == pytest.approx(statistics.mean(seconds))
        firsts = [folder / "FedAvg" / sweeping.folder_name(data) / f"seed-{n}" for n in (0, 1)]
        theirs = [json.loads((run / "summary.json").read_text())["final"]["nll"] for run in firsts]
        expected = statistics.mean(losses) - statistics.mean(theirs)
        assert (
            line["difference"] == "" if algorithm == "FedAvg" else float(line["difference"]) == pytest.approx(expected)
        )
        targets = [metrics.read(run / "metrics.jsonl")[-1]["validation"]["nll"] for run in firsts]
        hits = [
            next((number for number, one in enumerate(log) if one["validation"]["nll"] <= target), None)
            for log, target in zip(logs, targets, strict=True)
        ]
        if None in hits:
            assert line["rounds_to_target"] == line["bytes_to_target"] == ""
            assert int(line["seeds_reached"]) == sum(hit is not None for hit in hits)
            continue
        assert float(line["rounds_to_target"]) == statistics.mean(hit + 1 for hit in hits)
        spent = [
            sum(one["upload_bytes"] + one["download_bytes"] for one in log[: hit + 1])
            for log, hit in zip(logs, hits, strict=True)
        ]
        assert float(line["bytes_to_target"]) == statistics.mean(spent)


def test_sweep_json_says_how_it_was_made(grid, swept):
    found = read(swept[0])
    assert found["config"] == json.loads(json.dumps(config.to_json(grid)))
    assert found["seeds"] == [0, 1]
    assert {"command", "git", "packages", "started"} <= set(found["environment"])
    assert {cell["status"] for cell in found["cells"]} == {"finished"}
    assert [cell["seed"] for cell in found["cells"]] == [0] * 6 + [1] * 6
    for cell in found["cells"]:
        assert (swept[0] / cell["folder"] / "summary.json").is_file()
        assert cell["curve"]["round"] == [1, 2]


def test_seeds_differ(swept):
    losses = [cell["figures"]["nll"] for cell in read(swept[0])["cells"]]
    assert len(set(losses)) == 12


def test_started_again_it_runs_nothing_and_says_the_same(grid, swept, monkeypatch):
    folder, _ = swept
    before, files, text = read(folder), stamps(folder), (folder / "table.csv").read_text()
    monkeypatch.setattr(sweeping, "run", lambda *_, **__: pytest.fail("a finished run is run again"))
    status, seen = run(grid, folder)
    assert status == 0
    assert "12 runs, 12 of them finished before." in seen
    assert stamps(folder) == files
    assert (folder / "table.csv").read_text() == text
    assert (read(folder)["cells"], read(folder)["rows"]) == (before["cells"], before["rows"])


def test_more_seeds_can_be_added(grid, swept, monkeypatch):
    began = []
    monkeypatch.setattr(sweeping, "run", lambda experiment, *_, **__: began.append(experiment.seed) or 130)
    assert run(replace(grid, seeds=(0, 1, 7)), swept[0])[0] == 130
    assert began == [7]


def test_runs_of_other_settings_are_refused_before_any_is_run(grid, swept, monkeypatch):
    monkeypatch.setattr(sweeping, "run", lambda *_, **__: pytest.fail("runs although the settings differ"))
    other = replace(grid, base=changed(grid.base, training__batch_size=3), algorithms={"new": {}} | ALGORITHMS)
    with pytest.raises(UserError, match=r"started with other settings:\n  training.batch_size: 2 -> 3\n"):
        run(other, swept[0])
    layout = replace(grid, base=changed(grid.base, execution__clients_per_chunk=2))
    assert run(layout, swept[0])[0] == 0  # which changes no result


def test_the_model_is_loaded_once_and_programs_are_shared(grid, tmp_path, monkeypatch):
    loaded, sizes = [], []
    load, one = sweeping.load_model, sweeping.run
    programs = (client_update._accumulate, client_update.step, rounds.aggregated)

    def counted(*args, **kwargs):
        status = one(*args, **kwargs)
        sizes.append(tuple(program._cache_size() for program in programs))
        return status

    monkeypatch.setattr(sweeping, "load_model", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(sweeping, "run", counted)
    optimizer = {"training.optimizer": Optimizer("adamw", 3e-3)}
    algorithms = {
        "averaged": optimizer | {"aggregation": FedAvg(server_lr=0.9)},
        "with momentum": optimizer | {"aggregation": FedAvgM(server_lr=0.9)},
    }
    assert run(small(grid, algorithms=algorithms, seeds=(0, 1)), tmp_path / "sweep")[0] == 0
    assert len(loaded) == 1
    first, other, again, _ = sizes
    assert other[:2] == first[:2]  # another algorithm: no new backward pass, no new optimiser step
    assert other[2] > first[2]
    assert again == other  # another seed: nothing new at all


FAILING = {
    "FedAvg": {},
    "refused": {"lora.ranks": (2, 1), "aggregation": FedAdam()},
    "impossible | here": {"lora.targets": ("lm_tail",)},
    "diverging": {"training.optimizer": Optimizer("sgd", 1e30)},
    "FedAdam": {"aggregation": FedAdam(server_lr=0.02)},
}


def test_what_fails_is_told_and_the_others_finish(grid, tmp_path, monkeypatch):
    sweep = small(grid, algorithms=FAILING)
    status, seen = run(sweep, tmp_path / "sweep")
    assert status == 1
    cells = {cell["algorithm"]: cell for cell in read(tmp_path / "sweep")["cells"]}
    assert {name for name, cell in cells.items() if cell["status"] == "finished"} == {"FedAvg", "FedAdam"}
    reasons = {
        "refused": "FedAdam cannot aggregate adapters of different ranks",
        "impossible | here": "lora.targets has 'lm_tail', which matches no module",
        "diverging": "not one client came back with a finite update",
    }
    text, lines = (tmp_path / "sweep" / "table.md").read_text(), table(tmp_path / "sweep")
    for name, reason in reasons.items():
        assert reason in cells[name]["reason"]
        assert f"{name}, own sites, seed 0: failed: " in seen
        line = lines["own sites", name]
        assert (line["seeds"], line["nll"], line["rounds_to_target"]) == ("0", "", "")
        assert f"failed with seed 0: {cells[name]['reason']}" == line["note"]
    assert r"| impossible \| here | 0 |  |" in text
    assert text.count("\n| ") == 2 + len(FAILING)
    tried, one = [], sweeping.run
    monkeypatch.setattr(
        sweeping, "run", lambda *args, **kwargs: tried.append(args[1].parts[-3]) or one(*args, **kwargs)
    )
    assert run(sweep, tmp_path / "sweep")[0] == 1
    assert tried == ["impossible-here", "diverging"]


def sweep_and_die(sweep, folder):
    """Dies just after the second run's first checkpoint."""
    needle = "FedAdam/own-sites/seed-0/checkpoints/1.orbax-checkpoint-tmp"
    at_call(setattr, os, "rename", lambda: os.kill(os.getpid(), signal.SIGKILL), needle, 3, True)
    sys.exit(run(sweep, folder)[0])


def test_a_killed_sweep_goes_on(grid, swept, tmp_path):
    folder, sweep = tmp_path / "sweep", small(grid)
    process = PROCESSES.Process(target=sweep_and_die, args=(sweep, folder))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (folder / "FedAvg/own-sites/seed-0/report.html").exists()
    assert finished_steps(folder / "FedAdam/own-sites/seed-0/checkpoints") == [1]
    assert not (folder / "B-alone").exists()
    assert [cell["status"] for cell in read(folder)["cells"]] == ["finished", "unfinished", "unfinished"]
    assert "not yet run: seed 0" in (folder / "table.md").read_text()
    kept = stamps(folder / "FedAvg")
    status, seen = run(sweep, folder)
    assert status == 0
    assert "3 runs, 1 of them finished before." in seen
    assert stamps(folder / "FedAvg") == kept
    for algorithm in ("FedAvg", "FedAdam", "B-alone"):
        place = f"{algorithm}/own-sites/seed-0"
        assert outcome(folder / place) == outcome(swept[0] / place)


def test_ctrl_c_ends_it_in_good_order(grid, swept, tmp_path, monkeypatch):
    folder, sweep = tmp_path / "sweep", small(grid)
    with monkeypatch.context() as patch:
        at_call(patch.setattr, metrics.MetricsLog, "append", partial(signal.raise_signal, signal.SIGINT), "", 3, True)
        status, seen = run(sweep, folder)
    assert status == 130
    assert seen.endswith("Stopped. Finished runs are kept; the same command goes on with the others.\n")
    assert [cell["status"] for cell in read(folder)["cells"]] == ["finished", "unfinished", "unfinished"]
    assert run(sweep, folder)[0] == 0
    assert outcome(folder / "FedAdam/own-sites/seed-0") == outcome(swept[0] / "FedAdam/own-sites/seed-0")


REFUSED = {
    "no algorithm": ({"algorithms": {}}, "algorithms is empty"),
    "no seed": ({"seeds": ()}, "seeds is empty"),
    "a seed twice": ({"seeds": (1, 1)}, "name each once"),
    "no target": ({"target": 0.0}, "target is 0.0"),
    "a field that does not exist": (
        {"algorithms": {"x": {"lora.rnk": 3}}},
        r"changes lora\.rnk, which does not exist; did you mean 'rank'",
    ),
    "nor does this": (
        {"data": {"x": {"federation.rounds.many": 3}}},
        r"federation\.rounds\.many, which does not exist",
    ),
    "the seed": ({"data": {"x": {"seed": 3}}}, "cannot change seed"),
    "one folder for two": ({"data": {"a b": {}, "a-b": {}}}, "would share the folder 'a-b'"),
    "a name without a letter": ({"name": "/"}, "'/' cannot name a folder"),
    "changed twice": (
        {"algorithms": {"x": {"data.partition.sites": 3}}, "data": {"y": {"data.partition": Iid(2)}}},
        r"algorithm 'x' changes data\.partition\.sites, and data 'y' changes data\.partition",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_sweep_is_refused(grid, case):
    fields, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        replace(grid, **fields)


def test_a_sweep_validates(grid):
    with pytest.raises(UserError, match="validation_every is 0, but a sweep's curves are of validation"):
        replace(grid, base=changed(grid.base, evaluation__validation_every=0))


def test_changes_are_made_at_once(grid):
    """Each alone would be refused."""
    private = {
        "privacy": Privacy(mechanism=DpFedAvg(clip_norm=1.0, noise_multiplier=1.0), unit="site"),
        "federation.weighting": "uniform",
        "federation.cohort": 2,
    }
    found = sweeping.changed(grid.base, private)
    assert (found.federation.cohort, found.federation.weighting) == (2, "uniform")
    assert found.privacy == private["privacy"]
    assert grid.base.privacy.mechanism is None
    whole = sweeping.changed(grid.base, {"aggregation": FedAvgM(), "aggregation.momentum": 0.5})
    assert whole.aggregation == FedAvgM(momentum=0.5)
