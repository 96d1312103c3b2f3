"""Adapters that we write, in torch with peft; adapters that peft writes, here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_adapters, tiny_folder
from transformers import LlamaForCausalLM

from fedjax_llm import lora as lora_module
from fedjax_llm.lora import Lora
from fedjax_llm.peft import read_adapter_for, write_adapter
from fedjax_llm.types import Adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
reference = pytest.importorskip("reference")

pytestmark = pytest.mark.parity

ALL = ("*_proj",)


@pytest.fixture
def tiny(tmp_path):
    """A tiny model: our functions and weights, the folder that torch reads, tokens and their mask."""
    folder = tiny_folder(tmp_path / "model")
    model, params = reference.ours_of(folder)
    rng = np.random.default_rng(1)
    return model, params, folder, *reference.padded([rng.integers(0, 259, length) for length in (40, 23)])


def in_torch(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(tiny, adapters: Adapters) -> np.ndarray:
    model, params, _, tokens, _ = tiny
    return reference.our_logits(model, params, adapters, tokens)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=3, alpha=7.5, targets=ALL),
        Lora(rank=8, alpha=16, targets=("q_proj", "v_proj"), layers=(-1,)),
        Lora(rank=1, alpha=0.3, targets=("mlp.*", "o_proj"), layers=(0,), dropout=0.5),
        Lora(rank=3, alpha=7.5, targets=ALL, rslora=True),
        Lora(rank=3, alpha=7.5, targets=ALL, dora=True),
    ],
)
def test_peft_loads_what_we_write(tiny, tmp_path, lora):
    model, _, folder, tokens, mask = tiny
    paths = lora_module.target_modules(lora, model)
    adapters = {
        p: factors for p, factors in tiny_adapters(model, rank=lora.rank, targets=lora.targets).items() if p in paths
    }
    if lora.dora:
        rng = np.random.default_rng(2)
        for factors in adapters.values():
            factors["m"] = jnp.asarray(rng.uniform(0.5, 2.0, factors["b"].shape[-1]), jnp.float32)
    write_adapter(tmp_path / "adapter", adapters, lora, str(folder), model)
    theirs = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "adapter").eval()
    assert {name.count(".lora_A.") for name, _ in theirs.named_parameters()} == {0, 1}
    assert sum(".lora_A." in name for name, _ in theirs.named_parameters()) == len(adapters)
    ours = logits(tiny, lora_module.scaled(adapters, lora.scaling))
    assert np.abs(ours - logits(tiny, {})).max() > 0.1  # the adapters matter
    reference.assert_close(ours, reference.torch_logits(theirs, tokens, mask), mask)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "mlp.down_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"target_modules": r"model\.layers\.0\..*\.[qk]_proj"},
    ],
)
def test_we_load_what_peft_writes(tiny, tmp_path, options):
    model, _, folder, tokens, mask = tiny
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(in_torch(folder), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    lora, adapters = read_adapter_for(tmp_path / "adapter", model)
    assert list(adapters) == list(lora_module.target_modules(lora, model))
    ours = logits(tiny, lora_module.scaled(adapters, lora.scaling))
    assert np.abs(ours - logits(tiny, {})).max() > 0.1
    reference.assert_close(ours, reference.torch_logits(theirs, tokens, mask), mask)


@pytest.mark.model
def test_smollm2_with_an_adapter(smollm2, smollm2_in_torch, medical_chats, tmp_path):
    base, _ = smollm2
    lora = Lora(rank=8, alpha=16, targets=("q_proj", "v_proj"))
    adapters = lora_module.init(jax.random.key(0), lora, base.model)
    rng = np.random.default_rng(0)
    adapters = {
        path: {"a": factors["a"], "b": rng.normal(0, 0.01, factors["b"].shape).astype(np.float32)}
        for path, factors in adapters.items()
    }
    write_adapter(tmp_path, adapters, lora, base.name, base.model)
    theirs = peft.PeftModel.from_pretrained(smollm2_in_torch, tmp_path).eval()
    tokens, mask = reference.padded(medical_chats)
    scaled = lora_module.scaled(adapters, lora.scaling)
    reference.assert_deep_model_close(base.model, base.params, scaled, theirs, tokens, mask)
    plain = reference.our_logits(base.model, base.params, {}, tokens)
    assert np.abs(plain - reference.our_logits(base.model, base.params, scaled, tokens))[mask].max() > 0.1
