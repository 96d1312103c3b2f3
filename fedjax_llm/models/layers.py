"""Layers that the families share: projections with adapters, norms, rotary positions, grouped attention."""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from fedjax_llm.models.quantised import Quantised, dense, product


class Projection(nn.Module):
    """A frozen linear map ``x W (+ bias)``, plus ``(x a) b`` where the ``lora`` collection holds factors for it.

    ``W`` may be quantised; then all that follows is of the weights that its codes stand for. The factors are f32 [D, R]
    and [R, F], or [M, D, R] and [M, R, F] where every row has its own (a ``Factors`` of ``types.py`` with the scaling
    folded in). The low-rank path is computed in f32 whatever the base's type. With magnitudes ``m`` [F] or [M, F]
    (DoRA), every output is scaled so that its weights ``W + a b`` have that norm.
    """

    features: int
    use_bias: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, dropout_keys: Array | None = None) -> Array:
        """[M, L, D] -> [M, L, F]. ``dropout_keys`` [M] are given in training only."""
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Quantised):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = product(x, kernel)
        if self.has_variable("lora", "a"):
            low = x.astype(jnp.float32)
            if self.dropout and dropout_keys is not None:
                low = self._drop(low, dropout_keys)
            low = (low @ self.get_variable("lora", "a")) @ self.get_variable("lora", "b")
            y = y + low.astype(y.dtype)
        if self.has_variable("lora", "m"):
            y = (y * self._stretch(kernel)).astype(y.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        return y

    def _stretch(self, kernel: Array | Quantised) -> Array:
        """DoRA's factor of every output, [F] or [M, 1, F]: its magnitude over the norm of its weights ``W + a b``.

        The norm is a constant in the backward pass (Liu et al. 2024, equation 11), and never formed from ``a b``, which
        would take a matrix for every row.
        """
        a, b, magnitude = (self.get_variable("lora", name) for name in ("a", "b", "m"))
        wide = dense(kernel).astype(jnp.float32)
        across = jnp.einsum("df,...dr->...rf", wide, a)  # W' a, with which <W, a b> is a sum over R
        squared = jnp.sum(jnp.square(wide), axis=0) + 2 * jnp.sum(across * b, axis=-2)
        squared += jnp.sum((jnp.swapaxes(a, -1, -2) @ a @ b) * b, axis=-2)
        found = magnitude / jax.lax.stop_gradient(jnp.sqrt(squared))
        return found if found.ndim == 1 else found[:, None]

    def _drop(self, x: Array, keys: Array) -> Array:
        """Inverted dropout whose mask depends on the row's key alone, not on the rows or the padding beside it."""
        # The random bits of position (l, d) are a function of l * D + d: a longer bucket only appends to them.
        path = zlib.crc32("/".join(self.path).encode()) & 0x7FFFFFFF
        shape = x.shape[1:]
        keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, path), 1.0 - self.dropout, shape))(
            keys
        )
        return jnp.where(keep, x / (1.0 - self.dropout), 0.0)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, in f32 (Zhang and Sennrich 2019).

    Attributes:
      epsilon: added to the mean square.
      offset: added to the scale, which is then applied in f32; ``None``: the scale is applied after rounding.
    """

    epsilon: float
    offset: float | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D], in the type of ``x``."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        if self.offset is not None:
            return (wide * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale


class LayerNorm(nn.Module):
    """Normalisation of mean and variance over the last axis, in f32 (Ba et al. 2016, arXiv 1607.06450)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D], in the type of ``x``."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale + bias).astype(x.dtype)


class GatedMLP(nn.Module):
    """Gated linear unit (Shazeer 2020), with the modules' names of Llama.

    Attributes:
      width: of what comes in and goes out, D.
      mlp_width: between.
      gated: of gate and up.
      use_bias: of all three maps.
      dropout: of the adapters' inputs.
    """

    width: int
    mlp_width: int
    gated: Callable[[Array, Array], Array]
    use_bias: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, keys: Array | None) -> Array:
        """[M, L, D] -> [M, L, D]."""
        gate = Projection(self.mlp_width, self.use_bias, self.dropout, name="gate_proj")(x, keys)
        up = Projection(self.mlp_width, self.use_bias, self.dropout, name="up_proj")(x, keys)
        return Projection(self.width, self.use_bias, self.dropout, name="down_proj")(self.gated(gate, up), keys)


