"""Activations by the names that ``config.json`` gives them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.errors import UserError, nearest

_FUNCTIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""``gelu`` is exact, by the error function; the other three are one formula with tanh, rounded in different places."""


def check_activation(name: str, field: str) -> None:
    """Refuses a name that :func:`activate` does not know.

    Args:
      name: of the activation.
      field: of ``config.json`` that holds it.

    Raises:
      UserError: unknown.
    """
    if name not in _FUNCTIONS:
        raise UserError(f"{field} {name!r} is not supported{nearest(name, _FUNCTIONS)}")


def activate(name: str, x: Array) -> Array:
    """The activation called ``name`` of every number. The backward pass starts from ``x`` and keeps nothing else."""
    return jnp.asarray(jax.checkpoint(_FUNCTIONS[name])(x))
