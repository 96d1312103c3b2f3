"""Your own sites, patients protected: one JSON Lines (or CSV) file each in one folder, a prompt and an answer a record.

    python -m experiments.privacy --config=configs/own_sites.py --data.source.paths data/sites     # what it guarantees
    python -m experiments.run --config=configs/own_sites.py --data.source.paths data/sites

A record: {"prompt": "...", "answer": "...", "patient": "p17"}. All records of a patient stay in one split, and all of
them together are what differential privacy hides, from everyone outside the site: every site adds its own noise in
every local step, calibrated to its own number of patients, from the operating system's entropy. Where every patient has
one record, ``--privacy.unit=record`` is the same. Delta is checked against each site's number of patients first.
"""

from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        # Few private numbers: one factor of one module in the upper layers. What lies below is computed once a record.
        lora=Lora(rank=4, alpha=8, targets=("v_proj",), layers=tuple(range(-8, 0)), train="b"),
        data=Data(source=SiteFiles(paths=("data/sites",), owner_column="patient"), max_length=256),
        training=LocalTraining(batch_size=32, local_steps=2, optimizer=Optimizer("sgd", learning_rate=50.0)),
        federation=Federation(rounds=10),
        privacy=Privacy(
            mechanism=DpSgd(clip_norm=0.15),
            unit="patient",
            target_epsilon=8.0,
            delta=1e-5,
            randomness="secret",
            real_data=True,
        ),
        evaluation=Evaluation(validation_every=2),
    )
