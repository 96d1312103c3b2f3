import json
import resource
import shutil
import signal
from collections import namedtuple
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import same, tiny_folder

from fedjax_llm.errors import UserError
from fedjax_llm.models import loading
from fedjax_llm.models.checkpoint import LazyTensor, LazyTensors
from fedjax_llm.models.family import family_of
from fedjax_llm.models.loading import converted, load, read_params, save_folder
from fedjax_llm.models.safetensors_format import read_folder

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(folder, change):
    """Rewrites the tensors; a change to ``None`` removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | change
    save_file({name: array for name, array in tensors.items() if array is not None}, path)


def params_of(folder, dtype="float32"):
    checkpoint = read_folder(folder)
    family = family_of(checkpoint.config)
    return read_params(checkpoint, family, family.config_from_hf(checkpoint.config), dtype)


def test_load(folder):
    base = load(str(folder))
    tensors = load_file(folder / "model.safetensors")
    assert base.name == str(folder)
    assert base.size == sum(array.size for array in tensors.values())
    assert base.size == sum(leaf.size for leaf in jax.tree.leaves(base.params))
    assert base.fingerprint == load(str(folder), "bfloat16").fingerprint
    assert base.tokenizer.decode(base.tokenizer.encode("two words")) == "two words"
    tokens = np.array([base.tokenizer.encode("two words")], np.int32)
    assert np.isfinite(base.model.hidden(base.params, {}, tokens)).all()


def test_each_tensor_in_its_place(folder):
    params, tensors = params_of(folder), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])
    for layer in range(2):
        found = params["layers"][layer]
        prefix = f"model.layers.{layer}."
        np.testing.assert_array_equal(found["mlp"]["up_proj"]["kernel"], tensors[prefix + "mlp.up_proj.weight"].T)
        np.testing.assert_array_equal(found["input_layernorm"]["scale"], tensors[prefix + "input_layernorm.weight"])
    assert len(jax.tree.leaves(params)) == len(tensors)


def test_each_tensor_is_read_once(folder):
    checkpoint, reads = read_folder(folder), []

    def counting(name, entry):
        return LazyTensor(entry.shape, lambda: (reads.append(name), entry.read())[1])

    entries = {name: counting(name, entry) for name, entry in checkpoint.tensors.entries.items()}
    family = family_of(checkpoint.config)
    config = family.config_from_hf(checkpoint.config)
    read_params(replace(checkpoint, tensors=LazyTensors(entries)), family, config, "float32")
    assert sorted(reads) == sorted(entries)


def test_bfloat16_rounds_each_weight(folder):
    wide, narrow = params_of(folder), params_of(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    assert same(narrow, jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), wide))


def test_tensors_that_do_not_fit_are_named(folder):
    extra = np.zeros(3, np.float32)
    retensor(folder, {"model.norm.weight": None, UP: np.zeros((32, 48), np.float32), "model.extra.weight": extra})
    with pytest.raises(UserError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert str(folder) in message
    assert "1 missing: model.norm.weight;" in message
    assert "1 not known to the family: model.extra.weight;" in message
    assert f"1 misshapen: {UP} is [32, 48], not [48, 32]" in message


def test_long_lists_are_cut(folder):
    configure(folder, num_hidden_layers=4)
    with pytest.raises(UserError, match=r"18 missing: model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.$"):
        load(str(folder))


def test_second_copies_and_computed_tensors_are_left_aside(folder):
    plain = params_of(folder)
    retensor(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert same(params_of(folder), plain)
    masks = {f"model.layers.1.{name}": np.ones(1, np.float32) for name in ("attn.bias", "attention.masked_bias")}
    retensor(folder, masks)
    assert same(params_of(folder), plain)
    configure(folder, tie_word_embeddings=True)
    tied = params_of(folder)
    assert set(plain) - set(tied) == {"lm_head"}


def test_a_bias_that_is_no_mask_is_not_left_aside(folder):
    name = "model.layers.1.self_attn.bias"
    retensor(folder, {name: np.ones(1, np.float32)})
    with pytest.raises(UserError, match=f"1 not known to the family: {name}"):
        params_of(folder)


def test_names_without_the_first_part_are_those_of_a_model_without_its_head(folder):
    plain, tensors = params_of(folder), load_file(folder / "model.safetensors")
    retensor(folder, dict.fromkeys(tensors) | {name.removeprefix("model."): array for name, array in tensors.items()})
    assert same(params_of(folder), plain)
    norm = tensors["model.norm.weight"]
    retensor(folder, {"model.norm.weight": norm})
    with pytest.raises(UserError, match=r"1 not known to the family: norm\.weight$"):
        params_of(folder)


def test_a_tokenizer_that_is_missing_or_of_another_model(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][:100]
    retensor(folder, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
    configure(folder, vocab_size=100)
    with pytest.raises(UserError, match=r"has 259 tokens but the model embeds only 100"):
        load(str(folder))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load(str(folder))


# The converted copy.


def test_save_folder_round_trip(folder, tmp_path):
    checkpoint = read_folder(folder)
    save_folder(checkpoint, tmp_path / "copy")
    copy = read_folder(tmp_path / "copy")
    assert copy.config == checkpoint.config
    assert {name: copy.tensors[name].tobytes() for name in copy.tensors} == {
        name: checkpoint.tensors[name].tobytes() for name in checkpoint.tensors
    }
    assert copy.tokenizer.encode("two words") == checkpoint.tokenizer.encode("two words")
    assert (copy.tokenizer.eos_id, copy.tokenizer.end_ids) == (
        checkpoint.tokenizer.eos_id,
        checkpoint.tokenizer.end_ids,
    )
    assert copy.tokenizer.chat_template == checkpoint.tokenizer.chat_template


def test_a_checkpoint_is_converted_once(folder, cache, monkeypatch):
    checkpoint = read_folder(folder)
    first = converted(checkpoint)
    monkeypatch.setattr(loading, "save_folder", lambda *_: pytest.fail("written again"))
    second = converted(checkpoint)
    for found in (first, second):
        assert (found.source, found.fingerprint) == (checkpoint.source, checkpoint.fingerprint)
        np.testing.assert_array_equal(found.tensors[UP], checkpoint.tensors[UP])
    assert [path.name for path in (cache / "converted").iterdir()] == [
        loading.converted_folder(checkpoint.fingerprint).name
    ]


def test_an_interrupted_conversion_leaves_nothing(folder, cache, monkeypatch):
    def dying(checkpoint, target):
        save_folder(checkpoint, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "save_folder", dying)
    with pytest.raises(KeyboardInterrupt):
        converted(read_folder(folder))
    assert list((cache / "converted").iterdir()) == []
    monkeypatch.setattr(loading, "save_folder", save_folder)
    np.testing.assert_array_equal(converted(read_folder(folder)).tensors[UP], read_folder(folder).tensors[UP])


def test_another_process_may_be_quicker(folder, cache, monkeypatch):
    checkpoint = read_folder(folder)

    def slow(checkpoint, scratch):
        save_folder(checkpoint, scratch)
        save_folder(checkpoint, loading.converted_folder(checkpoint.fingerprint))

    monkeypatch.setattr(loading, "save_folder", slow)
    np.testing.assert_array_equal(converted(checkpoint).tensors[UP], checkpoint.tensors[UP])
    assert len(list((cache / "converted").iterdir())) == 1


def test_a_disk_that_is_full_before(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"model \(0 MiB\) cannot be written to .*copy: .*No space left"):
        save_folder(read_folder(folder), tmp_path / "copy")


def test_a_disk_that_fills_up(folder, tmp_path):
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, earlier[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*copy: .*File too large"):
            save_folder(read_folder(folder), tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_cache_that_cannot_be_written(folder, cache):
    cache.write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        converted(read_folder(folder))
