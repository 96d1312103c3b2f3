"""What a run leaves behind, as a part of its configuration."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fedjax_llm.errors import UserError
from fedjax_llm.runs import tracking
from fedjax_llm.runs.keys import Encryption


@dataclass(frozen=True)
class Output:
    """What a run leaves behind.

    Attributes:
      keep_last: newest checkpoints that are kept.
      keep_best: checkpoints with the lowest held-out loss that are kept besides (where there is validation).
      select: which adapters are the result: those of the last round, or of the best validation.
      bandwidth_mbps: of a site's line, for the seconds that communication would take.
      aggregation_error: whether every round measures what averaging the factors loses (memory for two copies of the
        adapted matrices). Nobody sees what it takes under secure aggregation, where it is never measured.
      client_metrics: whether metrics hold every client's loss, tokens and update norm, and not only the cohort's;
        ``None``: unless aggregation is secure.
      encryption: where the key is with which the run's folder is encrypted; ``None``: all files are in clear.
      tracking: where metrics go besides: ``Wandb(project=...)``, ``MLflow()`` (``docs/tracking.md``), or your own
        (``runs/tracking.py``).
    """

    keep_last: int = 2
    keep_best: int = 1
    select: Literal["last", "best"] = "last"
    bandwidth_mbps: float = 20.0
    aggregation_error: bool = True
    client_metrics: bool | None = None
    encryption: Encryption | None = None
    tracking: tuple[Any, ...] = field(default=(), metadata={"unsaid": True})  # hashes of runs without stay

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if not self.bandwidth_mbps > 0:
            raise UserError(f"output.bandwidth_mbps is {self.bandwidth_mbps}; it must be positive")
        least = {"keep_last": 1, "keep_best": 1 if self.select == "best" else 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                why = " where output.select is 'best'" if name == "keep_best" and bound else ""
                raise UserError(f"output.{name} is {getattr(self, name)}; it must be at least {bound}{why}")
        tracking.refuse(self.tracking, encrypted=self.encryption is not None)
