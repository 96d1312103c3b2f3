"""A private run in an encrypted folder: the same results, none of them in clear, and nothing without the key."""

import contextlib
import json
import shutil
import signal

import numpy as np
import pytest
from killing import in_a_process
from safetensors.numpy import load
from small_private import private
from small_run import changed, go, outcome, write_small

from experiments import ask, compare, decrypt
from experiments import privacy as privacy_main
from experiments.run import main as run_main
from fedjax_llm import config
from fedjax_llm.errors import UserError
from fedjax_llm.privacy import ledger
from fedjax_llm.runs import directory, encryption, keys, metrics
from fedjax_llm.runs.keys import Encryption

CLEAR = ("config.json", "encryption.json", "environment.json", "ledger.jsonl", ".lock")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a key, a wrong key, a model, sites, and the configuration."""
    folder = tmp_path_factory.mktemp("encrypted")
    (folder / "keys").mkdir()
    for name in ("key", "wrong"):
        keys.make_key(folder / "keys" / name)
    write_small(folder / "files")
    return folder


@pytest.fixture(scope="module")
def plain(base):
    """The experiment, unencrypted."""
    return private(config.load(base / "files" / "small.py"), federation__rounds=2)


@pytest.fixture(scope="module")
def sealed(base, plain):
    """The experiment, encrypted."""
    return changed(plain, output__encryption=Encryption(key_file=str(base / "keys" / "key")))


@pytest.fixture(scope="module")
def unencrypted(base, plain):
    folder = base / "runs" / "plain"
    assert go(plain, folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def finished(base, sealed):
    """An encrypted run, and what was said."""
    folder = base / "runs" / "sealed"
    status, seen = go(sealed, folder)
    assert status == 0
    assert seen.count("no TensorBoard scalars are written") == 1
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No key in the environment; the compilation cache of the tests as it is."""
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(ask, "use_compilation_cache", lambda: None)


@contextlib.contextmanager
def without_key(base):
    """The key is not where the run says."""
    (base / "keys" / "key").rename(base / "keys" / "away")
    try:
        yield base / "keys" / "away"
    finally:
        (base / "keys" / "away").rename(base / "keys" / "key")


def in_clear(run, out):
    """What a run left, by its plain copy."""
    assert decrypt.main([str(run), str(out)]) == 0
    return outcome(out)


def test_the_plain_copy_is_the_run_without_encryption(finished, unencrypted, tmp_path):
    assert in_clear(finished, tmp_path / "copy") == outcome(unencrypted)
    names = {path.relative_to(unencrypted).as_posix() for path in unencrypted.rglob("*") if path.is_file()}
    kept = {name for name in names if not name.startswith(("checkpoints/", "tensorboard/", "."))}
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")}
    assert kept | {"adapter"} == copied
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0
    assert directory.read_json(tmp_path / "copy" / "config.json") == directory.read_json(unencrypted / "config.json")
    assert "<html" in (tmp_path / "copy" / "report.html").read_text()


def secrets(run):
    """Bytes that an unencrypted run holds, and an encrypted one must not: text, figures, records, weights."""
    evaluation = directory.read_json(run / "evaluation.json")
    found = [b"Who keeps", b"of the coast.", b"of the hill.", b'"nll"', b'"update_norm"', b"<html", b"token_accuracy"]
    found += [record.encode() for record in evaluation["base"]["sites"]["coast"]["records"]]
    found += [json.dumps(evaluation["base"]["sites"]["coast"]["nll"][0]).encode()]
    found += [json.dumps(line["loss"]).encode() for line in metrics.read(run / "metrics.jsonl")]
    answers = [one[name].encode() for one in evaluation["generations"] for name in ("prompt", "reference", "final")]
    found += [answer for answer in answers if len(answer) > 6]
    weights = load((run / "adapter" / "adapter_model.safetensors").read_bytes())
    found += [
        np.ascontiguousarray(array).tobytes()[start : start + 16] for array in weights.values() for start in (0, 64)
    ]
    return [one for one in found if any(one)]


def nothing_in_clear(folder, hidden):
    """Whether no file holds any of these bytes."""
    return not [one for path in folder.rglob("*") if path.is_file() for one in hidden if one in path.read_bytes()]


def test_nothing_is_in_clear_but_what_is_meant_to_be(finished, unencrypted, base):
    hidden = secrets(unencrypted)
    contents = [path.read_bytes() for path in unencrypted.rglob("*") if path.is_file()]
    assert len(hidden) > 15
    assert all(any(one in content for content in contents) for one in hidden), "the search finds them in a plain run"
    assert nothing_in_clear(finished, hidden)
    key = (base / "keys" / "key").read_text().strip()
    encrypted = 0
    for path in (path for path in finished.rglob("*") if path.is_file()):
        content, first = path.read_bytes(), path.relative_to(finished).parts[0]
        assert key.encode() not in content
        assert bytes.fromhex(key) not in content
        assert encryption.vault_of(finished).key not in content
        if first not in CLEAR and first != "checkpoints" and path.suffix != ".jsonl":
            assert content.startswith(b"FJLLMENC"), path
            encrypted += 1
    assert encrypted == 5
    assert not (finished / "tensorboard").exists()


