"""Any optax optimiser by its name, and learning rates that change over local steps and over rounds."""

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import optax

from fedjax_llm.errors import UserError, nearest

_UNFIT = ("lbfgs", "noisy_sgd")
"""Optimisers that need more than a gradient: a line search over the loss, and a random key."""


@dataclass(frozen=True)
class Optimizer:
    """An optax optimiser.

    Attributes:
      name: of the function in optax: ``sgd``, ``adam``, ``adamw``, ``lion``, ``adafactor``, ...
      learning_rate: its base learning rate.
      options: its other numeric arguments, e.g. ``{"b2": 0.95, "weight_decay": 0.01}``.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    options: Mapping[str, float] = field(default_factory=dict)

    def make(self) -> optax.GradientTransformation:
        """The transformation. Equal optimisers give the same one, so that what is compiled for it serves them all.

        Raises:
          UserError: optax has no such optimiser, or it does not take an option (near names are listed).
        """
        known = optimizer_names()
        if self.name not in known:
            raise UserError(f"optimizer.name is {self.name!r}, which optax does not have{nearest(self.name, known)}")
        takes = [name for name in inspect.signature(getattr(optax, self.name)).parameters if name != "learning_rate"]
        for option in self.options:
            if option not in takes:
                raise UserError(f"optax.{self.name} takes no option {option!r}{nearest(option, takes)}")
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive and finite")
        return _made(self.name, self.learning_rate, tuple(sorted(self.options.items())))


@functools.lru_cache(maxsize=64)
def _made(name: str, learning_rate: float, options: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """The transformation, made once."""
    return getattr(optax, name)(learning_rate=learning_rate, **dict(options))


def optimizer_names() -> list[str]:
    """The optimisers of optax that need a gradient alone: its public functions that take a learning rate first."""
    names = []
    for name, value in vars(optax).items():
        if inspect.isfunction(value) and name not in _UNFIT and not name.startswith(("_", "scale", "make")):
            parameters = list(inspect.signature(value).parameters)
            if parameters and parameters[0] == "learning_rate":
                names.append(name)
    return names


@dataclass(frozen=True)
class Schedule:
    """How a learning rate changes from the first step to the last, as a factor of the base rate.

    Attributes:
      shape: of the decay after the warm-up.
      warmup: share of the steps in which the factor rises to 1.
      end: the factor that the decay heads for; it is reached after the last step, so that no step is lost at zero.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not 0 <= self.warmup < 1:
            raise UserError(f"a schedule's warmup is {self.warmup}; it is a share of the steps, in [0, 1)")
        if self.end < 0:
            raise UserError(f"a schedule's end is {self.end}; it must not be negative")

    def factor(self, step: int, steps: int) -> float:
        """The factor at ``step`` of ``steps``, counted from zero.

        Examples:
          >>> [Schedule("linear", warmup=0.25).factor(step, 8) for step in range(8)][:4]
          [0.5, 1.0, 1.0, 0.8333333333333334]
        """
        warm = self.warmup * steps
        if step + 1 < warm:
            return (step + 1) / warm
        if self.shape == "constant":
            return 1.0
        done = max((step - warm) / (steps - warm), 0.0)
        left = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.end + (1 - self.end) * left
