"""A tuned model written for other programs and read back here: the same logits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_adapters, tiny_folder

from fedjax_llm import lora, peft
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.export import export, merged
from fedjax_llm.experiment.tuned import TunedModel, open_model
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load
from fedjax_llm.models.quantised import is_quantised

KIND = Lora(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 259, (2, 20)))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def tuned_of(folder, kind=KIND, **options):
    base = load(str(folder), **options)
    adapters = tiny_adapters(base.model, rank=kind.rank, targets=kind.targets)
    if kind.dora:
        rng = np.random.default_rng(2)
        for factors in adapters.values():
            factors["m"] = jnp.asarray(rng.uniform(0.5, 2.0, factors["b"].shape[-1]), jnp.float32)
    return TunedModel(base, kind, adapters)


def logits(base, adapters):
    hidden = base.model.hidden(base.params, adapters, TOKENS)
    return np.asarray(base.model.logits(base.params, hidden.reshape(-1, hidden.shape[-1])), np.float32)


@pytest.mark.parametrize("form", ["merged", "gguf"])
@pytest.mark.parametrize(
    "kind",
    [KIND, dataclasses.replace(KIND, rslora=True), dataclasses.replace(KIND, dora=True)],
    ids=["lora", "rs", "dora"],
)
def test_the_merged_model_gives_the_tuned_logits(tmp_path, model_folder, form, kind):
    tuned = tuned_of(model_folder, kind)
    written = export(tuned, tmp_path / "out", form, "f32")
    read = load(str(written))
    wanted = logits(tuned.base, tuned.scaled)
    np.testing.assert_allclose(logits(read, {}), wanted, atol=2e-5)
    assert np.abs(wanted - logits(tuned.base, {})).max() > 0.1
    assert read.tokenizer.encode("Why 12?") == tuned.base.tokenizer.encode("Why 12?")
    assert read.tokenizer.end_ids == tuned.base.tokenizer.end_ids


@pytest.mark.parametrize("quantised", ["int8", "nf4"])
def test_of_a_quantised_base_that_what_its_codes_stand_for_is_merged(tmp_path, model_folder, quantised):
    tuned = tuned_of(model_folder, quantised=quantised)
    assert any(map(is_quantised, tuned.base.params["layers"][0]["mlp"]["up_proj"].values()))
    read = load(str(export(tuned, tmp_path / "out", "merged")))
    wanted = logits(tuned.base, tuned.scaled)
    np.testing.assert_allclose(logits(read, {}), wanted, atol=2e-5)
    plain = load(str(model_folder))
    assert np.abs(wanted - logits(plain, tuned.scaled)).max() > 1e-3


def test_every_weight_without_an_adapter_stays_bit_for_bit(model_folder):
    tuned = tuned_of(model_folder)
    found, before = merged(tuned).tensors, merged(TunedModel(tuned.base)).tensors
    adapted = {f"model.{path}.weight" for path in tuned.adapters}
    assert {name for name in before if not np.array_equal(found[name], before[name])} == adapted
    for path, factors in tuned.adapters.items():
        change = 2.0 * np.asarray(factors["a"], np.float64) @ np.asarray(factors["b"], np.float64)
        name = f"model.{path}.weight"
        np.testing.assert_allclose(found[name], before[name] + change.T, atol=1e-6)


def test_the_adapter_alone_comes_back_as_it_was(tmp_path, model_folder):
    tuned = tuned_of(model_folder)
    export(tuned, tmp_path / "adapter", "peft")
    kind, adapters = peft.read_adapter_for(tmp_path / "adapter", tuned.base.model)
    assert (kind.rank, kind.alpha) == (KIND.rank, KIND.alpha)
    np.testing.assert_array_equal(
        logits(tuned.base, lora.scaled(adapters, kind.scaling)), logits(tuned.base, tuned.scaled)
    )
    again = open_model(str(model_folder), tmp_path / "adapter")
    np.testing.assert_array_equal(logits(again.base, again.scaled), logits(tuned.base, tuned.scaled))


def test_of_a_gguf_file_with_a_tensor_of_rotary_divisors_no_folder_is_made(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=1, rope_scaling=scaling, rope_theta=100.0)
    made = export(TunedModel(load(str(folder))), tmp_path / "one.gguf", "gguf", "f32")
    tuned = tuned_of(made)
    with pytest.raises(UserError, match="Take --format=gguf"):
        export(tuned, tmp_path / "out", "merged")
    again = load(str(export(tuned, tmp_path / "two.gguf", "gguf", "f32")))
    np.testing.assert_allclose(logits(again, {}), logits(tuned.base, tuned.scaled), atol=2e-5)


def test_nothing_is_written_over(tmp_path, model_folder):
    tuned = tuned_of(model_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(tuned, tmp_path / "full", "merged")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(tuned, tmp_path / "model.gguf", "gguf")
    with pytest.raises(UserError, match="no adapter to export"):
        export(TunedModel(tuned.base), tmp_path / "adapter", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model.gguf"]


def test_an_adapter_that_is_not_there_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        open_model(str(tmp_path / "no model"), tmp_path / "none")
