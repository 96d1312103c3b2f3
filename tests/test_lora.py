import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import same, tiny_adapters, tiny_model

from fedjax_llm import lora as lora_module
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Lora, init, merge, nbytes, scaled, size, target_modules
from fedjax_llm.models.causal_lm import module_paths


@pytest.fixture
def model():
    return tiny_model(layers=3)[0]


def paths(model, **fields) -> set[str]:
    return set(target_modules(Lora(rank=2, **fields), model))


def every_layer(*modules: str, layers=(0, 1, 2)) -> set[str]:
    return {f"layers.{layer}.{module}" for layer in layers for module in modules}


# Which modules.


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("q_proj",), {"self_attn.q_proj"}),
        (("self_attn.q_proj", "v_proj"), {"self_attn.q_proj", "self_attn.v_proj"}),
        (("mlp.*",), {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (("[qk]_proj",), {"self_attn.q_proj", "self_attn.k_proj"}),
        (("q_proj", "*.q_proj"), {"self_attn.q_proj"}),
    ],
)
def test_targets_by_name_path_and_pattern(model, targets, modules):
    assert paths(model, targets=targets) == every_layer(*modules)


def test_a_star_takes_everything_in_the_models_order(model):
    assert target_modules(Lora(rank=2, targets=("*",)), model) == module_paths(model)
    found = target_modules(Lora(rank=2, targets=("v_proj", "q_proj")), model)
    assert list(found) == [path for path in module_paths(model) if path in found]
    assert found["layers.0.self_attn.v_proj"] == (32, 16)


@pytest.mark.parametrize(
    ("layers", "numbers"), [((0, 2), (0, 2)), ((-1,), (2,)), ((-3, 0, 1), (0, 1)), ((), (0, 1, 2))]
)
def test_layers(model, layers, numbers):
    assert paths(model, targets=("o_proj",), layers=layers) == every_layer("self_attn.o_proj", layers=numbers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("q_proj", "up_prj")}, "'up_prj', which matches no module; did you mean .*'up_proj'"),
        ({"targets": ("layers.0.*",)}, "matches no module"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"layers": (0, 3)}, r"names \[3\], but the model has layers 0 to 2"),
        ({"layers": (-4,)}, r"names \[-4\]"),
        ({"rank": 17}, r"lora.rank is 17, .*\(16\)"),
    ],
)
def test_what_fits_no_model_is_refused(model, fields, message):
    with pytest.raises(UserError, match=message):
        target_modules(Lora(**fields), model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"dropout": -0.1}, "lora.dropout is -0.1"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Lora(**fields)


# The start.


def test_fresh_factors(model):
    lora = Lora(rank=4, targets=("q_proj", "down_proj"), dtype="bfloat16")
    adapters = init(jax.random.key(0), lora, model)
    assert list(adapters) == list(target_modules(lora, model))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.bfloat16)}
    factors = adapters["layers.2.mlp.down_proj"]
    assert (factors["a"].shape, factors["b"].shape) == ((48, 4), (4, 32))
    assert all(not np.any(factors["b"]) and np.all(factors["a"]) for factors in adapters.values())


@pytest.mark.parametrize(("kind", "deviation"), [("kaiming", 32**-0.5 / 3**0.5), ("gaussian", 1 / 8)])
def test_distribution_of_a(kind, deviation):
    model, _ = tiny_model(layers=40)
    adapters = init(jax.random.key(0), Lora(rank=8, targets=("q_proj",), init=kind), model)
    values = np.concatenate([np.ravel(factors["a"]) for factors in adapters.values()])  # 10 240 of them
    assert abs(values.mean()) < 4 * deviation / 100
    assert values.std() == pytest.approx(deviation, rel=0.03)
    kurtosis = np.mean((values / values.std()) ** 4)
    assert kurtosis == pytest.approx(1.8 if kind == "kaiming" else 3.0, abs=0.15)
    if kind == "kaiming":
        assert np.abs(values).max() <= 32**-0.5


