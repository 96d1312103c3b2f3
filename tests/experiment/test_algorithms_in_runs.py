"""Whole runs in miniature with algorithms that keep, send or move more than deltas: files, resumption, refusals."""

import json
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from killing import at_call
from rich.console import Console
from small_run import changed, go, outcome, write_small

from fedjax_llm import config, peft
from fedjax_llm import lora as low_rank
from fedjax_llm.adversaries.label_flip import LabelFlip
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.aggregation.coordinate_median import CoordinateMedian
from fedjax_llm.aggregation.ditto import Ditto
from fedjax_llm.aggregation.fedex import FedExLora
from fedjax_llm.aggregation.fedsa import FedSaLora
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.flora import FLora
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.aggregation.qfedavg import QFedAvg
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.evaluate import validate
from fedjax_llm.experiment import training_loop
from fedjax_llm.experiment.planning import malicious_sites
from fedjax_llm.experiment.prepare import prepare
from fedjax_llm.federation.availability import Asynchronous, Availability
from fedjax_llm.federation.plan import Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.runs import metrics
from fedjax_llm.runs.checkpoints import finished_steps
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training.optimizers import Optimizer

PLAIN = Lora(rank=2, alpha=4.0)
ASYNCHRONOUS = Federation(
    rounds=3, cohort=2, asynchronous=Asynchronous(3), availability=Availability(spread=1.0, jitter=1.0)
)
VARIANTS = {
    "moved into the weights": {"aggregation": FLora()},
    "factors of their own": {"aggregation": FedSaLora()},
    "adapters of their own": {"aggregation": Ditto()},
    "memory at clients and server": {"aggregation": Scaffold(), "compression": TopK(0.2)},
    "unequal ranks": {"aggregation": FlexLora(), "lora": Lora(rank=3, alpha=4.0, ranks=(3, 1))},
    "asynchronous": {"federation": ASYNCHRONOUS},
    "fine-tuned after": {"federation": Federation(rounds=3, cohort=2, finetune_rounds=2)},
    "pissa": {"lora": Lora(rank=2, alpha=4.0, init="pissa", rslora=True)},
    "dora": {"lora": Lora(rank=2, alpha=4.0, dora=True)},
}
EACH = {"factors of their own", "adapters of their own", "fine-tuned after"}
"""Where every site ends with adapters of its own."""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    found = config.load(write_small(tmp_path_factory.mktemp("small") / "files"))
    return changed(found, evaluation__validation_every=3, evaluation__generations=0)


def together(experiment, **fields):
    """Like ``changed``, but fields of the experiment itself are replaced at once: some make sense only together."""
    nested = {path: value for path, value in fields.items() if "__" in path}
    own = {path: value for path, value in fields.items() if "__" not in path}
    return replace(changed(experiment, **nested), **own)


