"""Differential privacy for whole sites, audited on the real model with a thousand canary clients.

    python -m experiments.attack --config=configs/attacks/audit_sites.py

A canary is a site whose only example gives an update in a direction of its own; a coin decides whether it exists. The
mechanism is that of ``configs/many_sites.py`` with a fixed clip norm: a secret cohort, and noise once on the sum.
"""

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.partition import Iid
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.audit_run import Audit
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_attack() -> Audit:
    """The attack described above."""
    experiment = Experiment(
        lora=Lora(rank=4, alpha=8, targets=("v_proj",), layers=tuple(range(-8, 0)), train="b"),
        data=Data(
            source=HpoFlashcards(max_records_per_site=12),
            partition=Iid(sites=40),
            fractions=Fractions(validation=0.0, test=0.02),
            test_every_site=False,
            max_length=112,
            system="You are a medical dictionary.",
        ),
        training=LocalTraining(batch_size=1, local_steps=1, optimizer=Optimizer("sgd", learning_rate=30.0)),
        federation=Federation(rounds=4, cohort=20, weighting="uniform"),
        aggregation=FedAvg(server_lr=1.0),
        privacy=Privacy(
            mechanism=DpFedAvg(clip_norm=8.0), unit="site", target_epsilon=2.0, delta=1e-5, real_data=False
        ),
        evaluation=Evaluation(test_records=1, choice_questions=0, generations=1),
        execution=Execution(tokens_per_microbatch=512, buckets=2, evaluation_buckets=1, clients_per_chunk=40),
    )
    return Audit(experiment, kind="client", canaries=1000)
