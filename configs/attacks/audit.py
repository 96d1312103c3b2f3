"""The quickstart's mechanism, audited on the real model: what do a thousand canaries show of epsilon?

    python -m experiments.attack --config=configs/attacks/audit.py
    python -m experiments.attack --config=configs/attacks/audit_sabotaged.py   # the same with too little noise

The canaries are records whose gradients are directions of their own, and a coin decides which are in. Mechanism,
clinics, adapters and clip norm are the quickstart's, but for a claim that an audit can contradict: a thousand canaries
show at most about 4 in one run, so that a claim of 8 would stand whatever the code does. Here epsilon is 2. Records are
sampled with probability 0.5 in each of 8 rounds, so that every canary is seen, and few other records train beside them.
"""

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.audit_run import Audit
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_attack() -> Audit:
    """The attack described above."""
    experiment = Experiment(
        lora=Lora(rank=4, alpha=8, targets=("v_proj",), layers=tuple(range(-8, 0)), train="b"),
        data=Data(
            source=HpoFlashcards(sites=CLINICS, max_records_per_site=8),
            fractions=Fractions(validation=0.0, test=0.2),
            test_every_site=False,
            max_length=112,
            system="You are a medical dictionary.",
        ),
        training=LocalTraining(batch_size=5, local_steps=1, optimizer=Optimizer("sgd", learning_rate=1.0)),
        federation=Federation(rounds=8, weighting="uniform"),
        aggregation=FedAvg(server_lr=1.0),
        privacy=Privacy(
            mechanism=DpFedSgd(clip_norm=0.15, sampling_probability=0.5),
            unit="record",
            target_epsilon=2.0,
            delta=1e-5,
            real_data=False,
        ),
        evaluation=Evaluation(test_records=1, choice_questions=0, generations=1),
        execution=Execution(tokens_per_microbatch=384, buckets=2, evaluation_buckets=1),
    )
    return Audit(experiment, kind="gradient", canaries=1000)
