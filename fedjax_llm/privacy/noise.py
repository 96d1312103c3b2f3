"""Independent Gaussian noise for pytrees, and the keys that it is drawn with.

A key is used once: it is folded on or drawn with, never both, and no two draws of a run share one. Its path is

    run -> round -> attempt -> purpose -> site -> step -> leaf

where ``attempt`` counts how often a round was released with other noise before: a round that is run again after a kill
may meet other data, and noise drawn twice cancels in the difference of the two releases.

The generator is JAX's threefry with 64 bits of key, and normals are float32 by the inverse error function (none lies
beyond about 5.4 standard deviations). That is fit for research; production needs a cryptographic generator and
discrete noise (Mironov 2012, "On significance of the least significant bits for differential privacy").
"""

import hashlib
import secrets
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.types import PyTree

Randomness = Literal["reproducible", "secret"]
"""``reproducible``: noise is a function of the seed, for research; ``secret``: of entropy from the operating system."""


def gaussian(key: Array, template: PyTree, stddev: Array | float) -> PyTree:
    """Independent normals with the shapes of ``template``, always float32.

    A leaf's noise depends on the key and on the leaf's path and shape alone, so adding a module leaves that of the
    others as it is. Low precision would void the analysis: bfloat16 normals take some hundred values and end at 2.9
    standard deviations.

    Args:
      key: typed; used for nothing else.
      template: leaves with a shape [...], of any dtype; values are not read.
      stddev: of every element, a scalar (may be traced, and mapped over clients).

    Returns:
      a tree like ``template`` of float32 leaves.
    """
    leaves, structure = jax.tree.flatten_with_path(template)
    keys = _leaf_keys(key, [path for path, _ in leaves])
    scale = jnp.asarray(stddev, jnp.float32)
    shapes = [tuple(leaf.shape) for _, leaf in leaves]
    drawn: list[Array | None] = [None] * len(leaves)
    # One loop for all leaves of a shape: straight-line code would be compiled for each leaf anew, which takes longer
    # than compiling the model.
    for shape in dict.fromkeys(shapes):
        places = [place for place, other in enumerate(shapes) if other == shape]
        normals = jax.lax.map(
            lambda own, shape=shape: jax.random.normal(own, shape, jnp.float32), keys[np.array(places)]
        )
        for place, normal in zip(places, scale * normals, strict=True):
            drawn[place] = normal
    return jax.tree.unflatten(structure, drawn)


def run_key(randomness: Randomness, seed: int, run: str = "") -> Array:
    """The key that all noise of a run comes from; all 64 bits of it are filled.

    Args:
      randomness: ``reproducible``: a hash of the seed under a name of its own, so it shares no bits with any other use
        of the seed; ``secret``: fresh from the operating system at each call, whatever the seed.
      seed: of the run. Who knows it knows the noise of a reproducible run.
      run: what else tells one run from another, such as a hash of its configuration and its data: runs of one seed that
        release other sums must not share their noise, which would cancel in the difference.

    Raises:
      UserError: for another ``randomness``.
    """
    if randomness == "secret":
        material = secrets.token_bytes(8)
    elif randomness == "reproducible":
        material = hashlib.sha256(f"fedjax_llm privacy noise, seed {seed} {run}".encode()).digest()[:8]
    else:
        raise UserError(f"randomness is {randomness!r}" + nearest(str(randomness), ("reproducible", "secret")))
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(material, "<u4")), impl="threefry2x32")


def round_noise_key(key: Array, round_number: Array | int, attempt: Array | int) -> Array:
    """The key of one attempt at a round.

    Args:
      key: of the run (:func:`run_key`).
      round_number: from 0.
      attempt: how often the round was begun before.
    """
    return jax.random.fold_in(jax.random.fold_in(key, round_number), attempt)


def site_noise_key(round_key: Array, client_id: Array | int) -> Array:
    """The key of a site in a round. ``client_id`` is stable and unique within the cohort."""
    return jax.random.fold_in(round_key, client_id)


def step_key(site_key: Array, step: Array | int) -> Array:
    """The key of a site's local step, from 0."""
    return jax.random.fold_in(site_key, step)


def _leaf_keys(key: Array, paths: list[tuple]) -> Array:
    """A key for each leaf; 64 bits of hash, as 32 would collide among some ten thousand leaves."""
    digests = [hashlib.sha256(jax.tree_util.keystr(path).encode()).digest()[:8] for path in paths]
    words = jnp.asarray(np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2))
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(key, words[:, 0]), words[:, 1])
