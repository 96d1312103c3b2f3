"""Noise that is correlated over steps, so that it partly cancels in the model: DP-FTRL by matrix factorisation.

The model after step t is a prefix sum of what the steps released. With A the matrix of prefix sums, C lower-triangular
Toeplitz and z independent normals, releasing ``x + C^-1 z`` is as private as releasing ``C x + z``, whose sensitivity
is the largest ``||C u||`` over the steps u that one unit may take part in. So the prefix sums get the noise
``A C^-1 z``, which for a good C is much less than independent noise for the same privacy, if units take part seldom
enough.

Strategies and their optimisation are those of jax-privacy: banded Toeplitz (Choquette-Choo et al. 2023, arXiv
2306.08153; McKenna 2024, arXiv 2405.15913) and buffered linear Toeplitz (McMahan, Xu, Zhang 2024, arXiv 2408.08868).
Its import takes seconds (scipy, chex), so it is made in the functions that need it: runs without it start at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import trees
from fedjax_llm.errors import UserError
from fedjax_llm.privacy.events import Event
from fedjax_llm.types import PyTree

_WORTH = 0.99  # what the error must fall below, as a share of that of independent noise, to be worth its state


class Correlation(NamedTuple):
    """A stream of correlated noise over at most ``steps`` steps.

    The independent normals that go into ``mix`` must have the standard deviation noise multiplier * clip norm *
    ``sensitivity``. The state is the memory of the stream: it goes into the checkpoint and is never begun anew within
    the ``steps``, or the noise of later releases no longer cancels that of earlier ones.

    Attributes:
      steps: T, for which the sensitivity holds; going on for longer would void it.
      coefficients: f64 [T], the first column of C.
      sensitivity: the largest norm of C u, if each contribution of a unit has norm at most 1. With ``cyclic`` sampling
        that of one participation, as the event counts the participations.
      error: root mean square error of the prefix sums at noise multiplier 1 and clip norm 1.
      independent: the same of independent noise, for the same participations.
      cyclic: how many groups the units are divided into, each unit independently of all others (or adding one would
        move them), step i sampling from group i mod ``cyclic``; 1: any sampling with the promised participations.
      init: ``init(template) -> state``: float32 leaves [bands - 1 or buffers, ...] for leaves [...]. Under ``vmap`` the
        state gets a leading client axis.
      mix: ``mix(normals, state) -> (noise, state)``: the next step of C^-1 z, in float32; pure, so it may be jitted,
        scanned, and mapped over clients.
    """

    steps: int
    coefficients: np.ndarray
    sensitivity: float
    error: float
    independent: float
    cyclic: int
    init: Callable[[PyTree], PyTree]
    mix: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

    def event(self, noise_multiplier: float, sampling_probability: float, steps: int) -> Event:
        """What ``steps`` of the steps release.

        Args:
          noise_multiplier: of the independent normals, over clip norm and ``sensitivity``.
          sampling_probability: with which a unit is drawn when it is the turn of its group. Without ``cyclic`` groups
            sampling does not count: the steps together are one release, charged in full.
          steps: how many; at most ``self.steps`` over the run.

        Raises:
          UserError: for a probability outside (0, 1], or more steps than the noise was made for.
        """
        if not 0 < sampling_probability <= 1:
            raise UserError(
                f"a unit would take part with probability {sampling_probability:.4g} when it is its group's turn; it "
                f"must be in (0, 1]. Each of the {self.cyclic} groups holds about 1/{self.cyclic} of the units: take "
                "fewer bands or a smaller batch"
            )
        if not 1 <= steps <= self.steps:
            raise UserError(f"correlated noise made for {self.steps} steps cannot cover {steps}")
        if self.cyclic > 1:
            return Event("banded", noise_multiplier, sampling_probability, steps, self.cyclic)
        return Event("matrix", noise_multiplier, count=steps)


@dataclass(frozen=True)
class BandedToeplitz:
    """C has ``bands`` diagonals: noise cancels noise of up to ``bands - 1`` steps ago.

    Attributes:
      bands: at least 2 (1 is independent noise). The state holds ``bands - 1`` trees.
      amplified: units are divided into ``bands`` groups that take turns, and a step samples its group alone (Poisson);
        so a unit takes part at most once in ``bands`` steps, and sampling amplifies privacy. Otherwise the
        participations are as promised to :meth:`make`, and there is no amplification.
    """

    bands: int
    amplified: bool = True

    def __post_init__(self) -> None:
        """Refuses what is no correlation."""
        if self.bands < 2:
            raise UserError(f"bands is {self.bands}; correlated noise needs at least 2 (1 is independent noise)")

    def make(self, steps: int, min_separation: int, max_participations: int) -> Correlation:
        """The noise for one run.

        Args:
          steps: T, of the whole run.
          min_separation: least distance in steps between two participations of a unit (1: consecutive steps).
          max_participations: most steps that a unit takes part in. Neither matters to ``amplified`` noise.

        Raises:
          UserError: where independent noise does as well, with both errors; for more bands than steps.
        """
        _check(steps, min_separation, max_participations)
        if self.bands > steps:
            raise UserError(f"{self.bands} bands need at least as many steps; the run has {steps}")
        coefficients = np.asarray(_optimal_bands(steps, self.bands), np.float64)
        if self.amplified:  # the event counts participations, so compare one with one
            min_separation, max_participations = self.bands, 1

        def inverse() -> Any:
            from jax_privacy.matrix_factorization import toeplitz

            return toeplitz.inverse_as_streaming_matrix(jnp.asarray(coefficients, jnp.float32))

        cyclic = self.bands if self.amplified else 1
        name = f"banded Toeplitz noise with {self.bands} bands"
        return _correlation(name, steps, coefficients, min_separation, max_participations, cyclic, inverse)


@dataclass(frozen=True)
class BufferedToeplitz:
    """C's coefficients are a sum of ``buffers`` geometric series: noise cancels that of all earlier steps.

    Attributes:
      buffers: at most so many; fewer where more do not help. The state holds as many trees. Two serve up to hundreds
        of steps.
    """

    buffers: int = 2

    def __post_init__(self) -> None:
        """Refuses what is no correlation."""
        if self.buffers < 1:
            raise UserError(f"buffers is {self.buffers}; it must be at least 1")

    def make(self, steps: int, min_separation: int, max_participations: int) -> Correlation:
        """The noise for one run, optimised for its participations; no amplification by sampling.

        Args:
          steps: T, of the whole run.
          min_separation: least distance in steps between two participations of a unit (1: consecutive steps).
          max_participations: most steps that a unit takes part in.

        Raises:
          UserError: where independent noise does as well, with both errors.
        """
        _check(steps, min_separation, max_participations)
        decay, scale = _optimal_buffers(steps, self.buffers, min_separation, max_participations)
        powers = np.asarray(decay) ** np.arange(steps - 1)[:, None]
        coefficients = np.append(1.0, powers @ np.asarray(scale))

        def inverse() -> Any:
            from jax_privacy.matrix_factorization import buffered_toeplitz

            return buffered_toeplitz.BufferedToeplitz.build(decay, scale, jnp.float32).inverse_as_streaming_matrix()

        name = f"buffered Toeplitz noise with {self.buffers} buffers"
        return _correlation(name, steps, coefficients, min_separation, max_participations, 1, inverse)


def sensitivity(coefficients: np.ndarray, steps: int, min_separation: int, max_participations: int) -> float:
    """The largest norm of C u over all u that one unit's contributions of norm at most 1 can make.

    Args:
      coefficients: the leading entries of C's first column, not negative and not increasing.
      steps: T, the size of C.
      min_separation: least distance between two participations.
      max_participations: most participations.

    Source: Kalinin and Lampert 2024, arXiv 2405.13763, theorem 2, as jax-privacy has it.
    """
    from jax_privacy.matrix_factorization import toeplitz

    with jax.enable_x64():
        square = toeplitz.minsep_sensitivity_squared(
            jnp.asarray(coefficients, jnp.float64), min_separation, max_participations, steps
        )
        return float(np.sqrt(square))


def rmse(coefficients: np.ndarray, steps: int, min_separation: int = 1, max_participations: int = 1) -> float:
    """Root mean square error of the T prefix sums times sensitivity: what equal privacy costs; lower is better.

    Args:
      coefficients: the leading entries of C's first column; ``[1.0]`` is independent noise.
      steps: T.
      min_separation: least distance between two participations.
      max_participations: most participations.
    """
    from jax_privacy.matrix_factorization import toeplitz

    with jax.enable_x64():
        squares = toeplitz.per_query_error(strategy_coef=jnp.asarray(coefficients, jnp.float64), n=steps)
        error = float(np.sqrt(np.mean(np.asarray(squares))))
    return error * sensitivity(coefficients, steps, min_separation, max_participations)


def _check(steps: int, min_separation: int, max_participations: int) -> None:
    """Refuses impossible participations."""
    if steps < 2:
        raise UserError(f"noise over {steps} steps cannot be correlated; it takes at least 2")
    if min_separation < 1 or max_participations < 1:
        raise UserError(
            f"min_separation is {min_separation} and max_participations {max_participations}; both must be at least 1"
        )


def _correlation(
    name: str,
    steps: int,
    coefficients: np.ndarray,
    min_separation: int,
    max_participations: int,
    cyclic: int,
    inverse: Callable[[], Any],
) -> Correlation:
    """The streaming inverse of C with its sensitivity and error; refuses it where it brings nothing."""
    schema = (steps, min_separation, max_participations)
    error, independent = rmse(coefficients, *schema), rmse(np.ones(1), *schema)
    if not error < _WORTH * independent:
        raise UserError(
            f"{name} is no better than independent noise where a unit takes part up to {max_participations} times in "
            f"{steps} steps, {min_separation} or more apart: the expected error of the summed updates is {error:.4g}, "
            f"with independent noise {independent:.4g} (root mean square, at noise multiplier 1 and clip norm 1). Use "
            "independent noise, fewer bands, cohorts that take turns, or cyclic sampling (amplified)"
        )
    matrix = inverse()

    def init(template: PyTree) -> PyTree:
        return matrix.init_multiply(trees.zeros(template))

    def mix(normals: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        # Accelerators would round the factors of a product to 10 bits or fewer.
        with jax.default_matmul_precision("highest"):
            return matrix.multiply_next(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), normals), state)

    full = np.zeros(steps)
    full[: len(coefficients)] = coefficients
    return Correlation(steps, full, sensitivity(coefficients, *schema), error, independent, cyclic, init, mix)


@functools.cache
def _optimal_bands(steps: int, bands: int) -> tuple[float, ...]:
    """C's column, of norm 1, least in mean squared error; exact in float32, as ``mix`` uses it."""
    from jax_privacy.matrix_factorization import toeplitz

    with jax.enable_x64(), jax.default_device(_cpu()):
        found = np.asarray(toeplitz.optimize_banded_toeplitz(steps, bands))
    return tuple(found.astype(np.float32).astype(float).tolist())


