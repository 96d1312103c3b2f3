"""Whole runs in miniature, in every setting: the files they leave, their figures, and that seeds decide them."""

import json

import jax
import numpy as np
import pytest
from small_run import SITES, changed, go, outcome, write_small

from fedjax_llm import config, peft
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.data.partition import DirichletByLabel, Iid
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load
from fedjax_llm.runs import metrics
from fedjax_llm.runs.compare import compare
from fedjax_llm.training.optimizers import Optimizer, Schedule

SETTINGS = ("federated", "centralised", "local", "base")
FILES = {"config.json", "environment.json", "evaluation.json", "summary.json", "report.html"}
TRAINED = {"metrics.jsonl", "tensorboard", "checkpoints"}
ADAPTERS = {"federated": {"adapter"}, "centralised": {"adapter"}, "local": {"adapters"}, "base": set()}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return config.load(write_small(tmp_path_factory.mktemp("small") / "files"))


@pytest.fixture(scope="module")
def runs(experiment, tmp_path_factory):
    """Folder and output of a run in each setting."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for setting in SETTINGS:
        jax.clear_caches()  # what another run in this process has compiled would take this one no time
        status, seen = go(changed(experiment, setting=setting), folder / setting)
        assert status == 0
        found[setting] = (folder / setting, seen)
    return found


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_file_of_a_run(runs, setting):
    folder, _ = runs[setting]
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == FILES | ADAPTERS[setting] | (TRAINED if setting != "base" else set())


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_summary_has_every_figure(runs, setting):
    found = summary(runs[setting][0])
    assert found["setting"] == setting
    assert found["seed"] == 0
    assert found["rounds"] == (0 if setting == "base" else 3)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(load(found["model"]["name"]).params))
    assert found["trainable_parameters"] == (0 if setting == "base" else 2 * 2 * (32 + 32 + 32 + 16))
    assert found["trainable_fraction"] == found["trainable_parameters"] / found["parameters"]
    sites = found["sites"]
    assert {site: row["train_records"] + row["held_out_records"] for site, row in sites.items()} == SITES
    for key in ("tokens_trained", "train_seconds", "tokens_per_second", "compile_seconds"):
        assert (found[key] > 0) == (setting != "base")
    assert found["peak_rss_bytes"] > 1e7
    for name in ("base", "final"):
        for measure in ("nll", "perplexity", "token_accuracy"):
            assert found[name][f"{measure}_low"] <= found[name][measure] <= found[name][f"{measure}_high"]
        assert {f"choice_accuracy{end}" for end in ("", "_low", "_high")} <= set(found[name])
    assert found["excluded_updates"] == 0


def test_settings_train_on_equally_many_examples(runs):
    lines = {setting: metrics.read(runs[setting][0] / "metrics.jsonl") for setting in SETTINGS[:3]}
    counts = {
        setting: sum(site["examples"] for line in found for site in line["sites"].values())
        for setting, found in lines.items()
    }
    assert counts == dict.fromkeys(SETTINGS[:3], 3 * 2 * 2 * 2)  # rounds, clients, steps, examples
    assert {line["cohort"][0] for line in lines["centralised"]} == {"all"}
    assert [line["cohort"] for line in lines["federated"]] == [line["cohort"] for line in lines["local"]]
    assert all(len(line["cohort"]) == 2 for line in lines["federated"])
    first = {setting: found[0]["sites"] for setting, found in lines.items()}
    assert first["federated"].keys() == first["local"].keys()  # and the same work, before anything is aggregated
    for site, figures in first["federated"].items():
        assert figures["loss"] == first["local"][site]["loss"]


def test_communication_is_counted_where_there_is_any(runs):
    found = {setting: summary(runs[setting][0]) for setting in SETTINGS}
    update = 4 * found["federated"]["trainable_parameters"]
    for key in ("upload_bytes", "download_bytes"):
        assert found["federated"][key] == 3 * 2 * update
        assert {found[setting][key] for setting in SETTINGS[1:]} == {0}
    assert found["federated"]["full_model_bytes"] == 2 * 3 * 2 * 4 * found["federated"]["parameters"]
    lines = metrics.read(runs["federated"][0] / "metrics.jsonl")
    assert [line["upload_bytes"] for line in lines] == [2 * update] * 3


def test_the_runs_compare(runs):
    found = compare([runs[setting][0] for setting in ("base", "local", "federated", "centralised")])
    assert not found.warnings
    assert all(set(found.differences[setting]["sites"]) == set(SITES) for setting in SETTINGS[:3])
    base = summary(runs["base"][0])
    assert base["base"] == base["final"]
    assert base["difference"]["macro"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    for setting in SETTINGS[:3]:
        one = summary(runs[setting][0])
        assert one["base"] == base["base"]
        assert one["final"]["nll"] < one["base"]["nll"]
        assert found.differences[setting]["macro"]["difference"] == pytest.approx(
            one["difference"]["macro"]["difference"], abs=1e-6
        )


def test_what_the_user_reads(runs):
    folder, seen = runs["federated"]
    for words in (
        "rank 2 on q_proj, v_proj",
        "448 (1.396%)",
        "2 of 3",
        "one update on the wire  1.79 kB",
        "round 3/3",
        f"Run folder: {folder}   Report: {folder}/report.html\n",
        f" -m experiments.ask {folder} 'Who keeps",
    ):
        assert words in seen
    _, base = runs["base"]
    assert "tuned" not in base
    assert "rank" not in base
    assert "Ask it" not in runs["local"][1]


def test_equal_seeds_give_equal_runs_and_others_do_not(experiment, runs, tmp_path):
    assert go(experiment, tmp_path / "again")[0] == 0
    first, again = outcome(runs["federated"][0]), outcome(tmp_path / "again")
    assert first == again
    assert set(first["adapters"]) == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert go(changed(experiment, seed=1), tmp_path / "other")[0] == 0
    other = outcome(tmp_path / "other")
    assert other["metrics"] != first["metrics"]
    assert other["adapters"] != first["adapters"]
    assert other["evaluation"]["base"] == first["evaluation"]["base"]  # who is held out depends on no seed


def test_the_layout_of_the_computation_changes_no_result(experiment, runs, tmp_path):
    layout = {
        "tokens_per_microbatch": 128,
        "buckets": 2,
        "clients_per_chunk": 1,
        "evaluation_buckets": 2,
        "remat": "blocks",
    }
    fields = {f"execution__{name}": value for name, value in layout.items()}
    assert go(changed(experiment, **fields), tmp_path / "run")[0] == 0
    close(tmp_path / "run", runs["federated"][0])


def close(one, other):
    """Asserts that two runs have the same adapters and figures up to rounding."""
    (ours, left), (_, right) = (peft.read_adapter(folder / "adapter") for folder in (one, other))
    for path, factors in left.items():
        for name, leaf in factors.items():
            np.testing.assert_allclose(leaf, right[path][name], atol=1e-5, err_msg=f"{path}.{name} of {ours}")
    assert summary(one)["final"]["nll"] == pytest.approx(summary(other)["final"]["nll"], abs=1e-5)


def test_a_run_starts_from_the_adapter_of_another(experiment, runs, tmp_path):
    before = runs["federated"][0]
    # Their own rank and targets come along; what the configuration says of them is not used.
    further = changed(experiment, start_from=str(before / "adapter"), lora__rank=5, federation__rounds=1)
    assert go(further, tmp_path / "run")[0] == 0
    kind, _ = peft.read_adapter(tmp_path / "run" / "adapter")
    assert (kind.rank, kind.alpha) == (2, 4.0)
    assert summary(tmp_path / "run")["final"]["nll"] < summary(before)["final"]["nll"]


def test_the_best_round_is_the_result_where_that_is_wanted(experiment, tmp_path):
    fields = {
        "training__optimizer": Optimizer("adam", 0.3),
        "evaluation__validation_every": 1,
        "federation__rounds": 5,
        "output__select": "best",
    }
    status, seen = go(changed(experiment, **fields), tmp_path / "best")
    assert status == 0
    lines = metrics.read(tmp_path / "best" / "metrics.jsonl")
    losses = [line["validation"]["nll"] for line in lines]
    best = int(np.argmin(losses)) + 1
    assert 1 <= best < 5
    assert f"Taking the adapters of round {best}" in seen
    assert go(changed(experiment, **fields | {"federation__rounds": best}), tmp_path / "short")[0] == 0
    assert outcome(tmp_path / "best")["adapters"] == outcome(tmp_path / "short")["adapters"]
    steps = {int(path.name) for path in (tmp_path / "best" / "checkpoints").iterdir()}
    assert steps == {best, 4, 5}


VARIANTS = {  # several at a time where they do not touch each other: every new shape or dtype is compiled anew
    "epochs, schedules": {
        "training__local_epochs": 1,
        "training__round_schedule": Schedule("cosine", 0.3),
        "training__local_schedule": Schedule("linear"),
    },
    "fedprox, every token and every site alike": {
        "training__proximal": 0.1,
        "training__normalise": "token",
        "federation__weighting": "uniform",
    },
    "fedadam on iid sites": {"aggregation": FedAdam(), "data__partition": Iid(4)},
    "bf16, dropout, other targets and start": {
        "model__dtype": "bfloat16",
        "training__keep_optimizer": "yes",
        "lora": Lora(2, 4.0, ("mlp.*", "o_proj"), (-1,), dropout=0.2, init="gaussian", dtype="bfloat16"),
    },
    "dropped when too long, a system message": {
        "data__max_length": 80,
        "data__too_long": "drop",
        "data__system": "Be brief.",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_to_their_end(experiment, tmp_path, variant):
    few = {"federation__rounds": 1, "evaluation__generations": 0, "evaluation__test_records": 2}
    status, _ = go(changed(experiment, **few | VARIANTS[variant]), tmp_path / "run")
    assert status == 0
    (line,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert line["excluded"] == []
    assert line["update_norm"] > 0


def test_sites_dealt_by_label(experiment, tmp_path):
    rows = [{"prompt": f"Q {i}?", "answer": f"A {i}.", "kind": "ab"[i % 2]} for i in range(30)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SiteFiles((str(tmp_path / "all.jsonl"),), label_column="kind")
    fields = {"data__source": source, "data__partition": DirichletByLabel(2, 5.0, min_records=10)}
    assert go(changed(experiment, setting="base", **fields), tmp_path / "run")[0] == 0
    sites = summary(tmp_path / "run")["sites"]
    assert len(sites) == 2
    assert sum(row["train_records"] + row["held_out_records"] for row in sites.values()) == 30
