"""The mean of vectors under distributed noise, against the central Gaussian at the same epsilon, over bits a value.

    python -m experiments.mean_estimation --plot mean_estimation.png
    python -m experiments.mean_estimation --clients 1000 --values 4096 --json

Every client holds a random vector of norm 1, its clip norm. All are in the sum, nothing is sampled, and none drops out,
so that the noise is exactly what the guarantee needs. ``ratio`` is the mean squared error over that of the Gaussian at
the same epsilon by the same accounting (Renyi divergences), with a 95% interval over repeats; at few bits sums wrap
around and it soars. ``against_exact`` sets the same error against a Gaussian that is accounted for exactly, which is
possible for it alone: the difference between the two is what Renyi accounting gives away.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.privacy import calibration, discrete_noise, shares
from fedjax_llm.privacy.accounting import Accountant
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.mechanism import Shares
from fedjax_llm.secure import encoding

Kind = Literal["skellam", "discrete gaussian"]
TARGET = "at most 1.05 at 16 bits"


@dataclass(frozen=True)
class MeanEstimation:
    """Vectors of norm 1 at the clients of one sum.

    Attributes:
      clients: n.
      values: d.
      epsilons: of the guarantee.
      delta: of it.
      bits: modulus widths, 8 to 32.
      repeats: of each estimate.
      seed: of vectors and noise.
      json: print JSON lines rather than a table.
      plot: draw the ratios into this file.
    """

    clients: int = 100
    values: int = 1024
    epsilons: tuple[float, ...] = (1.0, 4.0, 8.0)
    delta: float = 1e-5
    bits: tuple[int, ...] = (10, 12, 14, 16, 18, 20)
    repeats: int = 40
    seed: int = 0
    json: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.clients < 1 or self.values < 1 or self.repeats < 2 or not all(8 <= b <= 32 for b in self.bits):
            raise UserError("clients and values must be at least 1, repeats at least 2, and bits from 8 to 32")


class Noise(NamedTuple):
    """A kind of shares for any number of bits (``shares.Noise``); the mechanisms' own have 16 or 32."""

    kind: Kind
    bits: int
    tail: float = 6.0
    beta: float = math.exp(-0.5)

    def draw(self, stddev: float) -> Callable[[bytes, int], np.ndarray]:
        """See ``shares.Noise``."""
        if self.kind == "skellam":
            return lambda key, size: discrete_noise.skellam(key, stddev**2, size)
        return lambda key, size: discrete_noise.discrete_gaussian(key, stddev, size)


@dataclass
class Case:
    """A point of the plot: the ratio with its interval."""

    kind: Kind
    epsilon: float
    bits: int
    noise_multiplier: float
    central_noise_multiplier: float
    exact_noise_multiplier: float
    ratios: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """As one JSON object."""
        mean, half = np.mean(self.ratios), 1.96 * np.std(self.ratios, ddof=1) / math.sqrt(len(self.ratios))
        case = f"{self.kind}/epsilon {self.epsilon:g}/{self.bits} bits"
        found = {"case": case, "ratio": mean, "low": mean - half, "high": mean + half}
        rounded = {name: value if isinstance(value, str) else round(float(value), 4) for name, value in found.items()}
        central, exact = self.central_noise_multiplier, self.exact_noise_multiplier
        noises = {
            "against_exact": round(float(mean) * (central / exact) ** 2, 4),
            "noise_multiplier": self.noise_multiplier,
            "central_noise_multiplier": central,
            "exact_noise_multiplier": exact,
        }
        return rounded | noises | ({"target": TARGET} if self.bits == 16 else {})


