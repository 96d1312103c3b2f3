"""Reading GGUF files that the ``gguf`` package's writer wrote."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm import assets
from fedjax_llm.errors import UserError
from fedjax_llm.models.gguf_format import read_gguf, rotate_half_order

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 64, 4, 2, 16, 96, 40


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py, from its description."""
    half = weights.shape[0] // heads // 2
    order = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in range(2)]
    return weights[order]


def weights(layers: int = 2, **also: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face names; ``also`` adds tensors for layer 0 (dots written as two underscores)."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (WIDTH,)
        shapes[layer + "post_attention_layernorm.weight"] = (WIDTH,)
        shapes[layer + "self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, WIDTH)
        shapes[layer + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD_DIM, WIDTH)
        shapes[layer + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, WIDTH)
        shapes[layer + "self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD_DIM)
        shapes[layer + "mlp.gate_proj.weight"] = (FFN, WIDTH)
        shapes[layer + "mlp.up_proj.weight"] = (FFN, WIDTH)
        shapes[layer + "mlp.down_proj.weight"] = (WIDTH, FFN)
    for name, shape in also.items():
        shapes[name.replace("__", ".")] = shape
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """From Hugging Face's name to GGUF's, by the package's own table."""
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found
    return found


def write(path, tensors, architecture="llama", kind=Kind.F32, kinds=None, fields=None, extra=None):
    """Writes a GGUF file as llama.cpp's converter does. ``kinds``, ``fields``, ``extra``: for single tensors/keys."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    for key, value in (fields or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, data in tensors.items():
        if architecture == "llama" and "q_proj" in name:
            data = llama_cpp_permute(data, HEADS)
        if architecture == "llama" and "k_proj" in name:
            data = llama_cpp_permute(data, KV_HEADS)
        stored = Kind.F32 if data.ndim == 1 else (kinds or {}).get(name, kind)
        writer.add_tensor(gguf_name(name), gguf.quantize(data, stored), raw_dtype=stored)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_tensor_comes_back_under_its_own_name(tmp_path, architecture):
    also = {"lm_head__weight": (VOCAB, WIDTH)}
    if architecture != "qwen3":
        also |= {
            f"model__layers__0__self_attn__{p}_proj__bias": (HEAD_DIM * n,)
            for p, n in zip("qkv", [4, 2, 2], strict=True)
        }
    else:
        also |= {f"model__layers__0__self_attn__{p}_norm__weight": (HEAD_DIM,) for p in "qk"}
    expected = weights(**also)
    checkpoint = read_gguf(write(tmp_path / "m.gguf", expected, architecture))
    assert set(checkpoint.tensors) == set(expected)
    for name, value in checkpoint.tensors.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert value.dtype == np.float32
        assert checkpoint.tensors.shape(name) == value.shape
    assert checkpoint.config["attention_bias"] == (architecture != "qwen3")
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.config["model_type"] == architecture
    assert checkpoint.tokenizer is None


def interleaved_rope(x: np.ndarray, position: int) -> np.ndarray:
    """ggml's order: elements 2i and 2i + 1 of each head are one complex number."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * position * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rotate_half_rope(x: np.ndarray, position: int) -> np.ndarray:
    """Hugging Face's order: elements i and i + head_dim / 2 are one complex number."""
    pairs = x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]
    turned = pairs * np.exp(1j * position * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    return np.concatenate([turned.real, turned.imag], -1)


def test_rows_are_reordered_so_that_attention_scores_stay():
    rng = np.random.default_rng(1)
    rows_q, rows_k = rng.standard_normal((2, HEADS * HEAD_DIM, WIDTH))  # as they lie in a GGUF file
    x, y = rng.standard_normal((2, WIDTH))

    def heads(rows, v):
        return (rows @ v).reshape(HEADS, HEAD_DIM)

    in_file = interleaved_rope(heads(rows_q, x), 7) * interleaved_rope(heads(rows_k, y), 3)
    q, k = rotate_half_order(rows_q, HEADS), rotate_half_order(rows_k, HEADS)
    here = rotate_half_rope(heads(q, x), 7) * rotate_half_rope(heads(k, y), 3)
    np.testing.assert_allclose(here.sum(-1), in_file.sum(-1), rtol=1e-10)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), bias=st.booleans())
def test_row_order_is_the_converters_inverse(heads, half, bias):
    rows = np.arange(heads * half * 2.0)
    rows = rows if bias else rows[:, None] + np.zeros(3)
    np.testing.assert_array_equal(rotate_half_order(llama_cpp_permute(rows, heads), heads), rows)


@pytest.mark.parametrize(
    ("kind", "step"),
    [(Kind.F16, 1e-3), (Kind.BF16, 8e-3), (Kind.Q8_0, 1e-2), (Kind.Q5_1, 0.1), (Kind.Q4_1, 0.2), (Kind.Q4_0, 0.3)],
)
def test_quantised_tensors(tmp_path, kind, step):
    expected = weights()
    checkpoint = read_gguf(write(tmp_path / "m.gguf", expected, kind=kind))
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(checkpoint.tensors[name], value, atol=step * scale, err_msg=name)


def test_config(tmp_path):
    config = read_gguf(write(tmp_path / "m.gguf", weights())).config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == WIDTH
    assert config["intermediate_size"] == FFN
    assert config["num_hidden_layers"] == 2
    assert config["num_attention_heads"] == HEADS
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["head_dim"] == HEAD_DIM
    assert config["vocab_size"] == VOCAB
    assert config["rms_norm_eps"] == 1e-5  # exactly, though the file holds a float32
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == 128
    assert config["tie_word_embeddings"] is True
    assert "sliding_window" not in config


def test_config_of_other_heads_and_windows(tmp_path):
    fields = {"llama.attention.key_length": 32, "llama.attention.sliding_window": 64}
    config = read_gguf(write(tmp_path / "m.gguf", weights(), fields=fields)).config
    assert config["head_dim"] == 32
    assert config["sliding_window"] == 64


def test_rope_scaling(tmp_path):
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    path = write(tmp_path / "a.gguf", weights(), extra={"rope_freqs.weight": factors})
    checkpoint = read_gguf(path)
    assert checkpoint.config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert "rope_freqs.weight" not in checkpoint.tensors
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = read_gguf(write(tmp_path / "b.gguf", weights(), fields=fields)).config
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    old = read_gguf(write(tmp_path / "c.gguf", weights(), fields={"llama.rope.scale_linear": 2.0})).config
    assert old["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_fingerprint_follows_the_content(tmp_path):
    one = write(tmp_path / "one.gguf", weights())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(one.read_bytes())
    other = tmp_path / "other.gguf"
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert read_gguf(one).fingerprint == read_gguf(copy).fingerprint != read_gguf(other).fingerprint
    assert read_gguf(one, fingerprint="known").fingerprint == "known"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gemma2"}, r"architecture 'gemma2'; supported in GGUF files: llama, qwen2, qwen3"),
        ({"extra": {"blk.0.odd.weight": np.zeros(3, np.float32)}}, r"no llama model here knows: blk\.0\.odd\.weight"),
        ({"extra": {"blk.0.attn_sinks": np.zeros(3, np.float32)}}, r"knows: blk\.0\.attn_sinks"),
        ({"extra": {"odd.weight": np.zeros(3, np.int32)}}, r"'odd\.weight' .* has the type I32; supported: F32, F16"),
        ({"fields": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"fields": {"split.count": 3}}, "gguf-split --merge"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "rotates a part of each head"),
    ],
)
def test_what_is_not_served_is_named(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        read_gguf(write(tmp_path / "m.gguf", weights(), **arguments))


def test_missing_pieces_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_embedding_length(WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"lacks one value for llama\.attention\.head_count"):
        read_gguf(tmp_path / "m.gguf")
    tensors = weights()
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(UserError, match=r"lacks the tensor 'token_embd\.weight'"):
        read_gguf(write(tmp_path / "n.gguf", tensors))
    with pytest.raises(UserError, match="There is no file"):
        read_gguf(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", weights(1)).read_bytes()


@given(share=st.floats(0, 0.9999))
@settings(max_examples=50, deadline=None)
def test_truncated_files(tmp_path_factory, whole, share):
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="damaged or no GGUF file"):
        read_gguf(path)


@given(at=st.integers(0, 1500), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_damaged_headers_give_an_error_for_people_or_none(tmp_path_factory, whole, at, value):
    path = tmp_path_factory.mktemp("odd") / "m.gguf"
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    try:
        checkpoint = read_gguf(path)
    except UserError:
        return
    assert len(checkpoint.tensors) > 0


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.attention.head_count_kv"])
def test_a_model_without_heads_is_damaged(tmp_path, key):
    path = write(tmp_path / "m.gguf", weights(), fields={key: 0})
    with pytest.raises(UserError, match="no attention heads"):
        read_gguf(path)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "m.gguf").write_text("<html>Not found</html>")
    with pytest.raises(UserError, match="does not begin with GGUF"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.model
def test_the_real_model():
    path = assets.fetch(assets.SMOLLM2)
    checkpoint = read_gguf(path)
    assert checkpoint.config["num_hidden_layers"] == 30
    assert sum(np.prod(checkpoint.tensors.shape(name)) for name in checkpoint.tensors) == 134_515_008
    reader = gguf.GGUFReader(path)  # the package's own, slow one
    for stored in (stored for stored in reader.tensors if stored.name in ("blk.3.ffn_up.weight", "output_norm.weight")):
        name = {"blk.3.ffn_up.weight": "model.layers.3.mlp.up_proj.weight"}.get(stored.name, "model.norm.weight")
        expected = gguf.dequantize(stored.data, stored.tensor_type)
        np.testing.assert_array_equal(checkpoint.tensors[name], expected)
