"""Keys of encrypted runs: what is taken for one, where it is sought, and what is never said."""

import base64
import json
import os
import stat
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import make_key as make_key_main
from fedjax_llm import config
from fedjax_llm.config import Experiment, Output
from fedjax_llm.errors import UserError
from fedjax_llm.runs import keys
from fedjax_llm.runs.keys import Encryption

KEY = bytes(range(200, 232))
TEXT = KEY.hex().encode()
FORMS = {
    "hex": KEY.hex().encode(),
    "upper case, with a line end": KEY.hex().upper().encode() + b"\r\n",
    "base64": base64.b64encode(KEY),
    "base64 for addresses": b" " + base64.urlsafe_b64encode(KEY) + b"\n",
    "raw": KEY,
}


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)


@pytest.fixture
def run(tmp_path):
    """Where a run could be."""
    return tmp_path / "runs" / "mine"


def key_file(folder, content=TEXT, mode=0o600):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "the.key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_key(form, tmp_path, run):
    path = key_file(tmp_path / "keys", FORMS[form])
    assert keys.key_of(Encryption(key_file=str(path)), run) == KEY


@given(key=st.binary(min_size=32, max_size=32))
def test_hex_and_base64_stand_for_the_same_bytes(key):
    assert keys.parse_key(key.hex().encode(), "it") == key == keys.parse_key(base64.b64encode(key), "it")


@given(text=st.one_of(st.binary(max_size=80), st.text("0123456789abcdef=\n", max_size=80).map(str.encode)))
def test_what_is_accepted_has_exactly_32_bytes_and_what_is_not_is_not_told(text):
    try:
        found = keys.parse_key(text, "it")
    except UserError as error:
        found, said = None, str(error)
    if found is not None:
        assert len(found) == 32
        return
    shown = text.decode("latin1").strip()
    assert said.startswith("it holds ")
    assert len(shown) < 6 or shown not in said


REFUSED = {
    "nothing": (b"", "holds 0 characters, which are neither 64 hex digits nor 32 bytes in base64"),
    "128 bits": (KEY[:16].hex().encode(), "holds 32 characters"),
    "a passphrase": (b"correct horse battery staple", "holds 28 characters"),
    "hex with a typing error": (KEY.hex().encode()[:-1] + b"g", "holds 64 characters"),
    "base64 of too much": (base64.b64encode(KEY + b"x"), "holds 44 characters"),
    "raw with a line end": (KEY + b"\n", "holds 33 bytes, or more, that are no text; a raw key has exactly 32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_with_the_reason(what, tmp_path, run):
    content, reason = REFUSED[what]
    path = key_file(tmp_path / "keys", content)
    with pytest.raises(UserError) as caught:
        keys.key_of(Encryption(key_file=str(path)), run)
    assert f"the key file {path} {reason}" in str(caught.value)
    assert not content or content.decode("latin1") not in str(caught.value)


def test_the_order_of_the_places(tmp_path, run, monkeypatch):
    recorded, given_one = key_file(tmp_path / "keys"), key_file(tmp_path / "others", b"1" * 64)
    how = Encryption(key_file=str(recorded))
    monkeypatch.setenv(keys.KEY_VARIABLE, "2" * 64)
    with keys.using(given_one):
        assert keys.key_of(how, run).hex() == "1" * 64
        given_one.unlink()  # it was read once, as from a pipe
        assert keys.key_of(how, run).hex() == "1" * 64
    with keys.using(None):
        assert keys.key_of(how, run) == KEY
    recorded.unlink()
    assert keys.key_of(how, run).hex() == "2" * 64
    monkeypatch.setenv("RUN_KEY", "3" * 64)
    assert keys.key_of(Encryption(key_variable="RUN_KEY"), run).hex() == "3" * 64
    monkeypatch.delenv("RUN_KEY")
    assert keys.key_of(Encryption(key_variable="RUN_KEY"), run).hex() == "2" * 64


def test_a_missing_key_says_where_it_was_sought(tmp_path, run):
    for how, sought in (
        (Encryption(key_file=str(tmp_path / "gone")), f"the file {tmp_path / 'gone'}"),
        (Encryption(key_variable="RUN_KEY"), "the environment variable RUN_KEY"),
    ):
        with pytest.raises(UserError) as caught:
            keys.key_of(how, run)
        assert f"neither {sought} nor the environment variable FEDJAX_LLM_KEY" in str(caught.value)
        assert "--key-file" in str(caught.value)
    with pytest.raises(UserError, match="gone cannot be read: No such file"), keys.using(tmp_path / "gone"):
        pass
    with pytest.raises(UserError, match="--key-file is itself a key") as caught, keys.using(Path(TEXT.decode())):
        pass
    assert TEXT.decode() not in str(caught.value)


@pytest.mark.parametrize("place", ["runs/mine", "runs/mine/adapter", "runs"])
def test_a_key_in_or_beside_the_run_is_refused(place, tmp_path, run):
    path = key_file(tmp_path / place)
    where = "beside" if place == "runs" else "in"
    message = f"is {where} the run's folder"
    with pytest.raises(UserError, match=message):
        keys.key_of(Encryption(key_file=str(path)), run)
    with keys.using(path), pytest.raises(UserError, match=message):
        keys.key_of(Encryption(key_variable="RUN_KEY"), run)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UserError, match=message):
        keys.key_of(Encryption(key_file=str(tmp_path / "link")), run)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604])
