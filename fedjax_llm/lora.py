"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): which weights get them, their start, their merge.

An adapted matrix computes ``x W + (alpha / R) (x a) b`` with ``a`` [in, R] and ``b`` [R, out]; ``b`` starts at zero, so
that fresh adapters change nothing.
"""

import fnmatch
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.models.causal_lm import CausalLM, module_paths
from fedjax_llm.models.quantised import dense
from fedjax_llm.types import Adapters, Factors, Params, PyTree


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
        ``pissa`` starts both factors from the R largest singular values of the weights, which leave the frozen weights
        (PiSSA, Meng et al. 2024, arXiv 2404.02948). The decomposition is computed once, at the server, so that all
        clients have the same factors (their signs are arbitrary).
      dtype: of the adapters.
      ranks: how many components the clients train, dealt out to the sites in turn; empty: all train ``rank``.
      train: ``both`` factors, or ``b`` alone, with ``a`` as it was drawn (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313):
        half as much travels, the clients' mean is exact, and noise enters linearly. With ``core``, a matrix ``c``
        [R, R] between frozen factors is trained alone (Fed-SB, Singhal et al. 2025, arXiv 2502.15436): the weights are
        changed by ``a c b``, R^2 numbers a module travel, and the mean is exact too. There ``a`` and ``b`` are random
        with orthonormal columns and rows, whatever ``init`` says, and ``c`` starts at zero; the paper takes all three
        from the singular value decomposition of the first step's gradient of the full weights.
      rslora: scale by alpha / sqrt(rank), which keeps the update's size whatever the rank (Kalajdzievski 2023, arXiv
        2312.03732).
      dora: train the norm of every output's weights apart from their direction (DoRA, Liu et al. 2024, arXiv
        2402.09353): a magnitude ``m`` [out] beside the factors. Clients' magnitudes are averaged like factors, which is
        not the mean of their weights.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    layers: tuple[int, ...] = ()
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: Literal["both", "b", "core"] = "both"
    ranks: tuple[int, ...] = ()
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1")
        if any(not 1 <= rank <= self.rank for rank in self.ranks):
            raise UserError(f"lora.ranks is {self.ranks}; each must be at least 1 and at most lora.rank, {self.rank}")
        if self.ranks and self.train != "both":
            raise UserError(
                f"lora.ranks is {self.ranks}, but lora.train is {self.train!r}: frozen factors are everybody's, "
                "of full rank; set lora.ranks to (), or lora.train to 'both'"
            )
        if self.init == "pissa" and self.ranks:
            raise UserError(
                "lora.init='pissa' takes all lora.rank components out of the weights, so that clients of lower "
                "lora.ranks would lack a part of the model; set lora.ranks to (), or lora.init to 'kaiming'"
            )
        if self.init == "pissa" and self.train == "core":
            raise UserError("lora.init='pissa' and lora.train='core' both say where the factors begin; choose one")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha is {self.alpha}; it must be positive")
        if self.dora and self.init == "pissa":
            raise UserError("lora.dora and lora.init='pissa' both say how the weights are taken apart; choose one")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


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
            names = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in within))
            near = nearest(pattern, known)
            raise UserError(f"lora.targets has {pattern!r}, which matches no module{near}; this model has {names}")
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


def init(key: Array, lora: Lora, model: CausalLM, params: Params | None = None) -> Adapters:
    """Fresh adapters: random ``a``, zero ``b``. Each module's ``a`` depends on the key and on its path alone.

    Args:
      key: typed.
      lora: what to make.
      model: to adapt.
      params: its weights, which ``pissa`` decomposes and whose column norms are DoRA's magnitudes.
    """
    adapters: Adapters = {}
    if lora.init == "pissa" or lora.dora:
        assert params is not None, "PiSSA and DoRA begin with the weights"
    for path, (fan_in, fan_out) in target_modules(lora, model).items():
        adapters[path] = {}
        if lora.dora:
            # In f32 whatever the type of the factors: rounding would change the model from the start.
            adapters[path]["m"] = column_norms(kernel_of(params, path))
        if lora.init == "pissa":
            adapters[path] |= _principal(kernel_of(params, path), lora)
            continue
        if lora.train == "core":
            ends = {"a": drawn(key, path, (fan_in, lora.rank)), "b": drawn(key, f"{path} b", (fan_out, lora.rank)).T}
            core = {"c": jnp.zeros((lora.rank, lora.rank), lora.dtype)}
            adapters[path] |= {name: leaf.astype(lora.dtype) for name, leaf in _cored(ends).items()} | core
            continue
        a = drawn(key, path, (fan_in, lora.rank), lora.init)
        adapters[path] |= {"a": a.astype(lora.dtype), "b": jnp.zeros((lora.rank, fan_out), lora.dtype)}
    return adapters


def drawn(key: Array, name: str, shape: tuple[int, ...], kind: str = "gaussian") -> Array:
    """A random factor ``a`` [in, R] in f32, which depends on the key and on the name alone.

    Args:
      key: typed.
      name: of the module.
      shape: (in, R).
      kind: ``kaiming`` is uniform within 1 / sqrt(in), ``gaussian`` has deviation 1 / R.
    """
    own = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if kind == "kaiming":
        bound = shape[0] ** -0.5
        return jax.random.uniform(own, shape, jnp.float32, -bound, bound)
    return jax.random.normal(own, shape, jnp.float32) / shape[1]


def cored(adapters: Adapters) -> Adapters:
    """The same products as ``a c b``: orthonormal columns ``a`` and rows ``b``, with a core ``c`` [R, R] between."""
    return {path: factors | _cored(factors) for path, factors in adapters.items()}


def _cored(factors: Factors) -> Factors:
    left, left_core = jnp.linalg.qr(factors["a"].astype(jnp.float32))
    right, right_core = jnp.linalg.qr(factors["b"].astype(jnp.float32).T)
    core = jnp.matmul(left_core, right_core.T, precision=jax.lax.Precision.HIGHEST)
    return {"a": left, "b": right.T, "c": core}


def _principal(kernel: Array, lora: Lora) -> Factors:
    """Factors whose scaled product is the best approximation of rank R of a kernel (PiSSA, equations 2 and 3)."""
    left, values, right = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    # Signs are arbitrary, and another machine's library may take others: the largest entry of a column is positive.
    sign = np.sign(np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0))[0]
    left, right = left * sign, sign[:, None] * right
    root = np.sqrt(values[: lora.rank] / lora.scaling)
    a, b = left[:, : lora.rank] * root, root[:, None] * right[: lora.rank]
    return {"a": jnp.asarray(a, lora.dtype), "b": jnp.asarray(b, lora.dtype)}


def remainder(adapters: Adapters, lora: Lora) -> dict[str, Array]:
    """What fresh adapters take out of the frozen weights, [in, out] by module, negative: nothing but with PiSSA."""
    if lora.init != "pissa":
        return {}
    return {path: -lora.scaling * product for path, product in products(adapters).items()}


def silent(adapters: Adapters, params: Params) -> Adapters:
    """Adapters of the same shapes with which the model is the base model."""
    zeros = jax.tree.map(jnp.zeros_like, whole(adapters))
    for path, factors in zeros.items():
        if "m" in factors:
            factors["m"] = column_norms(kernel_of(params, path))
    return zeros


def kernel_of(params: Params, path: str) -> Array:
    """The frozen weights [in, out] of a module ``layers.N.module``."""
    _, layer, within = path.split(".", 2)
    tree = params["layers"][int(layer)]
    for name in within.split("."):
        tree = tree[name]
    return dense(tree["kernel"])


def factored(change: Mapping[str, Array], lora: Lora) -> tuple[Lora, Adapters]:
    """Changes of the weights [in, out] as adapters of the least common rank that holds them, to rounding.

    Args:
      change: by module, with all scalings in it.
      lora: whose scaling the new adapters keep.

    Returns:
      What they are made with, of that rank, and the factors.
    """
    parts = {path: np.linalg.svd(np.asarray(moved, np.float64), full_matrices=False) for path, moved in change.items()}
    largest = max(values[0] for _, values, _ in parts.values())
    rank = max(1, *(int(np.sum(values > 1e-7 * largest)) for _, values, _ in parts.values()))
    found = {}
    for path, (left, values, right) in parts.items():
        root = np.zeros(rank)
        kept = min(rank, len(values))
        root[:kept] = np.sqrt(values[:kept] / lora.scaling)
        a, b = np.zeros((left.shape[0], rank)), np.zeros((rank, right.shape[1]))
        a[:, :kept], b[:kept] = left[:, :kept], right[:kept]
        found[path] = {"a": jnp.asarray(a * root, jnp.float32), "b": jnp.asarray(root[:, None] * b, jnp.float32)}
    return replace(lora, rank=rank, ranks=(), rslora=False, alpha=lora.scaling * rank, init="kaiming"), found


def column_norms(kernel: Array) -> Array:
    """[in, out] -> [out] in f32: the norm of each output's weights."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0))