def remembered(
    cache: dict[str, Array] | None, key: Array, value: Array, at: Any
) -> tuple[Array, Array, dict[str, Array] | None]:
    """Keys and values [M, S, KV, hd] that queries may see, and the next cache.

    Args:
      cache: of what came before, ``{"key", "value"}``; ``None``: nothing did, and nothing is kept.
      key: [M, L, KV, hd], the new ones.
      value: as ``key``.
      at: how many slots of the cache are filled, a scalar; not read without a cache.
    """
    if cache is None:
        return key, value, None
    key = jax.lax.dynamic_update_slice_in_dim(cache["key"], key, at, axis=1)
    value = jax.lax.dynamic_update_slice_in_dim(cache["value"], value, at, axis=1)
    return key, value, {"key": key, "value": value}


def rotary_tables(positions: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosines and sines [..., L, hd/2] of ``positions`` [..., L] times ``frequencies`` [hd/2] (Su et al. 2021)."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Turns [M, L, H, hd] by ``tables`` [..., L, t/2], in the rotate-half layout: dimension i is paired with i + t/2.

    Dimensions from t on are left alone.
    """
    cos, sin = (table[..., None, :] for table in tables)
    if cos.ndim < x.ndim:  # positions shared by all rows
        cos, sin = cos[None], sin[None]
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], tables), x[..., turned:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_jvp
def softmax(scores: Array) -> Array:
    """Softmax over the last axis, whose derivative needs the weights alone; that of ``jax.nn`` keeps thrice as much."""
    return jax.nn.softmax(scores, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The weights w change by w (ds - <w, ds>) where the scores change by ds."""
    weights, (tangent,) = softmax(*primals), tangents
    return weights, weights * (tangent - jnp.sum(weights * tangent, axis=-1, keepdims=True))


@jax.custom_vjp
def vocabulary_logits(hidden: Array, table: Array) -> Array:
    """Logits [K, V] in f32 of hidden states [K, D] by a table [V, D].

    In the backward pass the gradient of the logits takes the table's type, so that a table of half the bits is never
    copied into f32, which would be the largest array of all.
    """
    return jnp.einsum("kd,vd->kv", hidden, table, preferred_element_type=jnp.float32)


def _vocabulary_forward(hidden: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return vocabulary_logits(hidden, table), (hidden, table)


def _vocabulary_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """With respect to both; where the table is frozen the compiler drops what nobody asks for."""
    hidden, table = kept
    narrow, wide = gradient.astype(table.dtype), {"preferred_element_type": jnp.float32}
    back = jnp.einsum("kv,vd->kd", narrow, table, **wide)
    return back.astype(hidden.dtype), jnp.einsum("kv,kd->vd", narrow, hidden, **wide).astype(table.dtype)


vocabulary_logits.defvjp(_vocabulary_forward, _vocabulary_backward)


def soft_capped(x: Array, cap: float) -> Array:
    """``x`` bent smoothly into (-cap, cap) (Gemma Team 2024, arXiv 2408.00118)."""
    return cap * jnp.tanh(x / cap)


def grouped_attention(
    query: Array, key: Array, value: Array, mask: Array, scale: float | None = None, cap: float | None = None
) -> Array:
    """Softmax attention with grouped queries (Ainslie et al. 2023).

    The queries that share a key head are folded into the rows of one product, which a CPU runs a quarter faster than
    one product a head.

    Args:
      query: [M, L, H, hd].
      key: [M, S, KV, hd], with H a multiple of KV.
      value: [M, S, KV, hd].
      mask: bool [M or 1, L, S]; every query sees at least one key.
      scale: what the products of queries and keys are multiplied by; 1 / sqrt(hd) if not given.
      cap: bound of the scores (:func:`soft_capped`).

    Returns:
      [M, L, H * hd].
    """
    rows, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    folded = query.reshape(rows, length, key.shape[2], groups, head_dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, key.shape[2], groups * length, head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    scores = jnp.einsum("mkqd,mskd->mkqs", folded, key, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        scores = soft_capped(scores, cap)
    scores = jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], scores, -1e30)
    weights = softmax(scores).astype(value.dtype)
    mixed = jnp.einsum("mkqs,mskd->mkqd", weights, value)
    mixed = mixed.reshape(rows, key.shape[2], groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, length, heads * head_dim)
