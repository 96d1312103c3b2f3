"""Simulated clinics: the flashcards dealt out to 16 sites by Dirichlet(0.3) over organ systems; FedAdam at the server.

    python -m experiments.run --config=configs/dirichlet.py

The smaller alpha, the less a site's cards look like the others'.
"""

from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.partition import DirichletByLabel
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Federation
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        data=Data(source=HpoFlashcards(), partition=DirichletByLabel(sites=16, alpha=0.3, min_records=40)),
        training=LocalTraining(batch_size=4, local_steps=4, optimizer=Optimizer("sgd", learning_rate=0.1)),
        federation=Federation(rounds=20, cohort=4),
        aggregation=FedAdam(server_lr=3e-3),
        evaluation=Evaluation(test_records=20, validation_every=5, choice_questions=8),
    )
