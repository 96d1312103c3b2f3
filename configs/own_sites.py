"""Your own sites: one JSON Lines (or CSV) file each in one folder, prompt and answer in every record.

    python -m experiments.run --config=configs/own_sites.py --data.source.paths data/sites

A record: {"prompt": "...", "answer": "...", "patient": "p17"}. All records of a patient stay in one split.
"""

from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Federation
from fedjax_llm.lora import Lora
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config() -> Experiment:
    return Experiment(
        lora=Lora(rank=8, alpha=16, targets=("q_proj", "v_proj")),
        data=Data(source=SiteFiles(paths=("data/sites",), owner_column="patient"), max_length=256),
        training=LocalTraining(batch_size=4, local_epochs=1, optimizer=Optimizer("adamw", learning_rate=1e-3)),
        federation=Federation(rounds=10),
        evaluation=Evaluation(validation_every=2),
    )
