"""Bad input, from the command line as the user sees it: one clear message, before any training, and nothing is lost."""

import json
import re
import resource
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_run import changed, go, outcome, write_small

from experiments.run import main
from fedjax_llm import config
from fedjax_llm.data.records import Record
from fedjax_llm.data.splits import Fractions, split_of
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import run as run_module
from fedjax_llm.runs import metrics
from fedjax_llm.runs.checkpoints import finished_steps
from fedjax_llm.training.optimizers import Optimizer

pytestmark = pytest.mark.usefixtures("short_reports")

# Where one read or write of several fails, the others call a loop that is closed already; nobody waits for them.
NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "files").parent


@pytest.fixture
def files(original, tmp_path):
    """A copy of model, sites and configuration that a test may spoil."""
    shutil.copytree(original, tmp_path / "files")
    text = (original / "small.py").read_text().replace(str(original), str(tmp_path / "files"))
    (tmp_path / "files" / "small.py").write_text(text)
    return tmp_path / "files"


@pytest.fixture
def refused(files, tmp_path, capsys, monkeypatch):
    """Runs the command; asserts that it is refused before any training and leaves no folder; gives the message."""

    def never(*_):
        raise AssertionError("training has begun")

    def refused(*arguments):
        monkeypatch.setattr(run_module, "run_rounds", never)
        monkeypatch.setattr(run_module, "finish", never)
        out = tmp_path / "out"
        status = main([f"--config={files / 'small.py'}", "--out", str(out), *arguments])
        said = capsys.readouterr().err
        assert status == 2
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert not out.exists()
        return said.removeprefix("error: ").strip()

    return refused


VALUES = {
    "--federation.rounds 0": "federation.rounds is 0; it must be at least 1",
    "--federation.cohort 9": "federation.cohort is 9, but there are only 3 sites",
    "--federation.cohort 0": "federation.cohort is 0; it must be at least 1",
    "--lora.rank 0": "lora.rank is 0; it must be at least 1",
    "--lora.rank 64": "lora.rank is 64, more than the narrowest adapted matrix has (16)",
    "--lora.alpha -1": "lora.alpha is -1.0; it must be positive",
    "--lora.alpha nan": "lora.alpha is nan",
    "--lora.dropout 1": "lora.dropout is 1",
    "--lora.layers 7": "lora.layers names [7], but the model has layers 0 to 1",
    "--lora.targets qproj": "lora.targets has 'qproj', which matches no module; did you mean 'q_proj'",
    "--training.batch-size 0": "training.batch_size is 0",
    "--training.proximal -1": "training.proximal is -1",
    "--training.round-schedule.warmup 1": "warmup is 1",
    "--training.optimizer.name adamm": "optimizer.name is 'adamm', which optax does not have; did you mean 'adam'",
    "--training.optimizer.options b3 0.9": "optax.adamw takes no option 'b3'; known: b1, b2, eps,",
    "--training.optimizer.learning-rate 0": "optimizer.learning_rate is 0",
    "--training.optimizer.learning-rate inf": "training.optimizer.learning_rate is inf; it must be a finite number",
    "--data.fractions.test 0.9": "validation 0.2 and test 0.9 leave nothing to train on",
    "--data.max-length 4": "data.max_length is 4; it must be at least 8",
    "--data.max-length 100000": "data.max_length is 100000, but",
    "--seed -1": "seed is -1; it must be at least 0 and below 2**31",
    "--seed 2147483648": "seed is 2147483648; it must be at least 0",
    "--data.max-length 24": "are too long (up to 56 tokens); raise data.max_length",
    "--data.source.id-column ident": "coast.jsonl:1: no column 'ident'; known: answer, id, prompt",
    "--execution.buckets 0": "execution.buckets is 0",
    "--evaluation.generations -1": "evaluation.generations is -1; it must be at least 0",
    "--output.bandwidth-mbps 0": "output.bandwidth_mbps is 0",
    "--output.keep-last 0": "output.keep_last is 0; it must be at least 1",
    "--output.select best": "output.select is 'best', but evaluation.validation_every is 0",
    "--output.select best --evaluation.validation-every 1 --output.keep-best 0": "output.keep_best is 0",
    "--model.name smolm2-135m-instruct": "no built-in name; did you mean 'smollm2-135m-instruct'?",
    "--model.name absent.gguf": "There is no file absent.gguf",
    "--start-from nowhere": "nowhere has no adapter_config.json",
    "--resume": "there is no run to resume in",
}