@pytest.fixture(scope="module")
def runs(experiment, tmp_path_factory):
    """The folder of each variant, run once when a test first asks for it."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def of(name):
        if name not in found:
            found[name] = folder / name.replace(" ", "-")
            assert go(changed(experiment, **VARIANTS[name]), found[name])[0] == 0
        return found[name]

    return of


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("pissa", "dora", "factors of their own")])
def test_a_run_that_is_cut_off_ends_with_the_same_bits(experiment, runs, tmp_path, name):
    """In the midst of the second round: all that clients and server keep is in the checkpoint of the first."""
    folder, variant = tmp_path / "run", changed(experiment, **VARIANTS[name])
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch.setattr, training_loop, "run_round", partial(signal.raise_signal, signal.SIGINT), call=2)
        assert go(variant, folder)[0] == 130
    assert finished_steps(folder / "checkpoints") == [1]
    assert go(variant, folder, resume=True)[0] == 0
    assert outcome(folder) == outcome(runs(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_sites_with_adapters_of_their_own_have_files_of_their_own(runs, name):
    folder = runs(name)
    assert (folder / "adapter").is_dir() == (name not in EACH)
    if name in EACH:
        files = {path.parent.name: path.read_bytes() for path in folder.glob("adapters/*/adapter_model.safetensors")}
        assert set(files) == {"coast", "hill", "town"}
        assert len(set(files.values())) == 3


@pytest.mark.parametrize("name", ["moved into the weights", "pissa", "dora", "unequal ranks"])
def test_the_exported_adapter_on_the_untouched_base_is_the_tuned_model(experiment, runs, name):
    """The validation loss of the last round, which was measured with what the algorithm had moved, comes out again."""

    folder = runs(name)
    prepared = prepare(changed(experiment, **VARIANTS[name]), RunProgress(3, Console(quiet=True)))
    lora, adapters = peft.read_adapter_for(folder / "adapter", prepared.base.model)
    sites = dict.fromkeys(prepared.held_out.validation, adapters)
    found = validate(prepared.base, lora.scaling, sites, prepared.held_out, None)
    last = metrics.read(folder / "metrics.jsonl")[-1]["validation"]
    assert found["nll"] == pytest.approx(last["nll"], rel=1e-4)
    still = low_rank.silent(adapters, prepared.base.params)
    base = validate(prepared.base, lora.scaling, dict.fromkeys(sites, still), prepared.held_out, None)
    assert abs(base["nll"] - last["nll"]) > 100 * abs(found["nll"] - last["nll"])


def test_metrics_and_report_tell_of_the_aggregation(runs):
    exact = metrics.read(runs("moved into the weights") / "metrics.jsonl")
    lossy = metrics.read(runs("pissa") / "metrics.jsonl")
    assert max(line["aggregation_error"] for line in exact) < 1e-5
    assert min(line["aggregation_error"] for line in lossy) > 1e-5
    assert {line["aggregation_error"] for line in metrics.read(runs("dora") / "metrics.jsonl")} == {None}
    assert "Aggregation error" in (runs("pissa") / "report.html").read_text()
    assert "Aggregation error" not in (runs("dora") / "report.html").read_text()
    ranks = {
        site: row["rank"]
        for line in metrics.read(runs("unequal ranks") / "metrics.jsonl")
        for site, row in line["sites"].items()
    }
    assert set(ranks.values()) == {1, 3}
    late = metrics.read(runs("asynchronous") / "metrics.jsonl")
    assert all(line["elapsed"] > 0 and line["late"] == [] for line in late)
    assert max(row["staleness"] for line in late for row in line["sites"].values()) >= 1


def test_what_is_compressed_travels_smaller_and_is_shown(experiment, tmp_path):
    sizes = {}
    for name, compression in (("whole", None), ("small", Quantise(bits=8))):
        status, seen = go(changed(experiment, compression=compression), tmp_path / name)
        assert status == 0
        assert ("Quantise" in seen) == (compression is not None)
        sizes[name] = json.loads((tmp_path / name / "summary.json").read_text())
    assert sizes["small"]["upload_bytes"] < sizes["whole"]["upload_bytes"] / 3
    assert sizes["small"]["download_bytes"] == sizes["whole"]["download_bytes"]


def test_malicious_sites_are_a_share_drawn_by_the_seed(experiment, tmp_path):

    attacked = together(experiment, attack=SignFlip(), malicious=0.4, aggregation=CoordinateMedian())
    assert sum(malicious_sites(attacked, 10)) == 4
    assert malicious_sites(attacked, 10) != malicious_sites(changed(attacked, seed=1), 10)
    assert malicious_sites(changed(attacked, setting="centralised"), 1) == (False,)
    assert sum(malicious_sites(changed(attacked, malicious=0.29), 100)) == 29  # not what binary fractions round to
    with pytest.raises(UserError, match=r"malicious is 0.4, which of 2 sites is none"):
        malicious_sites(attacked, 2)
    status, seen = go(attacked, tmp_path / "run")
    assert (status, "1 of 3 sites: SignFlip" in " ".join(seen.split())) == (0, True)


def test_poisoned_text_is_at_malicious_sites_alone(experiment):

    attacked = together(experiment, attack=LabelFlip(), malicious=0.4)
    clean, dirty = (prepare(one, RunProgress(3, Console(quiet=True))) for one in (experiment, attacked))
    bad = malicious_sites(attacked, 3)
    for number, ((name, before), (_, after)) in enumerate(zip(clean.train, dirty.train, strict=True)):
        equal = [np.array_equal(a.tokens, b.tokens) for a, b in zip(before, after, strict=True)]
        assert all(equal) != bad[number], name
    assert clean.fingerprint != dirty.fingerprint


def test_too_small_a_cohort_is_refused_before_any_training(experiment):

    with pytest.raises(UserError, match=r"byzantine is 1, which takes a cohort of at least 5 clients, but it has 2"):
        prepare(changed(experiment, aggregation=Krum(byzantine=1)), RunProgress(3, Console(quiet=True)))


def test_adapters_to_start_from_are_checked_for_what_they_are(experiment, runs):
    """The configuration says plain LoRA; the folder holds DoRA, whose magnitudes a sum of products has no place for."""
    begun = changed(experiment, start_from=str(runs("dora") / "adapter"), aggregation=FedExLora())
    with pytest.raises(UserError, match=r"FedExLora works on products of .* but lora\.dora is True"):
        prepare(begun, RunProgress(3, Console(quiet=True)))


def test_what_federations_alone_have_is_no_matter_elsewhere(experiment):
    fields = {"lora__ranks": (1, 2), "aggregation": FlexLora(), "federation__finetune_rounds": 0}
    unused = together(experiment, **fields, setting="local", privacy=PRIVATE)
    assert not config.regime_of(unused).ranks
    assert config.regime_of(replace(unused, privacy=Privacy(), setting="federated")).ranks


PRIVATE = Privacy(DpSgd(clip_norm=1.0, noise_multiplier=1.0), delta=1e-3)
SUM = Privacy(DpFedSgd(clip_norm=1.0, noise_multiplier=1.0), delta=1e-3)
SITE = Privacy(DpFedAvg(clip_norm=1.0, noise_multiplier=1.0), unit="site", delta=1e-3)
LOCAL = Privacy(LocalDp(clip_norm=1.0, noise_multiplier=1.0), unit="site", delta=1e-3)
UNIFORM = {"federation__weighting": "uniform"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora__ranks": (1, 2), "aggregation": Scaffold()}, "Scaffold cannot aggregate adapters of different ranks"),
        ({"lora__ranks": (1, 2), "compression": Quantise()}, "lora.ranks and compression do not go together"),
        ({"lora__train": "b", "aggregation": FlexLora()}, "FlexLora works on products of .* but lora.train is 'b'"),
        (
            {"lora__dora": True, "aggregation": FLora()},
            "FLora works on products of both factors, but lora.dora is True",
        ),
        ({"malicious": 0.2}, "attack is None and malicious is 0.2"),
        ({"attack": SignFlip()}, "malicious is 0.0: set both"),
        ({"attack": SignFlip(), "malicious": 1.0}, "malicious is 1.0"),
        ({"federation": ASYNCHRONOUS, "aggregation": Scaffold()}, "Scaffold does more with its clients than average"),
        ({"privacy": PRIVATE, "aggregation": QFedAvg()}, "loss or gradient .* DpSgd neither clips nor noises"),
        ({"privacy": PRIVATE, "aggregation": Ditto()}, "own adapters besides the shared ones"),
        ({"privacy": PRIVATE, "lora__ranks": (1, 2)}, "noise would fill the components"),
        ({"privacy": PRIVATE, "federation": ASYNCHRONOUS}, "as often as they are fast"),
        ({"privacy": PRIVATE, "federation__finetune_rounds": 1}, "trains on at the sites without DpSgd's noise"),
        ({**UNIFORM, "privacy": SITE, "aggregation": Scaffold()}, "DpFedAvg clips and noises the clients' deltas"),
        ({**UNIFORM, "privacy": LOCAL, "aggregation": Scaffold()}, "LocalDp clips and noises the clients' deltas"),
        ({**UNIFORM, "privacy": SITE, "aggregation": FedExLora()}, "must see every site's update"),
        (
            {**UNIFORM, "privacy": SITE, "compression": Quantise()},
            "compression changes what clients send after DpFedAvg",
        ),
        (
            {"privacy": SUM, "aggregation": FedSaLora()},
            "leaves factors at the clients, trained without DpFedSgd's noise",
        ),
        ({**UNIFORM, "privacy": LOCAL, "aggregation": FedSaLora()}, "trained without LocalDp's noise"),
        ({"privacy": SUM, "attack": SignFlip(), "malicious": 0.4}, "one site would move the sum by more than its clip"),
        ({"privacy": PRIVATE, "attack": LabelFlip(), "malicious": 0.4}, "puts answers of one record into others"),
        (
            {"aggregation": FlexLora(), "attack": SignFlip(), "malicious": 0.4},
            "FlexLora send whole factors, not deltas",
        ),
        ({"aggregation": FLora(), "compression": TopK(0.1)}, "FLora send whole factors, not deltas"),
        ({"aggregation": Ditto(), "federation__finetune_rounds": 1}, "does not go together with Ditto"),
        (
            {"aggregation": FlexLora(), "lora__ranks": (1, 2), "federation__finetune_rounds": 1},
            "does not go together with lora.ranks",
        ),
        (
            {**UNIFORM, "privacy": SITE, "federation__availability": Availability(over_selection=2.0)},
            "over_selection is 2.0, but DpFedAvg draws every site by itself",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(experiment, fields, message):
    fields = {"training__optimizer": Optimizer("sgd", 1.0), "training__local_steps": 1} | fields
    with pytest.raises(UserError, match=message):
        together(experiment, **fields)