def test_killed_and_resumed_it_is_the_same(sealed, unencrypted, base, tmp_path):
    folder = tmp_path / "run"
    in_a_save = ("os", "rename", "2.orbax-checkpoint-tmp", 3)
    assert in_a_process(sealed, folder, *in_a_save) == -signal.SIGKILL
    assert list((folder / "checkpoints").glob("2.orbax-checkpoint-tmp*"))
    assert nothing_in_clear(folder, secrets(unencrypted))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with without_key(base) as away:
        with pytest.raises(UserError, match=r"the key of the encrypted run .* is missing"):
            go(sealed, folder, resume=True)
        with keys.using(base / "keys" / "wrong"), pytest.raises(UserError, match="the key is not the one that"):
            go(sealed, folder, resume=True)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b"RkpMTE1FTk")  # and in the middle of a line
        with keys.using(away):
            status, seen = go(sealed, folder, resume=True)
    assert status == 0
    assert "Going on after round 1" in seen
    assert in_clear(folder, tmp_path / "copy") == outcome(unencrypted)


def asked(run, key_file=None):
    ask.main(run, "Who keeps coast 1?", max_new_tokens=4, key_file=key_file)


def compared(run, key_file=None):
    compare.show((run,), key_file=key_file)


def recounted(run, key_file=None):
    words = [] if key_file is None else ["--key-file", str(key_file)]
    assert privacy_main.count([str(run), *words], compare.Console()) == 0


def without_seconds(text):
    """What was printed, but for the runs' names and times."""
    lines = [line.replace("sealed", "plain").split() for line in text.splitlines() if "training time" not in line]
    return [words for words in lines if words]


READERS = {asked: "adapter/adapter_model.safetensors", compared: "evaluation.json", recounted: "summary.json"}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_readers_need_the_key(reader, finished, unencrypted, base, capsys, monkeypatch):
    reader(finished)
    encrypted = capsys.readouterr().out
    reader(unencrypted)
    assert without_seconds(encrypted) == without_seconds(capsys.readouterr().out)
    with pytest.raises(UserError, match=f"the key is not the one that {finished} was encrypted with"):
        reader(finished, base / "keys" / "wrong")
    with without_key(base) as away:
        with pytest.raises(UserError, match=f"the key of the encrypted run {finished} is missing: there is neither"):
            reader(finished)
        reader(finished, away)
        monkeypatch.setenv(keys.KEY_VARIABLE, away.read_text())
        reader(finished)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_readers_refuse_what_was_changed(reader, share, finished):
    path = finished / READERS[reader]
    before = path.read_bytes()
    data = bytearray(before)
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    try:
        with pytest.raises(UserError, match=f"{path} (was changed|is not encrypted, although its run is)"):
            reader(finished)
    finally:
        path.write_bytes(before)


def test_an_auditor_needs_no_key_for_the_ledger(finished, base, tmp_path):
    for name in ("config.json", ledger.LEDGER):
        shutil.copy(finished / name, tmp_path)
    with without_key(base):
        recounted(tmp_path)
        assert len(ledger.read(finished / ledger.LEDGER).entries) == 2


def test_an_adapter_of_an_encrypted_run_can_be_started_from(finished, plain, base, tmp_path):
    from fedjax_llm.experiment.prepare import prepare
    from fedjax_llm.runs.progress import RunProgress

    experiment = changed(plain, start_from=str(finished / "adapter"))
    with RunProgress(1, compare.Console(quiet=True)) as progress:
        assert prepare(experiment, progress).lora.rank == 2
        with without_key(base), pytest.raises(UserError, match="is missing"):
            prepare(experiment, progress)


def test_a_copy_is_whole_or_not_there(finished, unencrypted, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for words, message in (
        ([unencrypted, tmp_path / "copy"], "is not the folder of an encrypted run"),
        ([finished / "adapter", tmp_path / "copy"], "is not the folder of an encrypted run"),
        ([finished, finished / "copy"], "is in the folder of the encrypted run"),
        ([finished, tmp_path / "full"], "is not empty"),
    ):
        assert decrypt.main([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err
    report = finished / "report.html"
    before = report.read_bytes()
    try:
        report.write_bytes(before[:-1])
        assert decrypt.main([str(finished), str(tmp_path / "copy")]) == 2
        assert "report.html was changed" in capsys.readouterr().err
    finally:
        report.write_bytes(before)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_key_file_alone_does_not_encrypt_and_that_is_said(base, tmp_path, capsys):
    words = [
        f"--config={base / 'files' / 'small.py'}",
        f"--key-file={base / 'keys' / 'key'}",
        f"--out={tmp_path / 'run'}",
    ]
    assert run_main(words) == 2
    assert "nothing would be encrypted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