@pytest.mark.parametrize("arguments", VALUES)
def test_values(refused, arguments):
    assert VALUES[arguments] in refused(*arguments.split())


def test_a_hub_that_cannot_be_reached(refused, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = refused("--model.name", "someone/some-model")
    assert "Cannot download someone/some-model from the hub (ConnectionError: Name or service not known)" in said
    assert "Without the hub: download the repository elsewhere and give its folder" in said


def lose(tensors):
    del tensors["model.norm.weight"]


def add(tensors):
    tensors["model.extra.weight"] = np.zeros(3, np.float32)


def reshape(tensors):
    tensors["model.norm.weight"] = np.zeros(31, np.float32)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose, "1 missing: model.norm.weight"),
        (add, "1 not known to the family: model.extra.weight"),
        (reshape, "1 misshapen: model.norm.weight is [31], not [32]"),
    ],
)
def test_tensors_that_do_not_fit(refused, files, spoil, said):
    path = files / "model" / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    message = refused()
    assert f"The tensors of {files / 'model'} do not fit its config.json" in message
    assert said in message


def test_an_architecture_that_is_not_served(refused, files):
    path = files / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForCausalML"]}))
    assert "architecture 'LlamaForCausalML' is not supported; did you mean 'LlamaForCausalLM'" in refused()


def test_a_model_without_a_tokenizer(refused, files):
    for path in files.glob("model/*token*.json"):
        path.unlink()
    assert "has no tokenizer; put its tokenizer.json beside the weights" in refused()


def test_sites_that_cannot_be_read(refused, files):
    path = files / "sites" / "hill.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"id": "x", "prompt": \n')
    assert refused().startswith(f"{path}:10: not JSON (")
    path.write_text(whole + '{"id": "x", "prompt": "Who?", "anwser": "I."}\n')
    assert refused().startswith(f"{path}:10: no column 'answer'; did you mean 'anwser'?")
    path.write_text("\n")
    assert refused().startswith(f"{path}: holds no records")


@pytest.mark.parametrize(("wanted", "lacking"), [("train", "test"), ("test", "train")])
def test_a_site_without_a_record_of_a_split(refused, files, wanted, lacking):
    names = (f"lone-{i}" for i in range(100))
    name = next(name for name in names if split_of(Record(name, ()), Fractions(0.2, 0.2), 0) == wanted)
    (files / "sites" / "lone.jsonl").write_text(json.dumps({"id": name, "prompt": "Who?", "answer": "I."}) + "\n")
    said = refused()
    assert f"site 'lone' has no {lacking} record: 1 records of 1 owners" in said
    assert "give the site more records" in said


