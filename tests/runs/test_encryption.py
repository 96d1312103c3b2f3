"""Encrypted run folders: what is written comes back, what was changed does not, and a wrong key is told apart."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_llm.config import MAY_CHANGE
from fedjax_llm.errors import UserError
from fedjax_llm.runs import directory, encryption, keys, metrics
from fedjax_llm.runs.checkpoints import Checkpoints
from fedjax_llm.runs.encryption import Vault

SECRET = "Ada of the coast keeps the light"
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def config_for(path):
    return {"seed": 1, "output": {"encryption": {"class": "Encryption", "key_file": str(path), "key_variable": None}}}


@pytest.fixture
def key(tmp_path, monkeypatch):
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)
    (tmp_path / "keys").mkdir()
    keys.make_key(tmp_path / "keys" / "key")
    return tmp_path / "keys" / "key"


@pytest.fixture
def run(tmp_path, key):
    """An encrypted run with a file."""
    folder = directory.create(tmp_path / "runs" / "one", config_for(key))
    directory.write_json(folder / "summary.json", {"said": SECRET})
    return folder


def flipped(path, position, mask):
    """Damages a byte; gives what was there."""
    before = path.read_bytes()
    data = bytearray(before)
    data[position % len(data)] ^= mask
    path.write_bytes(data)
    return before


@given(data=st.binary(max_size=300), place=st.text(max_size=30), other=st.text(max_size=30))
def test_an_envelope_opens_at_its_place_in_its_run_alone(tmp_path_factory, data, place, other):
    vault = Vault(tmp_path_factory.getbasetemp(), b"r" * 16, b"k" * 32)
    sealed = vault.seal(data, place)
    assert vault.unseal(sealed, place) == data
    assert len(sealed) == 9 + 12 + len(data) + 16
    assert vault.seal(data, place) != sealed, "every envelope has a nonce of its own"
    elsewhere = [
        (vault, other),
        (Vault(vault.folder, b"s" * 16, vault.key), place),
        (Vault(vault.folder, vault.run_id, b"l" * 32), place),
    ]
    for opener, at in elsewhere:
        if opener is not vault or at != place:
            with pytest.raises(
                UserError, match="was changed since the run wrote it, or belongs to another place or run"
            ):
                opener.unseal(sealed, at)
    assert vault.key.hex() not in repr(vault)
    assert repr(vault.key) not in repr(vault)


def test_the_cipher_is_aes_256_gcm_under_hkdf(run, key):
    """Against another implementation, from what is documented."""
    from Crypto.Cipher import AES
    from Crypto.Hash import SHA256
    from Crypto.Protocol.KDF import HKDF

    run_id = bytes.fromhex(json.loads((run / encryption.IDENTITY).read_text())["run_id"])
    derived = HKDF(bytes.fromhex(key.read_text()), 32, run_id, SHA256, context=b"fedjax_llm run files")
    sealed = (run / "summary.json").read_bytes()
    cipher = AES.new(derived, AES.MODE_GCM, nonce=sealed[9:21])
    cipher.update(b"FJLLMENC\x01" + run_id + b"summary.json\0")
    assert json.loads(cipher.decrypt_and_verify(sealed[21:-16], sealed[-16:])) == {"said": SECRET}


def test_files_come_back_and_hold_no_text(run, key):
    directory.write_text(run / "report.html", SECRET)
    assert encryption.read(run / "report.html").decode() == SECRET
    assert directory.read_json(run / "summary.json") == {"said": SECRET}
    for path in run.rglob("*"):
        assert SECRET.encode() not in path.read_bytes()
        assert key.read_text().strip().encode() not in path.read_bytes()
        assert bytes.fromhex(key.read_text()) not in path.read_bytes()
    directory.write_json(run / "environment.json", {"clear": 1})
    assert json.loads((run / "environment.json").read_text()) == {"clear": 1}
    assert sorted(path.name for path in run.iterdir() if path.name[0] != ".") == [
        "config.json", "encryption.json", "environment.json", "report.html", "summary.json"
    ]  # fmt: skip


def test_the_temporary_file_is_sealed_too(run, monkeypatch):
    seen = []
    replace = directory.os.replace
    monkeypatch.setattr(directory.os, "replace", lambda a, b: (seen.append(Path(a).read_bytes()), replace(a, b)))
    directory.write_text(run / "report.html", SECRET)
    assert len(seen) == 1
    assert SECRET.encode() not in seen[0]


def test_without_encryption_files_are_as_ever(tmp_path):
    folder = directory.create(tmp_path / "plain", {"seed": 1, "output": {"encryption": None}})
    directory.write_text(folder / "report.html", SECRET)
    assert (folder / "report.html").read_bytes() == SECRET.encode()
    assert not (folder / encryption.IDENTITY).exists()
    assert encryption.vault_of(folder / "adapters" / "site") is None


@SAME_FOLDER
@given(position=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_any_changed_byte_is_noticed_and_the_file_named(run, position, mask):
    path = run / "summary.json"
    before = flipped(path, position, mask)
    try:
        with pytest.raises(UserError, match=r"summary\.json.*(was changed|is not encrypted, although its run is)"):
            directory.read_json(path)
    finally:
        path.write_bytes(before)
    assert directory.read_json(path) == {"said": SECRET}


@pytest.mark.parametrize("size", [0, 1, 8, 9, 20, 36, -1])
def test_a_shortened_file_is_noticed(run, size):
    path = run / "summary.json"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"summary\.json"):
        directory.read_json(path)


def test_swapped_and_plain_files_are_noticed(run, key, tmp_path):
    directory.write_json(run / "evaluation.json", {"other": 1})
    other = directory.create(tmp_path / "runs" / "two", config_for(key))
    for source, target in (
        (run / "evaluation.json", run / "summary.json"),
        (run / "evaluation.json", other / "evaluation.json"),
    ):
        shutil.copy(source, target)
        with pytest.raises(UserError, match=f"{target.name} was changed .* or belongs to another place or run"):
            directory.read_json(target)
    (run / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"summary\.json is not encrypted, although its run is"):
        directory.read_json(run / "summary.json")
    (run / "adapter").mkdir()
    (run / "adapter" / "config.json").write_text("{}")  # a plain run put into the encrypted one
    (run / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json is not encrypted"):
        encryption.read(run / "adapter" / "adapter_config.json")


def test_a_wrong_key_is_told_from_tampering(run, tmp_path, key):
    keys.make_key(tmp_path / "keys" / "other")
    for action in (
        lambda: directory.read_json(run / "summary.json"),
        lambda: directory.write_json(run / "summary.json", {}),
        lambda: directory.reopen(run, config_for(key)),
        lambda: metrics.MetricsLog(run / "metrics.jsonl"),
        lambda: Checkpoints(run / "checkpoints"),
    ):
        with (
            keys.using(tmp_path / "keys" / "other"),
            pytest.raises(UserError, match=f"the key is not the one that {run} was encrypted with"),
        ):
            action()
    assert directory.read_json(run / "summary.json") == {"said": SECRET}
    moved = run.rename(run.parent / "renamed")
    key.rename(tmp_path / "keys" / "moved")
    with pytest.raises(UserError, match=r"the key of the encrypted run .* is missing"):
        directory.read_json(moved / "summary.json")
    with keys.using(tmp_path / "keys" / "moved"):
        assert directory.read_json(moved / "summary.json") == {"said": SECRET}


def test_the_clear_files_that_open_a_run_cannot_just_go(run, key, tmp_path):
    identity, config = run / encryption.IDENTITY, run / "config.json"
    before = identity.read_text()
    for content, message in (
        (None, "its encryption.json is missing"),
        ("{", "encryption.json is damaged"),
        ("[]", "encryption.json is damaged"),
        (before.replace('"version": 1', '"version": 2'), "of another version of this program"),
        (
            before.replace(json.loads(before)["run_id"], "0" * 32),
            "the key is not the one .*or its encryption\\.json was",
        ),
    ):
        identity.unlink() if content is None else identity.write_text(content)
        for action in (lambda: directory.reopen(run, config_for(key)), lambda: encryption.read(run / "summary.json")):
            with pytest.raises(UserError, match=message):
                action()
    identity.write_text(before)
    config.unlink()
    with pytest.raises(UserError, match=r"its config\.json is missing"):
        encryption.read(run / "summary.json")
    shutil.copy(run / "summary.json", tmp_path / "summary.json")
    with pytest.raises(UserError, match="is not in the folder of its run"):
        encryption.read(tmp_path / "summary.json")


def test_encryption_cannot_come_or_go_but_the_key_can_move(run, key, tmp_path):
    plain = directory.create(tmp_path / "runs" / "plain", {"seed": 1, "output": {"encryption": None}})
    for folder, config, way in (
        (run, {"seed": 1, "output": {"encryption": None}}, "with"),
        (run, {"seed": 1}, "with"),
        (plain, config_for(key), "without"),
    ):
        before = (folder / "config.json").read_bytes()
        with pytest.raises(UserError, match=f"was started {way} output.encryption; go on with it {way}, or"):
            directory.reopen(folder, config, MAY_CHANGE)
        assert (folder / "config.json").read_bytes() == before
    moved = key.rename(tmp_path / "keys" / "moved")
    with pytest.raises(UserError, match=r"is missing: there is neither the file .*/key nor"):
        directory.reopen(run, config_for(moved), MAY_CHANGE)
    with keys.using(moved):
        directory.reopen(run, config_for(moved), MAY_CHANGE)
    assert directory.read_json(run / "summary.json") == {"said": SECRET}


def test_a_run_without_its_key_is_never_begun(tmp_path, key):
    text = key.read_text()
    key.unlink()
    with pytest.raises(UserError, match="is missing"):
        directory.create(tmp_path / "runs" / "one", config_for(key))
    assert not (tmp_path / "runs").exists()
    key.touch(0o600)
    key.write_text(text)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / encryption.IDENTITY).write_text("{}")  # of a start that was killed
    directory.write_json(directory.create(folder, config_for(key)) / "summary.json", 1)
    assert directory.read_json(folder / "summary.json") == 1


# The metrics, line by line.


@pytest.fixture
def log(run):
    log = metrics.MetricsLog(run / "metrics.jsonl")
    for number in (1, 2, 3):
        log.append({"round": number, "said": SECRET, "loss": 0.1 * number})
    return run / "metrics.jsonl"


def test_lines_are_appended_and_dropped(log):
    lines = metrics.read(log)
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert log.read_bytes().count(b"\n") == 3
    assert SECRET.encode() not in log.read_bytes()
    assert metrics.plain_text(log) == "".join(json.dumps(line) + "\n" for line in lines)
    book = metrics.MetricsLog(log)
    assert book.truncate_after(2) == 1
    book.append({"round": 3})
    assert metrics.read(log) == [*lines[:2], {"round": 3}]


@SAME_FOLDER
@given(cut=st.integers(0, 10**6))
def test_a_line_that_was_interrupted_is_left_out(log, cut):
    whole = log.read_bytes()
    try:
        log.write_bytes(whole[: cut % (len(whole) + 1)])
        ended = log.read_bytes().count(b"\n")
        assert [line["round"] for line in metrics.read(log)] == list(range(1, ended + 1))
        torn = not log.read_bytes().endswith(b"\n") and log.stat().st_size > 0
        assert metrics.MetricsLog(log).truncate_after(9) == torn
        assert log.read_bytes() == b"" or log.read_bytes().endswith(b"\n")
        assert len(metrics.read(log)) == ended
    finally:
        log.write_bytes(whole)


@SAME_FOLDER
@given(position=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_any_changed_byte_of_the_metrics_is_noticed(log, position, mask):
    before = flipped(log, position, mask)
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            metrics.read(log)
    finally:
        log.write_bytes(before)


def test_every_end_of_a_line_is_noticed(log):
    ends = [place for place, byte in enumerate(log.read_bytes()) if byte == ord("\n")]
    for place in ends:
        for mask in range(1, 256):
            before = flipped(log, place, mask)
            with pytest.raises(UserError, match=r"metrics\.jsonl"):
                metrics.read(log)
            log.write_bytes(before)


def test_lines_in_another_order_are_noticed(log):
    one, two, three = log.read_bytes().splitlines(keepends=True)
    for lines in ([two, one, three], [one, three], [one, one], [two, three]):
        log.write_bytes(b"".join(lines))
        with pytest.raises(UserError, match=r"metrics\.jsonl at byte \d+ was changed"):
            metrics.read(log)