@functools.cache
def _optimal_buffers(
    steps: int, buffers: int, min_separation: int, max_participations: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(decays, scales) least in mean squared error; exact in float32, as ``mix`` uses them."""
    from jax_privacy.matrix_factorization import buffered_toeplitz

    target = buffered_toeplitz.LossFn.build_min_sep(
        n=steps, error="mean", min_sep=min_separation, max_participations=max_participations
    )
    for count in range(buffers, 0, -1):
        try:
            with jax.enable_x64(), jax.default_device(_cpu()):
                found, _ = buffered_toeplitz.optimize_loss(target, count, callback=_Settled())
        except RuntimeError:  # two buffers became one, which the optimiser cannot invert: fewer will do
            continue
        narrow = (np.asarray(value).astype(np.float32).astype(float) for value in (found.buf_decay, found.output_scale))
        decay, scale = (tuple(value.tolist()) for value in narrow)
        return decay, scale
    raise UserError(
        f"no buffered Toeplitz noise was found for {steps} steps, {min_separation} or more apart, at most "
        f"{max_participations} of a unit; use BandedToeplitz(bands={max(2, min(min_separation, 16))}, amplified=False)"
    )


class _Settled:
    """Tells the optimiser to stop once 20 steps have lowered the loss by less than a millionth."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def __call__(self, progress: Any) -> bool:
        self.losses.append(float(progress.loss))
        return len(self.losses) > 20 and self.losses[-21] - self.losses[-1] < 1e-6 * self.losses[-1]


def _cpu() -> jax.Device:
    """Where strategies are optimised: in double precision, and alike on every machine."""
    return jax.local_devices(backend="cpu")[0]