def test_a_modules_start_depends_on_the_key_and_its_path_alone(model):
    few = init(jax.random.key(0), Lora(rank=4, targets=("v_proj",), layers=(1,)), model)
    many = init(jax.random.key(0), Lora(rank=4, targets=("*",)), model)
    path = "layers.1.self_attn.v_proj"
    assert same(few[path], many[path])
    assert not same(few, init(jax.random.key(1), Lora(rank=4, targets=("v_proj",), layers=(1,)), model))
    starts = [np.ravel(many[path]["a"]) for path in every_layer("self_attn.q_proj", "self_attn.k_proj")]
    assert len({start.tobytes() for start in starts}) == 6


# Which factors are trained.


def test_both_factors_are_trained_unless_one_is_frozen(model):
    adapters = tiny_adapters(model)
    trained, frozen = lora_module.split(adapters, "both")
    assert same(trained, adapters)
    assert frozen == {}
    assert same(lora_module.join(trained, frozen), adapters)


def test_with_a_frozen_what_is_trained_is_b_alone_and_join_brings_both_back(model):
    adapters = tiny_adapters(model)
    trained, frozen = lora_module.split(adapters, "b")
    assert {name for factors in trained.values() for name in factors} == {"b"}
    assert {name for factors in frozen.values() for name in factors} == {"a"}
    assert same(lora_module.join(trained, frozen), adapters)
    assert size(trained) + size(frozen) == size(adapters)


def test_every_clients_b_goes_with_the_one_a(model):
    clients = tiny_adapters(model, leading=(2,))
    trained, _ = lora_module.split(clients, "b")
    _, frozen = lora_module.split(tiny_adapters(model), "b")
    for path, factors in lora_module.join(trained, frozen).items():
        np.testing.assert_array_equal(factors["b"], clients[path]["b"])
        np.testing.assert_array_equal(factors["a"], frozen[path]["a"])


# Scaling and merging.


def test_scaled_folds_alpha_over_rank_into_b(model):
    adapters = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_adapters(model, leading=(2,)))
    found = scaled(adapters, Lora(rank=4, alpha=6).scaling)
    for path, factors in adapters.items():
        np.testing.assert_array_equal(found[path]["a"], factors["a"].astype(jnp.float32))
        np.testing.assert_array_equal(found[path]["b"], 1.5 * factors["b"].astype(jnp.float32))


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "head_norm": True, "window": 3}])
def test_merged_weights_give_the_adapted_logits(fields):
    model, params = tiny_model(**fields)
    before = jax.tree.map(np.asarray, params)
    adapters = tiny_adapters(model)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    with jax.default_matmul_precision("highest"):
        plain = model.hidden(params, {}, tokens)
        adapted = model.hidden(params, scaled(adapters, 2.0), tokens)
        merged = model.hidden(merge(params, adapters, 2.0), {}, tokens)
    np.testing.assert_allclose(merged, adapted, atol=2e-5)
    assert np.abs(plain - adapted).max() > 0.1
    assert same(params, before)


def test_merge_changes_the_adapted_kernels_alone_and_keeps_their_type():
    model, params = tiny_model()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapters = tiny_adapters(model, targets=("up_proj",))
    del adapters["layers.0.mlp.up_proj"]
    merged = merge(params, adapters, 0.5)
    factors = adapters["layers.1.mlp.up_proj"]
    kernel = params["layers"][1]["mlp"]["up_proj"]["kernel"].astype(jnp.float32)
    expected = (kernel + 0.5 * np.asarray(factors["a"]) @ np.asarray(factors["b"])).astype(jnp.bfloat16)
    found = merged["layers"][1]["mlp"]["up_proj"]["kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-3)
    merged["layers"][1]["mlp"]["up_proj"]["kernel"] = params["layers"][1]["mlp"]["up_proj"]["kernel"]
    assert same(merged, params)


def test_sizes(model):
    adapters = init(jax.random.key(0), Lora(rank=2, targets=("q_proj", "v_proj"), dtype="bfloat16"), model)
    assert size(adapters) == 3 * 2 * ((32 + 32) + (32 + 16))
    assert nbytes(adapters) == 2 * size(adapters)
    assert nbytes(jax.eval_shape(lambda: scaled(adapters, 1.0))) == 4 * lora_module.size(adapters)
