import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.models.activations import activate, check_activation

X = np.linspace(-6, 6, 101, dtype=np.float32)
TANH = [0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in X.tolist()]
EXPECTED = {
    "gelu": [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in X.tolist()],
    "gelu_new": TANH,
    "gelu_fast": TANH,
    "gelu_pytorch_tanh": TANH,
    "relu": [max(x, 0.0) for x in X.tolist()],
    "silu": [x / (1 + math.exp(-x)) for x in X.tolist()],
    "swish": [x / (1 + math.exp(-x)) for x in X.tolist()],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_those_of_the_formula(name):
    check_activation(name, "hidden_act")
    np.testing.assert_allclose(activate(name, jnp.asarray(X)), EXPECTED[name], atol=1e-6)


def test_the_two_formulas_of_gelu_differ():
    gap = np.abs(np.asarray(activate("gelu", jnp.asarray(X))) - np.asarray(activate("gelu_new", jnp.asarray(X))))
    assert 1e-4 < gap.max() < 1e-3


def test_the_type_stays():
    assert activate("gelu", jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_backward_pass_keeps_the_input_alone():
    _, backward = jax.vjp(lambda x: activate("gelu_new", x), jnp.asarray(X))
    assert [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size > 1] == [X.shape]


def test_others_are_refused_by_the_fields_name():
    with pytest.raises(UserError, match="hidden_act 'gelu_ned' is not supported; did you mean 'gelu_new'"):
        check_activation("gelu_ned", "hidden_act")
    with pytest.raises(UserError, match="act 'softsign' is not supported; known: gelu, "):
        check_activation("softsign", "act")
