"""A whole experiment in miniature: a tiny model folder, three sites of invented records, and a configuration file."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny import tiny_folder

from fedjax_llm import config
from fedjax_llm.config import Experiment
from fedjax_llm.experiment.run import run
from fedjax_llm.runs import metrics

SITES = {"coast": 14, "hill": 9, "town": 20}
"""Records of each site."""
CONFIG = '''"""A miniature."""

from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config():
    return Experiment(
        model=Model(name={model!r}),
        lora=Lora(rank=2, alpha=4.0),
        data=Data(SiteFiles((({sites!r}),), id_column="id"), fractions=Fractions(0.2, 0.2), max_length=96),
        training=LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer("adamw", 1e-2)),
        federation=Federation(rounds=3, cohort=2),
        evaluation=Evaluation(generations=2, max_new_tokens=4, bootstrap_resamples=50),
        execution=Execution(tokens_per_microbatch=384, buckets=1, evaluation_buckets=1, clients_per_chunk=4),
    )
'''


def write_sites(folder: Path) -> Path:
    """One JSONL file a site."""
    folder.mkdir(parents=True)
    for site, count in SITES.items():
        rows = [
            {
                "id": f"{site}-{i}",
                "prompt": f"Who keeps {site} {i}?",
                "answer": f"{'Ada' if i % 2 else 'Ben'} of the {site}.",
            }
            for i in range(count)
        ]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_small(folder: Path) -> Path:
    """Writes model, sites and ``small.py`` into a folder; gives the configuration file."""
    model, sites = tiny_folder(folder / "model"), write_sites(folder / "sites")
    (folder / "small.py").write_text(CONFIG.format(model=str(model), sites=str(sites)))
    return folder / "small.py"


def changed(experiment: Experiment, **fields: Any) -> Experiment:
    """The experiment with fields replaced; ``training__optimizer__name="sgd"`` reaches into nested ones."""
    for path, value in fields.items():
        experiment = _put(experiment, path.split("__"), value)
    config.check(experiment)
    return experiment


def _put(value: Any, path: list[str], new: Any) -> Any:
    inner = new if len(path) == 1 else _put(getattr(value, path[0]), path[1:], new)
    return dataclasses.replace(value, **{path[0]: inner})


def go(experiment: Experiment, folder: Path, *, resume: bool = False) -> tuple[int, str]:
    """Runs in this process; the exit status, and what the user saw."""
    seen = io.StringIO()
    status = run(experiment, folder, resume=resume, console=Console(file=seen, width=120))
    return status, seen.getvalue()


def outcome(folder: Path) -> Mapping[str, Any]:
    """All of a finished run that must be a function of configuration and seed, bit for bit."""
    from fedjax_llm.experiment.finish import without_timing

    return {
        "adapters": {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("adapter*/**/*.*")},
        "metrics": [metrics.deterministic(line) for line in metrics.read(folder / "metrics.jsonl")],
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "summary": without_timing(json.loads((folder / "summary.json").read_text())),
    }
