"""GPT-NeoX and GPT-2 against transformers and peft: logits within 1e-5 in float32, with each of their switches."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import same, tiny_adapters
from transformers import GPT2Config, GPTNeoXConfig

from fedjax_llm import lora as lora_module
from fedjax_llm.lora import Lora
from fedjax_llm.models.decoding import generate
from fedjax_llm.peft import naming_of, read_adapter_for, write_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
reference = pytest.importorskip("reference")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
NEOX = IDS | {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = IDS | {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
KINDS = {
    "neox": GPTNeoXConfig(**NEOX),
    "neox-sequential": GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "neox-tied": GPTNeoXConfig(**NEOX, tie_word_embeddings=True),
    "neox-all-turned": GPTNeoXConfig(**NEOX, rotary_pct=1.0, rotary_emb_base=500.0),
    "neox-linear-rope": GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5, "rope_theta": 1e3}
    ),
    "neox-no-attention-bias": GPTNeoXConfig(**NEOX, attention_bias=False),
    "neox-gelu-new": GPTNeoXConfig(**NEOX, hidden_act="gelu_new", layer_norm_eps=1e-3),
    "neox-gelu-fast": GPTNeoXConfig(**NEOX, hidden_act="gelu_fast"),
    "neox-relu": GPTNeoXConfig(**NEOX, hidden_act="relu"),
    "neox-silu": GPTNeoXConfig(**NEOX, hidden_act="silu"),
    "gpt2": GPT2Config(**GPT2),
    "gpt2-untied": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2-narrow": GPT2Config(**GPT2, n_inner=48, layer_norm_epsilon=1e-3),
    "gpt2-gelu": GPT2Config(**GPT2, activation_function="gelu"),
    "gpt2-gelu-tanh": GPT2Config(**GPT2, activation_function="gelu_pytorch_tanh"),
    "gpt2-scaled-by-layer": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt2-unscaled": GPT2Config(**GPT2, scale_attn_weights=False),
}
ADAPTED = {"neox": KINDS["neox"], "gpt2": KINDS["gpt2"]}


def some_tokens():
    rng = np.random.default_rng(1)
    return reference.padded([rng.integers(0, 97, length) for length in (40, 64, 23, 1)])


@pytest.fixture
def pair(request, tmp_path):
    """A model in torch, and as we read what it saves."""
    theirs = reference.random_model(request.param)
    theirs.save_pretrained(tmp_path / "model")
    return (theirs, *reference.ours_of(tmp_path / "model"))


of_every_kind = pytest.mark.parametrize("pair", KINDS.values(), ids=KINDS, indirect=True)
of_both = pytest.mark.parametrize("pair", ADAPTED.values(), ids=ADAPTED, indirect=True)


@of_every_kind
def test_logits_with_padding(pair):
    theirs, model, params = pair
    tokens, mask = some_tokens()
    ours, expected = reference.our_logits(model, params, {}, tokens), reference.torch_logits(theirs, tokens, mask)
    reference.assert_close(ours, expected, mask, TOLERANCE)


@of_both
def test_greedy_decoding_with_the_cache(pair):
    theirs, model, params = pair
    prompts = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in (5, 33, 20)]
    made = generate(model, params, {}, prompts, max_new_tokens=20, end_ids=(), pad_id=0)
    for prompt, ours in zip(prompts, made, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
        assert ours == expected[0, len(prompt) :].tolist()


def drawn(model, lora):
    """Random adapters, magnitudes too."""
    paths, rng = lora_module.target_modules(lora, model), np.random.default_rng(2)
    adapters = tiny_adapters(model, rank=lora.rank, targets=lora.targets)
    for factors in adapters.values():
        if lora.dora:
            factors["m"] = jnp.asarray(rng.uniform(0.5, 2.0, factors["b"].shape[-1]), jnp.float32)
    return {path: factors for path, factors in adapters.items() if path in paths}


def assert_same_logits(theirs, model, params, lora, adapters):
    tokens, mask = some_tokens()
    ours = reference.our_logits(model, params, lora_module.scaled(adapters, lora.scaling), tokens)
    assert np.abs(ours - reference.our_logits(model, params, {}, tokens)).max() > 0.1  # the adapters matter
    reference.assert_close(ours, reference.torch_logits(theirs, tokens, mask), mask, TOLERANCE)


@of_both
@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=3, alpha=1.5, targets=("*",)),
        Lora(rank=4, alpha=1, targets=("att*",), layers=(0, 2), rslora=True),
        Lora(rank=3, alpha=1.5, targets=("*",), dora=True),
    ],
    ids=["all", "attention", "dora"],
)
def test_peft_loads_what_we_write(pair, lora, tmp_path):
    theirs, model, params = pair
    adapters = drawn(model, lora)
    write_adapter(tmp_path / "adapter", adapters, lora, str(tmp_path / "model"), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out")  # where it does not fit the modules
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert sum(".lora_A." in name for name, _ in wrapped.named_parameters()) == len(adapters)
    assert_same_logits(wrapped, model, params, lora, adapters)
    assert same(read_adapter_for(tmp_path / "adapter", model)[1], adapters)
    # Merged into the weights, where their layout counts.
    assert_same_logits(wrapped.merge_and_unload(), model, params, lora, adapters)


def options_for(model):
    """Ways to name targets in peft: its own for the family, all, and some by name, end or pattern."""
    fused, output = {"gpt_neox": ("query_key_value", "dense"), "transformer": ("c_attn", "c_proj")}[
        naming_of(model).layers.split(".")[0]
    ]
    return {
        "own": {},
        "linear": {"target_modules": "all-linear"},
        "dora": {"target_modules": [fused], "use_dora": True},
        "layer": {"target_modules": [output], "layers_to_transform": [1], "use_rslora": True},
        "pattern": {"target_modules": rf".*\.1\..*\.({fused}|{output})"},
    }


@of_both
@pytest.mark.parametrize("way", ["own", "linear", "dora", "layer", "pattern"])
def test_we_load_what_peft_writes(pair, way, tmp_path):
    theirs, model, params = pair
    config = peft.LoraConfig(r=4, lora_alpha=1, task_type="CAUSAL_LM", **options_for(model)[way])
    wrapped = peft.get_peft_model(theirs, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    lora, adapters = read_adapter_for(tmp_path / "adapter", model)
    assert list(adapters) == list(lora_module.target_modules(lora, model))
    assert_same_logits(wrapped, model, params, lora, adapters)


# Files of other ages.


def test_the_original_files_of_gpt2_have_shorter_names_and_masks(tmp_path):
    theirs = reference.random_model(KINDS["gpt2"])
    theirs.transformer.save_pretrained(tmp_path)
    config, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    masks = {f"h.{layer}.attn.bias": np.tri(64, dtype=np.float32)[None, None] for layer in range(3)}
    tensors = load_file(path)
    assert "wte.weight" in tensors
    save_file(tensors | masks, path)
    tokens, mask = some_tokens()
    ours = reference.our_logits(*reference.ours_of(tmp_path), {}, tokens)
    reference.assert_close(ours, reference.torch_logits(theirs, tokens, mask), mask, TOLERANCE)


def test_old_files_of_pythia_have_older_fields_and_masks(tmp_path):
    theirs = reference.random_model(GPTNeoXConfig(**NEOX, rotary_pct=0.5, rotary_emb_base=500.0))
    theirs.save_pretrained(tmp_path)
    config, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    fields = json.loads(config.read_text()) | {"rotary_pct": 0.5, "rotary_emb_base": 500.0}
    config.write_text(json.dumps({name: value for name, value in fields.items() if name != "rope_parameters"}))
    extra = {}
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention"
        extra[f"{prefix}.bias"] = np.tri(64, dtype=np.float32)[None, None]
        extra[f"{prefix}.masked_bias"] = np.float32([-1e9])
        extra[f"{prefix}.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(load_file(path) | extra, path)
    tokens, mask = some_tokens()
    ours = reference.our_logits(*reference.ours_of(tmp_path), {}, tokens)
    reference.assert_close(ours, reference.torch_logits(theirs, tokens, mask), mask, TOLERANCE)
