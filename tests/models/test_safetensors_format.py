"""Model folders with safetensors."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedjax_llm.errors import UserError
from fedjax_llm.models.checkpoint import fingerprint_of
from fedjax_llm.models.safetensors_format import read_folder

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}
VALUES = {name: np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32) for i, name in enumerate("abc")}


def folder_of(path, shards, config=CONFIG, index=None):
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_types_become_float32(tmp_path, kind):
    stored = {name: value.astype(kind) for name, value in VALUES.items()}
    checkpoint = read_folder(folder_of(tmp_path, {"model.safetensors": stored}))
    assert set(checkpoint.tensors) == set(VALUES)
    for name, value in checkpoint.tensors.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, stored[name].astype(np.float32))
        assert checkpoint.tensors.shape(name) == (3, 4)
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer is None
    assert checkpoint.source == str(tmp_path)


def test_lookups_do_not_read(tmp_path):
    tensors = read_folder(folder_of(tmp_path, {"model.safetensors": VALUES})).tensors
    assert "a" in tensors
    assert "z" not in tensors
    assert len(tensors) == 3
    assert tensors["a"] is not tensors["a"]  # nothing is kept
    with pytest.raises(KeyError):
        tensors["z"]


def test_shards_by_index(tmp_path):
    shards = {"x-1.safetensors": {"a": VALUES["a"]}, "x-2.safetensors": {k: VALUES[k] for k in "bc"}}
    # A second copy of the weights under another name, as some repositories have it, is left alone.
    folder = folder_of(
        tmp_path,
        shards | {"consolidated.safetensors": VALUES},
        index={"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"},
    )
    tensors = read_folder(folder).tensors
    assert {name: value.tolist() for name, value in tensors.items()} == {k: v.tolist() for k, v in VALUES.items()}
    (folder / "x-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 weight files: x-2\.safetensors"):
        read_folder(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        read_folder(folder)


def test_shards_without_an_index(tmp_path):
    shards = {"x-1.safetensors": {"a": VALUES["a"]}, "x-2.safetensors": {k: VALUES[k] for k in "bc"}}
    folder = folder_of(tmp_path, shards | {"adapter_model.safetensors": {"lora": VALUES["a"]}})
    assert set(read_folder(folder).tensors) == set("abc")
    save_file({"a": VALUES["a"]}, folder / "x-3.safetensors")
    with pytest.raises(UserError, match=r"'a' is in .*x-3\.safetensors and in another file"):
        read_folder(folder)


def test_fingerprint(tmp_path):
    one = folder_of(tmp_path / "one", {"model.safetensors": VALUES})
    same = folder_of(tmp_path / "same", {"other-name.safetensors": VALUES})
    changed = folder_of(tmp_path / "changed", {"model.safetensors": VALUES | {"a": VALUES["a"] + 1}})
    config = folder_of(tmp_path / "config", {"model.safetensors": VALUES}, config=CONFIG | {"rope_theta": 1.0})
    prints = [read_folder(folder).fingerprint for folder in (one, same, changed, config)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_fingerprint_of_large_files_samples_them(tmp_path):
    data = np.zeros(40_000_000, np.uint8)
    path = tmp_path / "large"

    def fingerprint() -> str:
        path.write_bytes(data.tobytes())
        return fingerprint_of([path])

    prints = {fingerprint()}
    for at in (0, 1_000_000, -1, -1_000_000):  # the first and the last MiB count whole
        data[at] = 1
        prints.add(fingerprint())
    data[10_000_000:10_400_000] = 1  # a changed stretch in the middle cannot hide between samples
    prints.add(fingerprint())
    assert len(prints) == 6
    assert fingerprint() in prints


def make_bin(folder):
    (folder / "pytorch_model.bin").write_bytes(b"x")


def make_damaged(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 30)


def make_truncated(folder):
    save_file(VALUES, folder / "model.safetensors")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def make_integers(folder):
    save_file({"q": np.zeros(3, np.int32)}, folder / "model.safetensors")


def make_sentencepiece(folder):
    save_file(VALUES, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(b"x")


def make_quantised(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq"}}))


def make_bad_json(folder):
    (folder / "config.json").write_text('{"a": ')


def make_list_json(folder):
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"has no \*\.safetensors files"),
        (make_bin, r"PyTorch files only .*(?s:.*)save_pretrained"),
        (make_damaged, r"model\.safetensors is damaged .* Download it again"),
        (make_truncated, r"model\.safetensors is damaged"),
        (make_integers, r"'q' .* has the type I32; supported: F32, F16, BF16"),
        (make_sentencepiece, r"no tokenizer\.json"),
        (make_quantised, r"quantised \(gptq\)(?s:.*)GGUF"),
        (make_bad_json, r"config\.json is not valid JSON"),
        (make_list_json, "JSON object, and holds a list"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, make, message):
    folder = folder_of(tmp_path / "model", {})
    make(folder)
    with pytest.raises(UserError, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", r"holds GGUF files \(model\.gguf\)"),
        ("adapter_config.json", "holds an adapter"),
        ("config.jsn", r"no config\.json.*did you mean 'config\.jsn'"),
    ],
)
def test_folders_without_config(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        read_folder(tmp_path / "absent")
