"""Runs in Weights & Biases (https://docs.wandb.ai): scalars by round, the configuration, the summary."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedjax_llm.errors import UserError
from fedjax_llm.runs.tracking import Run, Tracked


@dataclass(frozen=True)
class Wandb:
    """Tracks a run in Weights & Biases.

    It is sent the configuration, and the aggregate figures of metrics and summary; nothing of the machine, no code, no
    output of the terminal.

    Attributes:
      project: at the service.
      entity: the team or user whose project it is; ``None``: that of the login.
      group: what shows together; ``None``: nothing does.
      mode: ``offline`` writes into the run's folder (``wandb/``) and sends nothing: ``wandb sync`` does, if ever.
      sites: whether figures of single sites are sent as well, as far as ``metrics.jsonl`` has them
        (``output.client_metrics``). No guarantee of differential privacy covers them.
    """

    project: str
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline"] = "online"
    sites: bool = False

    def check(self) -> None:
        """Refuses a missing package, and a service that nobody has logged in to."""
        if importlib.util.find_spec("wandb") is None:
            raise UserError("output.tracking has Wandb, which needs a package: pip install 'fedjax_llm[wandb]'")
        if self.mode == "offline":
            return
        wandb = _package()

        if wandb.api.api_key is None:
            raise UserError(
                "output.tracking has Wandb, but nobody is logged in to it: run 'wandb login' (or set WANDB_API_KEY), "
                "or choose Wandb(mode='offline')"
            )

    def begin(self, run: Run) -> Tracked:
        """Begins a run at the service, or goes on with that of the known id."""
        wandb = _package()
        quiet = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, disable_code=True, x_disable_stats=True,
            x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False, host="", init_timeout=60,
        )  # fmt: skip
        begun = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=run.name,
            id=run.known,
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,
            dir=str(run.folder),
            config=dict(run.config),
            settings=quiet,
        )
        begun.define_metric("round", hidden=True)
        begun.define_metric("*", step_metric="round")  # rounds that a resume does again would be refused as steps

        def finish(summary: Mapping[str, float | str] | None) -> None:
            if summary is not None:
                begun.summary.update({f"summary/{name}": value for name, value in summary.items()})
            begun.finish(exit_code=0 if summary is not None else 1)

        return Tracked(begun.id, lambda step, numbers: begun.log({**numbers, "round": step}), finish)


def _package() -> Any:
    """Weights & Biases, told before it is imported not to report its faults to its makers."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb
