"""The noise that a well-known course on private federated fine-tuning adds, and what it guarantees: next to nothing.

    python -m experiments.privacy --config=configs/course/dp_as_taught.py

The course clips each client's update to 0.5 and adds noise with a noise multiplier of 0.02 at the server, with 16 of 20
clients (a fraction of 0.8) in each of 200 rounds. At delta 1e-5 that is an epsilon of some 228,000 for one site (add or
remove all data of one site), where below 10 is what people mean by private. To reach 8 in this setting, the noise
multiplier would have to be several hundred times as large: with 20 sites that drowns what they learn, and it takes
hundreds of sites, or privacy for records instead of sites.

Epsilon depends on the noise and on who takes part when, not on the text or the model; so here are the default ones,
dealt to 20 sites. To train on the course's own, see ``configs/course/finetuning.py``.
"""

from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.partition import Iid
from fedjax_llm.federation.plan import Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer, Schedule


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        lora=Lora(rank=16, alpha=64, targets=("q_proj", "v_proj"), dropout=0.075),
        data=Data(source=HpoFlashcards(), partition=Iid(sites=20)),
        training=LocalTraining(
            batch_size=16,
            local_steps=10,
            optimizer=Optimizer("adamw", learning_rate=5e-5),
            round_schedule=Schedule("cosine", end=0.02),
        ),
        federation=Federation(rounds=200, cohort=16, weighting="uniform"),
        privacy=Privacy(DpFedAvg(clip_norm=0.5, noise_multiplier=0.02), unit="site", delta=1e-5, real_data=False),
    )
