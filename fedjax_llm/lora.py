"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): which weights get them, their start, their merge.

An adapted matrix computes ``x W + (alpha / R) (x a) b`` with ``a`` [in, R] and ``b`` [R, out]; ``b`` starts at zero, so
that fresh adapters change nothing.
"""

import fnmatch
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.models.causal_lm import CausalLM, module_paths
from fedjax_llm.types import Adapters, Params, PyTree


@dataclass(frozen=True)
class Lora:
    """Which weights get adapters, and of what kind.

    Attributes:
      rank: R, the width of the bottleneck.
      alpha: the update is scaled by alpha / rank.
      targets: names of modules (``q_proj``), their paths in a layer (``self_attn.q_proj``), or shell patterns over
        either (``mlp.*``, ``*_proj``).
      layers: numbers of the layers that get adapters; negative ones count from the end; empty: all.
      dropout: probability of dropping a component of the adapter's input in training.
      init: of ``a``: ``kaiming`` is uniform within 1 / sqrt(in) (PEFT's default), ``gaussian`` has deviation 1 / rank.
      dtype: of the adapters.
      ranks: how many components the clients train, dealt out to the sites in turn; empty: all train ``rank``.
      train: ``both`` factors, or ``b`` alone, with ``a`` as it was drawn (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313):
        half as much travels, the clients' mean is exact, and noise enters linearly.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    layers: tuple[int, ...] = ()
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: Literal["both", "b"] = "both"
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1")
        if any(not 1 <= rank <= self.rank for rank in self.ranks):
            raise UserError(f"lora.ranks is {self.ranks}; each must be at least 1 and at most lora.rank, {self.rank}")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha is {self.alpha}; it must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by: alpha / rank."""
        return self.alpha / self.rank


def target_modules(lora: Lora, model: CausalLM) -> dict[str, tuple[int, int]]:
    """The adapted modules, ``layers.N.module`` -> (in, out).

    Raises:
      UserError: a pattern matches nothing (near names are listed), a layer does not exist, or the rank is larger than
        a side of a matrix.
    """
    count = model.config.layers
    outside = [layer for layer in lora.layers if not -count <= layer < count]
    if outside:
        raise UserError(f"lora.layers names {outside}, but the model has layers 0 to {count - 1}")
    chosen = {layer % count for layer in lora.layers} or set(range(count))
    found: dict[str, tuple[int, int]] = {}
    for pattern in lora.targets:
        matched = {path: size for path, size in module_paths(model).items() if _matches(pattern, path)}
        if not matched:
            within = model.family.projections(model.config)
            known = {path.rsplit(".", 1)[-1] for path in within} | set(within)
            raise UserError(f"lora.targets has {pattern!r}, which matches no module{nearest(pattern, known)}")
        found |= {path: size for path, size in matched.items() if int(path.split(".")[1]) in chosen}
    if not found:
        raise UserError("lora.targets is empty: no module would get an adapter")
    narrow = min(min(size) for size in found.values())
    if lora.rank > narrow:
        raise UserError(f"lora.rank is {lora.rank}, more than the narrowest adapted matrix has ({narrow})")
    return {path: found[path] for path in module_paths(model) if path in found}


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern fits a module's name or its path within the layer."""
    within = path.split(".", 2)[2]
    return fnmatch.fnmatchcase(within, pattern) or fnmatch.fnmatchcase(within.rsplit(".", 1)[-1], pattern)


def init(key: Array, lora: Lora, model: CausalLM) -> Adapters:
    """Fresh adapters: random ``a``, zero ``b``. Each module's ``a`` depends on the key and on its path alone."""
    adapters = {}
    for path, (fan_in, fan_out) in target_modules(lora, model).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        if lora.init == "kaiming":
            bound = fan_in**-0.5
            a = jax.random.uniform(own, (fan_in, lora.rank), jnp.float32, -bound, bound)
        else:
            a = jax.random.normal(own, (fan_in, lora.rank), jnp.float32) / lora.rank
        adapters[path] = {"a": a.astype(lora.dtype), "b": jnp.zeros((lora.rank, fan_out), lora.dtype)}
    return adapters


def partition(adapters: Adapters, holds: Callable[[str, str], bool] | None) -> tuple[Adapters, Adapters]:
    """The factors for which ``holds(module, factor)``, and the others; ``None`` holds for none."""

    def those(wanted: bool) -> Adapters:
        found = {
            path: {name: leaf for name, leaf in own.items() if (holds is not None and holds(path, name)) is wanted}
            for path, own in adapters.items()
        }
        return {path: factors for path, factors in found.items() if factors}

    return those(True), those(False)


def split(adapters: Adapters, train: Literal["both", "b"]) -> tuple[Adapters, Adapters]:
    """The factors that are trained, and those that stay as they are."""
    return partition(adapters, lambda path, name: train == "both" or name == train)


def join(one: Adapters, other: Adapters) -> Adapters:
    """The factors of both: the inverse of :func:`partition`. One may have leading axes that the other lacks."""
    paths = dict.fromkeys((*one, *other))
    return {path: {**other.get(path, {}), **one.get(path, {})} for path in paths}


def rank_of(adapters: Adapters) -> int:
    """R, of whole adapters."""
    return next(iter(adapters.values()))["a"].shape[-1]


def whole(adapters: Adapters) -> Adapters:
    """Factors ``a`` and ``b`` alone: a core ``c`` [.., R, R] between them (Fed-SB) is multiplied into ``b``."""
    exact, found = jax.lax.Precision.HIGHEST, {}
    for path, factors in adapters.items():
        b = factors["b"]
        if "c" in factors:
            b = jnp.matmul(factors["c"].astype(jnp.float32), b.astype(jnp.float32), precision=exact)
        found[path] = {"a": factors["a"], "b": b}
    return found


def scaled(adapters: Adapters, scaling: float) -> Adapters:
    """The factors as the model takes them: f32, with alpha / rank folded into ``b``."""
    return {
        path: {"a": factors["a"].astype(jnp.float32), "b": factors["b"].astype(jnp.float32) * scaling}
        for path, factors in whole(adapters).items()
    }


def merge(params: Params, adapters: Adapters, scaling: float) -> Params:
    """Weights with the adapters added in: ``W + (alpha / R) a b``. The input is left as it is."""
    return add(params, {path: factors["a"] @ factors["b"] for path, factors in scaled(adapters, scaling).items()})


def _with_kernel(tree: Mapping[str, PyTree], path: list[str], change: Array) -> PyTree:
    """A copy of a layer's tree in which the kernel at ``path`` has ``change`` added."""
    if not path:
        kernel = tree["kernel"]
        return {**tree, "kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
    return {**tree, path[0]: _with_kernel(tree[path[0]], path[1:], change)}


def masked(adapters: Adapters, live: Mapping[str, Array]) -> Adapters:
    """Every factor times the number that ``live`` holds for its name, 0 or 1."""
    return {
        path: {name: leaf * live[name].astype(leaf.dtype) for name, leaf in factors.items()}
        for path, factors in adapters.items()
    }


def truncated(adapters: Adapters, rank: Array) -> Adapters:
    """The first ``rank`` components of factors of rank R; the others are zero, where no gradient moves them."""

    def cut(name: str, leaf: Array) -> Array:
        axis = {"a": -1, "b": -2}[name]
        kept = jnp.arange(leaf.shape[axis]) < rank
        return jnp.where(kept if axis == -1 else kept[:, None], leaf, 0)

    return {path: {name: cut(name, leaf) for name, leaf in factors.items()} for path, factors in adapters.items()}


def products(adapters: Adapters) -> dict[str, Array]:
    """Module -> ``a b`` [..., in, out] in full f32, without the scaling."""
    exact = jax.lax.Precision.HIGHEST
    return {
        path: jnp.matmul(factors["a"].astype(jnp.float32), factors["b"].astype(jnp.float32), precision=exact)
        for path, factors in whole(adapters).items()
    }


def add(params: Params, change: Mapping[str, Array]) -> Params:
    """Weights with ``change`` [in, out] added to the kernels of the named modules. The input is left as it is."""
    layers = list(params["layers"])
    for path, added in change.items():
        _, layer, within = path.split(".", 2)
        layers[int(layer)] = _with_kernel(layers[int(layer)], within.split("."), added)
    return params | {"layers": tuple(layers)}


def size(adapters: PyTree) -> int:
    """How many numbers the adapters hold."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapters))


def nbytes(adapters: PyTree) -> int:
    """How many bytes the adapters take on the wire, uncompressed."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(adapters))