def test_adapters_to_start_from_that_do_not_fit(refused, files, tmp_path, original):
    adapter = tmp_path / "before" / "adapter"
    assert go(changed(config.load(original / "small.py"), federation__rounds=1), adapter.parent)[0] == 0
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-7])
    assert "adapter_model.safetensors is damaged" in refused("--start-from", str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    assert "describes an adapter of type 'IA3'; only 'LORA' is supported" in refused("--start-from", str(adapter))


def test_another_run_in_the_folder_is_left_alone(files, tmp_path, capsys):
    experiment = changed(config.load(files / "small.py"), setting="base")
    assert go(experiment, tmp_path / "run")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([f"--config={files / 'small.py'}", "--out", str(tmp_path / "run"), "--setting=base"]) == 2
    assert "holds another run; choose another folder with --out, or continue that run with --resume" in (
        capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    assert main([f"--config={files / 'small.py'}", "--out", str(tmp_path / "mine")]) == 2
    assert "is not empty (it holds letter.txt) and is not a run" in capsys.readouterr().err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "Dear"


def test_a_name_is_free_again_after_a_mistake(files, tmp_path, capsys):
    arguments = [f"--config={files / 'small.py'}", "--out", str(tmp_path / "run"), "--setting=base"]
    assert main([*arguments, "--lora.targets", "qproj"]) == 2
    assert main(arguments) == 0


def poison(files, letter):
    """Makes the model's embedding of a letter NaN."""
    path = files / "model" / "model.safetensors"
    tensors = load_file(path)
    token = json.loads((files / "model" / "tokenizer.json").read_text())["model"]["vocab"][letter]
    tensors["model.embed_tokens.weight"][token] = np.nan
    save_file(tensors, path)


def poisoned_site(files, site, splits):
    """Puts the poisonous letter into the questions of a site's records of some splits."""
    path = files / "sites" / f"{site}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if split_of(Record(row["id"], ()), Fractions(0.2, 0.2), 0) in splits:
            row["prompt"] += " Z"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_client_that_is_not_finite_is_left_out_counted_and_reported(files, tmp_path):
    poison(files, "Z")
    poisoned_site(files, "hill", ("train",))
    experiment = changed(config.load(files / "small.py"), federation__cohort=None)
    status, seen = go(experiment, tmp_path / "run")
    assert status == 0
    assert "left out: hill" in seen
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["excluded"] for line in lines] == [["hill"]] * 3
    assert lines[0]["sites"]["hill"]["loss"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["excluded_updates"] == 3
    assert summary["final"]["nll"] < summary["base"]["nll"]
    # The others' result is that of a federation without it: all that it gave has the weight zero.
    (files / "sites" / "hill.jsonl").unlink()
    assert go(experiment, tmp_path / "without")[0] == 0
    there, gone = (outcome(tmp_path / name) for name in ("run", "without"))
    weights = "adapter/adapter_model.safetensors"
    with_it, without = (load_file(tmp_path / name / weights) for name in ("run", "without"))
    for name, array in without.items():
        np.testing.assert_allclose(with_it[name], array, atol=1e-6)
    assert there["metrics"][0]["sites"]["coast"] == gone["metrics"][0]["sites"]["coast"]


def test_no_finite_client_stops_and_keeps_what_there_is(files, tmp_path, capsys):
    poison(files, "Z")
    poisoned_site(files, "town", ("train",))
    # One site a round: sooner or later it is the poisoned one's turn.
    arguments = [f"--config={files / 'small.py'}", "--out", str(tmp_path / "run"), "--federation.cohort=1"]
    assert main([*arguments, "--federation.rounds=9", "--seed=1"]) == 2
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(lines) < 9
    said = capsys.readouterr().err
    assert f"round {len(lines) + 1}: not one client came back with a finite update (losses: town nan)" in said
    assert finished_steps(tmp_path / "run" / "checkpoints")[-1] == len(lines)


def test_a_rate_that_blows_up_at_once(files, tmp_path):
    experiment = changed(config.load(files / "small.py"), training__optimizer=Optimizer("sgd", 1e30))
    with pytest.raises(UserError, match=r"round 1: not one client .* lower training.optimizer.learning_rate"):
        go(experiment, tmp_path / "run")


def test_a_held_out_loss_that_is_not_finite(files, tmp_path):
    poison(files, "Z")
    poisoned_site(files, "hill", ("test",))
    with pytest.raises(UserError, match="base model's held-out loss is not finite at hill"):
        go(changed(config.load(files / "small.py"), federation__rounds=1), tmp_path / "run")
    assert finished_steps(tmp_path / "run" / "checkpoints") == [1]


@NOISE
def test_a_disk_that_fills_up_in_a_save(files, tmp_path, capsys):
    """The kernel refuses to let a file grow, as it does on a full disk; with room again, the run goes on."""
    experiment = changed(config.load(files / "small.py"), lora__rank=16, lora__targets=("*_proj",))
    assert go(experiment, tmp_path / "unbroken")[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(UserError) as caught:
            go(experiment, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search("cannot save checkpoint [12] in", str(caught.value))  # a save is waited for by the next
    assert "free some space or make the folder writable, then continue with --resume" in str(caught.value)
    assert go(experiment, tmp_path / "run", resume=True)[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "unbroken")