def partition(adapters: Adapters, holds: Callable[[str, str], bool] | None) -> tuple[Adapters, Adapters]:
    """The factors for which ``holds(module, factor)``, and the others; ``None`` holds for none."""

    def those(wanted: bool) -> Adapters:
        found = {
            path: {name: leaf for name, leaf in own.items() if (holds is not None and holds(path, name)) is wanted}
            for path, own in adapters.items()
        }
        return {path: factors for path, factors in found.items() if factors}

    return those(True), those(False)


def split(adapters: Adapters, train: Literal["both", "b", "core"]) -> tuple[Adapters, Adapters]:
    """The factors that are trained, and those that stay as they are."""
    trained = {"both": ("a", "b", "m"), "b": ("b", "m"), "core": ("c", "m")}[train]
    return partition(adapters, lambda path, name: name in trained)


def join(one: Adapters, other: Adapters) -> Adapters:
    """The factors of both: the inverse of :func:`partition`. One may have leading axes that the other lacks."""
    paths = dict.fromkeys((*one, *other))
    return {path: {**other.get(path, {}), **one.get(path, {})} for path in paths}


def rank_of(adapters: Adapters) -> int:
    """R, of whole adapters."""
    return next(iter(adapters.values()))["a"].shape[-1]


def whole(adapters: Adapters) -> Adapters:
    """Factors ``a`` and ``b`` (and magnitudes): a core ``c`` [.., R, R] between them (Fed-SB) goes into ``b``."""
    exact, found = jax.lax.Precision.HIGHEST, {}
    for path, factors in adapters.items():
        b = factors["b"]
        if "c" in factors:
            b = jnp.matmul(factors["c"].astype(jnp.float32), b.astype(jnp.float32), precision=exact)
        found[path] = {name: factors[name] for name in ("a", "m") if name in factors} | {"b": b}
    return found