def test_a_file_that_others_can_read_is_told(mode, tmp_path, run):
    path = key_file(tmp_path / "keys", mode=mode)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert keys.key_of(Encryption(key_file=str(path)), run) == KEY
    assert [f"chmod 600 {path}" in str(one.message) for one in seen] == [True] * bool(mode & 0o077)


def test_the_main_makes_a_key_once_for_the_owner_alone(tmp_path, run, capsys):
    path = tmp_path / "keys" / "new.key"
    assert make_key_main.main([str(path)]) == 2
    assert "cannot write the key" in capsys.readouterr().err
    path.parent.mkdir()
    before = os.umask(0)
    try:
        assert make_key_main.main([str(path)]) == 0
    finally:
        os.umask(before)
    text = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text not in capsys.readouterr().out
    key = keys.key_of(Encryption(key_file=str(path)), run)
    assert make_key_main.main([str(path)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert keys.key_of(Encryption(key_file=str(path)), run) == key
    assert make_key_main.main([str(tmp_path / "keys" / "second.key")]) == 0
    assert (tmp_path / "keys" / "second.key").read_text().strip() != text


def test_the_configuration_names_one_place_and_never_the_key():
    for fields, message in (
        ({}, "has neither of key_file and key_variable"),
        ({"key_file": "a", "key_variable": "B"}, "has both of key_file and key_variable"),
        ({"key_file": KEY.hex()}, "output.encryption.key_file is itself a key"),
        ({"key_file": base64.b64encode(KEY).decode()}, "output.encryption.key_file is itself a key"),
        ({"key_variable": "A" + KEY.hex()[1:]}, "output.encryption.key_variable is itself a key"),
        ({"key_variable": "$RUN_KEY"}, "is not the name of an environment variable"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Encryption(**fields)
        assert not any(len(value) > 20 and value in str(caught.value) for value in fields.values())


def test_the_configuration_as_json_and_back():
    for how in (None, Encryption(key_file="~/keys/a"), Encryption(key_variable="RUN_KEY")):
        experiment = Experiment(output=Output(encryption=how))
        config.check(experiment)
        assert keys.of_config(json.loads(json.dumps(config.to_json(experiment)))) == how
    for other in ({}, {"output": None}, {"output": {}}, [], None, {"output": {"encryption": None}}):
        assert keys.of_config(other) is None
    with pytest.raises(UserError, match=r"output\.encryption\.key_file is 3, a int"):
        config.check(Experiment(output=Output(encryption=Encryption(key_file=3))))  # pyrefly: ignore
