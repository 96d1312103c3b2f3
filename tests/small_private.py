"""The miniature of ``small_run`` with differential privacy: an experiment for each place where noise is added."""

import json
from pathlib import Path
from typing import Any

from small_run import changed

from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.config import Experiment
from fedjax_llm.privacy import ledger
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.training.optimizers import Optimizer

DELTA = 1e-3
FIELDS: dict[str, dict[str, Any]] = {  # privacy comes last: it is compared with the rest at once
    "DpSgd": {"privacy": Privacy(DpSgd(noise_multiplier=2.0), delta=DELTA, real_data=False)},
    "DpFedSgd": {
        "training__optimizer": Optimizer("sgd", 1.0),
        "training__local_steps": 1,
        "federation__weighting": "uniform",
        "aggregation": FedAdam(1e-2),
        "privacy": Privacy(DpFedSgd(noise_multiplier=2.0), delta=DELTA, real_data=False),
    },
    "DpFedAvg": {
        "federation__weighting": "uniform",
        "privacy": Privacy(DpFedAvg(clip_norm=0.1, noise_multiplier=2.0), unit="site", delta=DELTA, real_data=False),
    },
    "LocalDp": {
        "privacy": Privacy(LocalDp(clip_norm=0.1, noise_multiplier=4.0), unit="site", delta=DELTA, real_data=False)
    },
}
"""By the mechanism's name: what makes the miniature private."""


def private(experiment: Experiment, name: str = "DpSgd", **fields: Any) -> Experiment:
    """The experiment with a mechanism; further fields as for ``changed``."""
    return changed(experiment, **FIELDS[name], **fields)


def entries(folder: Path) -> list[tuple[int, int]]:
    """(round, attempt) of all that a run has charged, by what is on the disk now."""
    return [(entry.round, entry.attempt) for entry in ledger.read(folder / ledger.LEDGER).entries]


def summary(folder: Path) -> dict[str, Any]:
    """``summary.json``."""
    return json.loads((folder / "summary.json").read_text())