def scaled(adapters: Adapters, scaling: float) -> Adapters:
    """The factors as the model takes them: f32, with the scaling folded into ``b``."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), whole(adapters))
    return {path: {**factors, "b": factors["b"] * scaling} for path, factors in wide.items()}


def merge(params: Params, adapters: Adapters, scaling: float) -> Params:
    """Weights with the adapters merged in: ``W + s a b``, its columns at the magnitudes, if there are. A copy."""
    change = {}
    for path, factors in scaled(adapters, scaling).items():
        change[path] = factors["a"] @ factors["b"]
        if "m" in factors:
            kernel = kernel_of(params, path).astype(jnp.float32)
            moved = kernel + change[path]
            change[path] = moved * (factors["m"] / column_norms(moved)) - kernel
    return add(params, change)


def _with_kernel(tree: Mapping[str, PyTree], path: list[str], change: Array) -> PyTree:
    """A copy of a layer's tree in which the kernel at ``path`` has ``change`` added."""
    if not path:
        kernel = dense(tree["kernel"])
        return {**tree, "kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
    return {**tree, path[0]: _with_kernel(tree[path[0]], path[1:], change)}


def masked(adapters: Adapters, live: Mapping[str, Array]) -> Adapters:
    """Every factor times the number that ``live`` holds for its name, 0 or 1."""
    return {
        path: {name: leaf * live[name].astype(leaf.dtype) if name in live else leaf for name, leaf in factors.items()}
        for path, factors in adapters.items()
    }


def truncated(adapters: Adapters, rank: Array) -> Adapters:
    """The first ``rank`` components of factors of rank R; the others are zero, where no gradient moves them."""

    def cut(name: str, leaf: Array) -> Array:
        if name not in ("a", "b"):
            return leaf
        axis = -1 if name == "a" else -2
        kept = jnp.arange(leaf.shape[axis]) < rank
        return jnp.where(kept if axis == -1 else kept[:, None], leaf, 0)

    return {path: {name: cut(name, leaf) for name, leaf in factors.items()} for path, factors in adapters.items()}


def products(adapters: Adapters) -> dict[str, Array]:
    """Module -> ``a b`` [..., in, out] in full f32, without the scaling.

    Examples:
      >>> print(products({"up_proj": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[3.0, 4.0]])}})["up_proj"])
      [[3. 4.]
       [6. 8.]]
    """
    exact = jax.lax.Precision.HIGHEST
    return {
        path: jnp.matmul(factors["a"].astype(jnp.float32), factors["b"].astype(jnp.float32), precision=exact)
        for path, factors in whole(adapters).items()
    }


def add(params: Params, change: Mapping[str, Array]) -> Params:
    """Weights with ``change`` [in, out] added to the kernels of the named modules. The input is left as it is.

    Kernels that are quantised are dequantised for it, and stay so: rounding them again would lose small changes.
    """
    layers = list(params["layers"])
    for path, added in change.items():
        _, layer, within = path.split(".", 2)
        layers[int(layer)] = _with_kernel(layers[int(layer)], within.split("."), added)
    return params | {"layers": tuple(layers)}


def size(adapters: PyTree) -> int:
    """How many numbers the adapters hold.

    Examples:
      >>> size({"layers.0.mlp.up_proj": {"a": jnp.zeros((32, 4)), "b": jnp.zeros((4, 48))}})
      320
    """
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapters))


def nbytes(adapters: PyTree) -> int:
    """How many bytes the adapters take on the wire, uncompressed."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(adapters))
