"""A small run that knows its training records by heart, planted secrets among them: the known ground of attacks."""

import io
import json
import random
import string
from pathlib import Path
from typing import Any

from rich.console import Console
from small_run import changed
from tiny import tiny_base

from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.attacked_run import attack_run
from fedjax_llm.experiment.ground import Attacks
from fedjax_llm.experiment.run import run
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

OFTEN = 16
ATTACKS = Attacks(candidates=16, references=15, beams=2, tokens_per_microbatch=2048)


def load_tiny(name: str, dtype: str, quantise: str = "none") -> BaseModel:
    """In place of ``loading.load``: random weights, wide enough to learn a text by heart."""
    return tiny_base(width=64)


def write_words(folder: Path, records: int = 20) -> Path:
    """Two sites of records whose answers are random letters, so that nothing but training tells them."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for site in ("coast", "hill"):
        rows = [
            {
                "id": f"{site}-{i}",
                "prompt": f"Word {i} of {site}?",
                "answer": "".join(draw.choices(string.ascii_lowercase, k=8)),
            }
            for i in range(records)
        ]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def known_experiment(words: Path, **fields: Any) -> Experiment:
    """Learns by heart; ``fields`` as for ``small_run.changed``.

    Two secrets are stated once, two often, four never, and 24 by coins. Adapters are in the upper layer alone.
    """
    files = SiteFiles((str(words),), id_column="id")
    secrets = PlantedSecrets(files, (1, OFTEN), per_repetition=2, coins=24, kinds=("patient number",))
    experiment = Experiment(
        model=Model(name="tiny"),
        lora=Lora(rank=16, alpha=32.0, targets=("v_proj", "up_proj", "down_proj"), layers=(-1,)),
        data=Data(secrets, fractions=Fractions(0.1, 0.4), max_length=160),
        training=LocalTraining(batch_size=16, local_steps=25, optimizer=Optimizer("adamw", 1e-2)),
        federation=Federation(rounds=4),
        evaluation=Evaluation(test_records=2, choice_questions=0, generations=0, bootstrap_resamples=20),
        execution=Execution(tokens_per_microbatch=2048, buckets=1, evaluation_buckets=1),
        setting="centralised",
    )
    return changed(experiment, **fields)


def trained(experiment: Experiment, folder: Path) -> Path:
    """Its run, finished; gives the folder."""
    quiet = Console(file=io.StringIO(), width=120)
    assert run(experiment, folder, resume=False, console=quiet, load_model=load_tiny) == 0
    return folder


def attacked(folder: Path, attacks: Attacks = ATTACKS, **options: Any) -> tuple[int, dict[str, Any], str]:
    """The exit status, ``leakage.json``, and what the user saw."""
    seen = io.StringIO()
    status = attack_run(folder, attacks, Console(file=seen, width=200), load_model=load_tiny, **options)
    return status, json.loads((folder / "leakage.json").read_text()), seen.getvalue()