def cases(asked: MeanEstimation) -> Iterator[Case]:
    """One case for each kind, epsilon and number of bits; those that no integers fit are left out."""
    rng = np.random.default_rng(asked.seed)
    vectors = rng.normal(size=(asked.clients, asked.values))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    length = encoding.encoded_length(asked.values)
    messages = shares.Messages(length, 1.0, asked.clients, asked.clients, asked.clients, conditional=True)
    for epsilon in asked.epsilons:

        def calibrated(template: Event, epsilon: float = epsilon, accountant: Accountant = "rdp") -> float:
            return calibration.noise_multipliers([template], epsilon, asked.delta, accountant)[0]

        central, exact = (calibrated(Event("gaussian", 1.0), accountant=accountant) for accountant in ("rdp", "pld"))
        for kind in ("discrete gaussian", "skellam"):
            for bits in asked.bits:
                try:
                    how, event = shares.fit(Noise(kind, bits), messages, calibrated)
                except UserError:
                    continue
                case = Case(kind, epsilon, bits, event.noise_multiplier, central, exact)
                # The Gaussian's error in expectation: central^2 a value of the sum.
                expected = asked.values * central**2 / asked.clients**2
                for repeat in range(asked.repeats):
                    case.ratios.append(squared_error(vectors, how, rng, repeat) / expected)
                yield case


def squared_error(vectors: np.ndarray, how: Shares, rng: np.random.Generator, repeat: int) -> float:
    """Of one estimate of the mean.

    Args:
      vectors: f64 [n, d], of norm 1.
      how: they become integers.
      rng: of all keys.
      repeat: number of the estimate.
    """
    rotation, total = rng.bytes(32), np.zeros(encoding.encoded_length(vectors.shape[1]), np.int64)
    for vector in vectors:
        keys = {"noise_key": rng.bytes(32), "rounding_key": rng.bytes(32), "rotation_key": rotation}
        total += encoding.encode(vector, how, **keys)
    summed = (total & ((1 << how.bits) - 1)).astype("<u4")
    found = encoding.decode(summed, how, rotation_key=rotation, values=vectors.shape[1]) / len(vectors)
    return float(np.sum((found - vectors.mean(axis=0)) ** 2))


def draw(found: Sequence[Case], path: Path) -> None:
    """The ratios over bits, a panel for each epsilon."""
    import matplotlib.pyplot as plt

    epsilons = sorted({case.epsilon for case in found})
    figure, axes = plt.subplots(
        1, len(epsilons), figsize=(3.6 * len(epsilons), 3.4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, epsilon in zip(axes[0], epsilons, strict=True):
        for kind, colour, name in (("discrete gaussian", "#8d877c", "DDGauss"), ("skellam", "#b23a18", "Skellam")):
            own = [case for case in found if case.epsilon == epsilon and case.kind == kind]
            axis.plot([c.bits for c in own], [np.mean(c.ratios) for c in own], "o-", color=colour, label=name)
        axis.axhline(1.05, color="#67625a", linewidth=0.8, linestyle="--")
        axis.set(yscale="log", xlabel="bits a value", title=f"epsilon {epsilon:g}")
        axis.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("squared error over the central Gaussian's")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table_of(asked: MeanEstimation, found: Sequence[Case]) -> Table:
    """A row for each epsilon and number of bits; ratios of both kinds with their intervals."""
    title = f"{asked.clients:,} clients, {asked.values:,} values, delta {asked.delta:g}: error over the Gaussian's"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("epsilon", "bits", "DDGauss", "Skellam", "Skellam against exact"):
        table.add_column(name, justify="right", no_wrap=True)
    for epsilon, bits in dict.fromkeys((case.epsilon, case.bits) for case in found):
        own = {case.kind: case.figures() for case in found if (case.epsilon, case.bits) == (epsilon, bits)}
        cells = [
            f"{figures['ratio']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]" if figures else "-"
            for figures in (own.get("discrete gaussian"), own.get("skellam"))
        ]
        exact = f"{own['skellam']['against_exact']:.3f}" if "skellam" in own else "-"
        table.add_row(f"{epsilon:g}", str(bits), *cells, exact)
    return table


def main() -> int:
    """Runs the command line; returns the exit status."""
    console = Console()
    try:
        asked = tyro.cli(MeanEstimation, prog="python -m experiments.mean_estimation", description=told(__doc__))
        total = len(asked.epsilons) * 2 * len(asked.bits)
        bar = Console(stderr=True)
        found = list(track(cases(asked), "Estimating", total, console=bar, transient=True))
        if asked.json:
            for case in found:
                print(json.dumps(case.figures()))
        else:
            console.print(table_of(asked, found))
        if asked.plot is not None:
            draw(found, asked.plot)
    except UserError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
